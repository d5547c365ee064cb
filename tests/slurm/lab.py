"""A real SLURM cluster on this machine: munged, slurmctld and seven slurmds, for as long as a block lasts.

Everything lies in one folder of its own and listens on free ports of the loopback, so several clusters stand side by side.
Jobs in the partition ``high`` preempt those in ``low`` after ``GRACE`` seconds, by requeueing them, and those in ``bare`` at once. Needs root, and
slurmctld, slurmd, the client commands and munge.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

EPILOG = Path(__file__).parents[2] / "deploy" / "slurm" / "epilog.sh"
NODES = tuple(f"n{number}" for number in range(1, 8))
GRACE = 60  # seconds
KILL_WAIT = 60  # seconds
DEADLINE = 90.0
PATIENCE = 20.0  # seconds that a client command may take

#: programs, and the Debian package that has each
NEEDED = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}

CONF = """\
ClusterName=lab
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0,requeue_delay=1
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdTimeout=60
MinJobAge=3600
KillWait={kill_wait}
ReturnToService=2
JobRequeue=1
TCPTimeout=5
MessageTimeout=20
UnkillableStepTimeout=60
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
GresTypes=gpu
Epilog={epilog}
CommunicationParameters=NoAddrCache
"""
PARTITIONS = """\
PartitionName=low Nodes={nodes} Default=YES MaxTime=60 DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace} State=UP
PartitionName=bare Nodes={nodes} MaxTime=60 DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE GraceTime=0 State=UP
PartitionName=high Nodes={nodes} MaxTime=60 DefaultTime=10 PriorityTier=10 PreemptMode=OFF State=UP
"""


@dataclass(frozen=True)
class Lab:
    """A running cluster."""

    folder: Path
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """What a client finds in its environment; nothing of a SLURM job around us."""
        outer = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))
        }
        return {**outer, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def call(self, *words: object, cwd: Path | None = None, environment: dict[str, str] | None = None) -> str:
        """The output of a client command; fails with what it said when it did not succeed."""
        result = subprocess.run(
            [str(word) for word in words], env={**self.environment, **(environment or {})}, cwd=cwd,
            capture_output=True, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
        assert result.returncode == 0, f"{words}: {result.stdout}{result.stderr}"
        return result.stdout

    def show(self, job: str) -> dict[str, str]:
        """What SLURM knows of a job: the fields of ``scontrol show job``."""
        words = self.call("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, job: str) -> str:
        """The job's state."""
        return self.show(job)["JobState"]

    def until(self, job: str, *states: str, restarts: int = 0, deadline: float = DEADLINE) -> dict[str, str]:
        """Wait until the job is in one of the states, after so many restarts at least; what SLURM knows of it then."""
        limit = time.monotonic() + deadline
        while True:
            shown = self.show(job)
            if shown["JobState"] in states and int(shown["Restarts"]) >= restarts:
                return shown
            assert time.monotonic() < limit, f"{job} is {shown}, not {states}"
            time.sleep(0.2)

    def start(self, name: str) -> None:
        """A daemon, in the foreground: ``munged``, ``slurmctld``, or a node's slurmd by the node's name."""
        munge = self.folder / "munge"
        argv = {
            "munged": [
                "munged", "--foreground", "--force", f"--socket={munge}/socket", f"--key-file={munge}/key",
                f"--pid-file={munge}/pid", f"--seed-file={munge}/seed", f"--log-file={munge}/log", "--num-threads=2",
            ],
            "slurmctld": ["slurmctld", "-D"],
        }.get(name, ["slurmd", "-D", "-N", name])  # fmt: skip
        with open(self.folder / f"{name}.log", "ab") as sink:
            self.daemons[name] = subprocess.Popen(
                argv, env=self.environment, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True,
            )  # fmt: skip

    def restart(self, name: str) -> None:
        """End a daemon, and start it again. (A slurmctld that is killed forgets what it was told last, jobs included.)"""
        self.daemons[name].terminate()
        self.daemons[name].wait(DEADLINE)
        self.start(name)

    def lose(self, node: str) -> None:
        """The node is gone with all that runs there, and SLURM is told at once, which it would find out by itself in SlurmdTimeout."""
        self.daemons[node].kill()
        self.daemons[node].wait()
        there = [process for process in self._processes() if process.environ().get("SLURMD_NODENAME") == node]
        steps = {parent for one in there if (parent := one.parent()) and parent.name() == "slurmstepd"}
        for process in (*steps, *there):  # first those that would tell of the others' ends
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.call("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")

    def bring_back(self, node: str) -> None:
        """The node is there again, empty."""
        self.start(node)
        limit = time.monotonic() + DEADLINE
        while "down" in self.call("sinfo", "--noheader", "--Node", f"--nodes={node}", "--format=%T"):
            assert time.monotonic() < limit, self.log()
            time.sleep(0.1)

    def _processes(self) -> Iterator[psutil.Process]:
        """What was given our slurm.conf."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    yield process

    def cancel_all(self) -> None:
        """End every job and wait until nothing of any is left."""
        self.call("scancel", "--user=root")
        self.call("scancel", "--user=root", "--signal=KILL", "--full")
        limit = time.monotonic() + DEADLINE
        while self.call("squeue", "--noheader").strip():
            assert time.monotonic() < limit, self.call("squeue")
            time.sleep(0.1)

    def log(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(
            f"== {file.name}\n" + "\n".join(file.read_text(errors="replace").splitlines()[-30:])
            for file in sorted(self.folder.glob("*.log"))
        )


@contextlib.contextmanager
def running() -> Iterator[Lab]:
    """A cluster whose nodes are idle, for as long as the block lasts; nothing of it is left afterwards."""
    lacking = {package for program, package in NEEDED.items() if shutil.which(program) is None}
    assert not lacking, f"these tests need SLURM: apt-get install {' '.join(sorted(lacking))} (.ci/run does)"
    folder = Path(tempfile.mkdtemp(prefix="everstep-slurm-"))
    lab = Lab(folder)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.callback(_kill_steps, lab)
        _write_conf(folder)
        munge = folder / "munge"
        munge.mkdir(mode=0o755)
        (munge / "key").touch(mode=0o600)
        (munge / "key").write_bytes(os.urandom(128))
        _start(stack, lab, "munged")
        _await(lab, "munge", f"--socket={munge}/socket", "--no-input")
        for daemon in ("slurmctld", *NODES):
            _start(stack, lab, daemon)
        _await_idle(lab)
        yield lab


def _write_conf(folder: Path) -> None:
    controller, *ports = _free_ports(1 + len(NODES))
    host = socket.gethostname().split(".")[0]
    for name in ("state", *(f"spool/{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    nodes = "".join(
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=16 RealMemory=1000 Gres=gpu:8 State=UNKNOWN\n"
        for node, port in zip(NODES, ports, strict=True)
    )
    # a job's number is all that the epilog knows it by: another cluster on this machine must have others
    first = random.SystemRandom().randrange(1, 60_000_000)
    conf = CONF.format(
        epilog=EPILOG, host=host, controller=controller, folder=folder, kill_wait=KILL_WAIT, first_job=first
    )
    partitions = PARTITIONS.format(nodes=",".join(NODES), grace=GRACE)
    for gpu in range(8):  # the plugin wants files that exist, and nothing more
        (folder / f"gpu{gpu}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
    (folder / "slurm.conf").write_text(conf + nodes + partitions)


def _start(stack: contextlib.ExitStack, lab: Lab, name: str) -> None:
    """Start a daemon that is ended when the block is left: in the reverse order."""
    lab.start(name)
    stack.callback(lambda: _end(lab.daemons[name]))


def _end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(5)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _kill_steps(lab: Lab) -> None:
    """What slurmds have started outlives them: every process that was given our slurm.conf."""
    for process in lab._processes():
        with contextlib.suppress(psutil.Error):
            process.kill()


def _await(lab: Lab, *words: str) -> None:
    limit = time.monotonic() + DEADLINE
    while subprocess.run(
        words, env=lab.environment, capture_output=True, timeout=PATIENCE, check=False
    ).returncode:
        assert time.monotonic() < limit, lab.log()
        time.sleep(0.05)


def _await_idle(lab: Lab) -> None:
    words = ["sinfo", "--noheader", "--Node", "--partition=low", "--format=%N:%T"]
    limit = time.monotonic() + DEADLINE
    while True:
        result = subprocess.run(
            words, env=lab.environment, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        if sorted(result.stdout.split()) == [f"{node}:idle" for node in NODES]:
            return
        assert time.monotonic() < limit, lab.log()
        time.sleep(0.05)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
