"""The manifests are what Kubernetes takes, and say what they promise; the container's command runs under their restrictions."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import psutil
import pytest
import yaml

from supervisor.decide.restart import EXIT_AGAIN
from supervisor.intervals import parse_duration
from supervisor.model import FirstStep
from tests.e2e.harness import BIN, ROOT, TRAIN, Job, environment

FOLDER = ROOT / "deploy" / "kubernetes"
CRD = "EVERSTEP_JOBSET_CRD"  # the file of the JobSet's CustomResourceDefinition
VERSION = "1.31"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def job_specs() -> list[dict[str, Any]]:
    """The spec of the Job, and that of the JobSet's job."""
    return [
        documents("job.yaml")[-1]["spec"],
        documents("jobset.yaml")[0]["spec"]["replicatedJobs"][0]["template"]["spec"],
    ]


def test_core_kinds_are_strictly_what_the_schema_says() -> None:
    found = documents("job.yaml")
    assert [document["kind"] for document in found] == ["Service", "PersistentVolumeClaim", "Job"]
    for document in found:
        kubernetes_validate.validate(document, VERSION, strict=True)
    as_job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": job_specs()[1]}
    kubernetes_validate.validate(as_job, VERSION, strict=True)


def test_the_schema_is_not_blind() -> None:
    wrong = documents("job.yaml")[-1]
    wrong["spec"]["podFailurePolicy"]["rules"][0]["actoin"] = "Ignore"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSION, strict=True)


def closed(schema: Any) -> Any:
    """The schema as the API server takes it when it is strict: fields that it does not name are refused."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    copy = {key: closed(value) for key, value in schema.items()}
    if copy.pop("x-kubernetes-int-or-string", False):
        copy.pop("anyOf", None)
        copy["type"] = ["integer", "string"]
    if "properties" in copy and not copy.get("x-kubernetes-preserve-unknown-fields"):
        copy.setdefault("additionalProperties", False)
    return copy


@pytest.mark.may_skip("the CustomResourceDefinition of JobSet is not at hand")
def test_the_jobset_is_strictly_what_its_definition_says() -> None:
    if not os.environ.get(CRD):
        pytest.skip(f"{CRD} is not set")
    definition = yaml.safe_load(Path(os.environ[CRD]).read_text())["spec"]
    schemas = {
        f"{definition['group']}/{version['name']}": closed(version["schema"]["openAPIV3Schema"])
        for version in definition["versions"]
    }
    (jobset,) = documents("jobset.yaml")
    schema = schemas[jobset["apiVersion"]]
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.validate(jobset, schema, cls=jsonschema.Draft7Validator)
    jobset["spec"]["failurePolicy"]["rules"][0]["action"] = "GiveUp"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(jobset, schema, cls=jsonschema.Draft7Validator)


@pytest.mark.parametrize("spec", job_specs(), ids=["job", "jobset"])
def test_stops_and_disruptions_do_not_burn_the_budget(spec: dict[str, Any]) -> None:
    """The rules are tried in order; a pod that none of them fits counts against backoffLimit."""
    rules = spec["podFailurePolicy"]["rules"]

    def action(code: int, *conditions: str) -> str:
        for rule in rules:
            if any(one["type"] in conditions for one in rule.get("onPodConditions", [])):
                return str(rule["action"])
            if code in rule.get("onExitCodes", {}).get("values", []):
                return str(rule["action"])
        return "Count"

    assert action(EXIT_AGAIN) == "Ignore"
    assert action(137, "DisruptionTarget") == "Ignore"
    assert action(1, "DisruptionTarget") == "Ignore"
    assert [action(code) for code in (1, 64, 78)] == ["FailJob"] * 3
    assert [action(code) for code in (70, 137, 130)] == ["Count"] * 3
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never", "a podFailurePolicy needs it"
    (container,) = pod["containers"]
    assert {rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule} == {
        container["name"]
    }
    assert spec["podReplacementPolicy"] == "Failed"


@pytest.mark.parametrize("spec", job_specs(), ids=["job", "jobset"])
def test_the_pod_has_time_memory_and_no_privileges(spec: dict[str, Any]) -> None:
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    (grace,) = [
        re.fullmatch(r"--grace=(.*)", word) for word in container["command"] if word.startswith("--grace")
    ]
    assert grace is not None
    assert parse_duration(grace[1]) + 15 <= pod["terminationGracePeriodSeconds"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert volumes[mounts["/tmp"]]["emptyDir"].get("medium") != "Memory"
    assert "persistentVolumeClaim" in volumes[mounts["/mnt/job"]]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] > 0
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip


def test_job_and_jobset_run_the_same_pod() -> None:
    job, jobset = job_specs()
    assert job["template"]["spec"].pop("subdomain") == documents("job.yaml")[0]["metadata"]["name"]
    assert job == jobset


def test_the_image() -> None:
    linted = subprocess.run(
        [BIN / "hadolint", FOLDER / "Dockerfile"], capture_output=True, text=True, timeout=120
    )
    assert (linted.returncode, linted.stdout) == (0, ""), linted.stdout + linted.stderr
    text = (FOLDER / "Dockerfile").read_text()
    extras = re.search(r'"/src\[(.*)\]"', text)
    assert extras is not None
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras[1].split(",")) <= set(known)
    for line in text.splitlines():
        if line.startswith("COPY ") and "--from" not in line and "$" not in line:
            assert all((ROOT / source).exists() for source in line.split()[1:-1]), line
    user = job_specs()[0]["template"]["spec"]["securityContext"]
    assert f"USER {user['runAsUser']}:{user['runAsGroup']}" in text


#: $1: the job directory; then the command. A root file system that cannot be written, as root of a namespace; then the
#: command as process 1 of another one, with the pod's user, no capability, and small volumes at /dev/shm, /tmp and /mnt
CONTAINER = """
set -e
mount -t tmpfs -o mode=755 none /mnt
mkdir /mnt/job
mount --rbind "$1" /mnt/job
mount -t tmpfs -o size=8m none /dev/shm
mount -t tmpfs -o size=200m none /tmp
mount -o remount,ro,bind /
mount -t proc none /proc
shift
exec unshare --user --map-user=10001 --map-group=10001 "$@"
"""


def namespaces() -> list[str]:
    """A shell as root of new namespaces."""
    # root maps itself, too: what follows needs no rights on this machine
    return [
        "unshare",
        "--user",
        "--map-root-user",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "bash",
        "-c",
        CONTAINER,
        "bash",
    ]


@pytest.mark.may_skip("this machine does not let a process make namespaces of its own")
def test_the_containers_command_under_the_pods_restrictions(tmp_path: Path) -> None:
    """Stopped as a pod is, by SIGTERM to process 1 alone, and run again: 75, then 0."""
    job = tmp_path / "job"
    job.mkdir()
    probe = "id -u; touch /usr/x 2>/dev/null || echo read-only; grep CapEff /proc/self/status | cut -f2"
    probed = subprocess.run(
        [*namespaces(), job, "bash", "-c", probe], capture_output=True, text=True, timeout=60
    )
    if probed.returncode and "unshare" in probed.stderr:
        pytest.skip(probed.stderr.strip())
    assert probed.stdout.split() == ["10001", "read-only", "0" * 16], probed.stderr

    (container,) = job_specs()[0]["template"]["spec"]["containers"]
    words = {"--nproc-per-node=8": "--nproc-per-node=2", "/app/train.py": TRAIN}
    command = [words.get(word, word) for word in container["command"]]
    env = environment() | {one["name"]: one["value"] for one in container["env"]}
    env |= {"PATH": f"{BIN}:{env['PATH']}", "PYTHONDONTWRITEBYTECODE": "1"}
    env.pop("TMPDIR", None)

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        with open(tmp_path / "output", "ab") as sink:
            return subprocess.Popen(
                [*namespaces(), job, *command, "--out", "/mnt/job/out", *arguments],
                env=env, cwd="/", stdin=subprocess.DEVNULL, stdout=sink, stderr=sink,
            )  # fmt: skip

    watched = Job(job)
    watched.process = start("--pause", "0.5")
    try:
        watched.until_fact(FirstStep)
        (supervisor,) = psutil.Process(watched.process.pid).children()
        supervisor.terminate()
        output = tmp_path / "output"
        assert watched.wait() == EXIT_AGAIN, output.read_text()
        saved = watched.record.checkpoint
        assert saved is not None
        watched.process = start()
        assert watched.wait() == 0, output.read_text()
        assert watched.record.lost_steps == 0
    finally:
        if watched.process.poll() is None:
            watched.process.kill()
            watched.process.wait()
