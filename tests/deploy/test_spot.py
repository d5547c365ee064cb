"""Machines that come back carry on: the systemd unit, the start-up scripts, cloud-init's files."""

from __future__ import annotations

import configparser
import os
import shlex
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from supervisor import config
from supervisor.checkpoint.location import is_url
from supervisor.decide.restart import EXIT_AGAIN
from supervisor.intervals import parse_duration
from supervisor.model import FirstStep
from tests.e2e.conftest import STEPS
from tests.e2e.harness import BIN, DEADLINE, ROOT, TRAIN, Job, environment

SPOT = ROOT / "deploy" / "spot"
UNIT = ROOT / "deploy" / "systemd" / "everstep.service"
SCRIPTS = [SPOT / "install.sh", SPOT / "gcp-startup.sh"]
CLOUD_INIT = [SPOT / "aws.yaml", SPOT / "azure.yaml"]


def service() -> dict[str, str]:
    parser = configparser.ConfigParser(strict=True, interpolation=None, comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(UNIT.read_text())
    return dict(parser["Service"])


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    """Its one complaint would be that everstep is not at /opt here."""
    everstep = service()["ExecStart"].split()[0]
    unit = tmp_path / "everstep.service"
    unit.write_text(UNIT.read_text().replace(everstep, str(BIN / "everstep")))
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, timeout=60,
        env={**os.environ, "SYSTEMD_LOG_LEVEL": "warning"},
    )  # fmt: skip
    assert (verified.returncode, verified.stderr) == (0, "")
    unit.write_text(unit.read_text().replace("KillMode=mixed", "KillMode=mixt"))
    wrong = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, timeout=60
    )
    assert "kill mode" in wrong.stderr, "it is looked at"


def test_the_unit_starts_again_what_can_go_on() -> None:
    unit = service()
    final = {int(code) for code in unit["RestartPreventExitStatus"].split()}
    assert unit["Restart"] == "on-failure"
    assert EXIT_AGAIN not in final
    assert final == {1, 64, 78, 130}
    assert unit["KillMode"] == "mixed", "the supervisor alone is asked to stop"
    assert float(unit["TimeoutStopSec"]) >= parse_duration("90s") + 15, "install.sh sets --grace 90s"


def test_the_scripts_are_clean() -> None:
    checked = subprocess.run([BIN / "shellcheck", *SCRIPTS], capture_output=True, text=True, timeout=60)
    assert (checked.returncode, checked.stdout) == (0, ""), checked.stdout
    assert all(os.access(script, os.X_OK) for script in SCRIPTS)


#: what cloud-init's documentation allows of the keys that are used
ALLOWED: dict[str, set[str]] = {
    "write_files": {"path", "content", "permissions", "owner", "encoding", "append", "defer"}
}


@pytest.mark.parametrize("file", CLOUD_INIT, ids=lambda file: file.stem)
def test_cloud_init_writes_what_the_script_reads(file: Path) -> None:
    text = file.read_text()
    assert text.startswith("#cloud-config\n"), "else it is not taken for what it is"
    data: dict[str, Any] = yaml.safe_load(text)
    assert set(data) == {"write_files", "mounts", "runcmd"}
    (written,) = data["write_files"]
    assert set(written) <= ALLOWED["write_files"]
    assert int(written["permissions"], 8) == 0o644
    (mount,) = data["mounts"]
    assert len(mount) == 6
    values = dict(line.split("=", 1) for line in shlex.split(written["content"].replace("\n", " \n")))
    assert values["EVERSTEP_DIR"].startswith(mount[1]), "on the disk that outlives the machine"
    assert is_url(values["EVERSTEP_CHECKPOINTS"])
    assert values["EVERSTEP_COMMAND"].startswith("torchrun ")
    (command,) = data["runcmd"]
    assert written["path"] in command[2]
    for path in (values["EVERSTEP_UNIT"], command[2].split()[-1]):
        assert (ROOT / "deploy" / path.removeprefix("/usr/local/share/everstep/")).is_file(), path


def installed(root: Path, how: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Install below ``root``, with the everstep that is tested."""
    binary = root / "opt" / "everstep" / "bin" / "everstep"
    binary.parent.mkdir(parents=True, exist_ok=True)
    if not binary.exists():
        binary.symlink_to(BIN / "everstep")
    env = {**environment(), "EVERSTEP_ROOT": str(root), "EVERSTEP_UNIT": str(UNIT), **environ}
    return subprocess.run([how], env=env, capture_output=True, text=True, timeout=60)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    given = {"EVERSTEP_COMMAND": "python x.py", "EVERSTEP_DIR": str(tmp_path / "job")}
    for missing in given:
        result = installed(tmp_path, SPOT / "install.sh", **{k: v for k, v in given.items() if k != missing})
        assert result.returncode
        assert f"{missing}: " in result.stderr
    (tmp_path / "opt" / "everstep" / "bin" / "everstep").unlink()
    env = {**environment(), **given, "EVERSTEP_ROOT": str(tmp_path)}
    bare = subprocess.run([SPOT / "install.sh"], env=env, capture_output=True, text=True, timeout=60)
    assert bare.returncode
    assert "EVERSTEP_PACKAGE: " in bare.stderr


def test_the_machine_comes_back_and_the_job_carries_on(tmp_path: Path) -> None:
    """What the unit starts, stopped as systemd stops it; then the next boot: the script, and the unit's command again."""
    root, out = tmp_path / "root", tmp_path / "out"
    job = Job(tmp_path / "job")
    pause = tmp_path / "pause"
    settings = {
        "EVERSTEP_DIR": str(job.folder), "EVERSTEP_INSTALL": str(SPOT / "install.sh"), "EVERSTEP_DEVICE": str(pause),
        "EVERSTEP_COMMAND": f"torchrun --nproc-per-node=2 {TRAIN} --out {out} --pause 0.1",
    }  # fmt: skip
    for boot in range(2):
        result = installed(root, SPOT / "gcp-startup.sh", **settings)
        assert result.returncode == 0, result.stderr
        assert (root / "etc/systemd/system/everstep.service").read_text() == UNIT.read_text()
        options = config.read_file(root / "etc/everstep/job.yaml")
        assert options == {"dir": job.folder, "notices": "auto", "grace": 90.0}
        lines = (root / "etc/everstep/job.env").read_text().splitlines()
        from_file = dict(line.split("=", 1) for line in lines)
        words = service()["ExecStart"].split()
        assert words.pop() == "$EVERSTEP_COMMAND"
        argv = [*(word.replace("/opt", f"{root}/opt").replace("/etc", f"{root}/etc") for word in words)]
        argv += from_file["EVERSTEP_COMMAND"].split()  # as systemd does
        with open(job.output_path, "ab") as sink:
            env = environment() | {"PATH": f"{BIN}:{from_file['PATH']}"}
            job.process = subprocess.Popen(argv, cwd=tmp_path, env=env, stdout=sink, stderr=sink)
        try:
            if boot == 0:
                job.until_fact(FirstStep)
                job.process.send_signal(signal.SIGTERM)
                assert job.wait(DEADLINE) == EXIT_AGAIN, job.output
            else:
                assert job.wait(DEADLINE) == 0, job.output
        finally:
            if job.process.poll() is None:
                job.close()
    assert job.record.step == STEPS
    assert job.record.lost_steps == 0
