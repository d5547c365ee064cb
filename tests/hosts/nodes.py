"""``everstep run`` on the hosts of a lab, one job among them, in a directory that all of them share."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tests.e2e.harness import DEADLINE, ROOT, TRAIN, Job, environment, torchrun
from tests.hosts.lab import Host, Lab, Process

PORT = 7077
T = TypeVar("T")
#: a host's processes that are the job's, or were left by it, and what is in its RAM
LOOK = """
import os, sys
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        environ = open(f"/proc/{pid}/environ", "rb").read()
        state = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0]
    except OSError:
        continue
    if b"EVERSTEP_RUN_ID=" in environ and state != "Z":
        print("process", open(f"/proc/{pid}/cmdline").read().replace(chr(0), " "))
for folder, _, names in os.walk("/dev/shm"):
    for name in names:
        print("memory", os.path.join(folder, name))
"""
KILL = """
import os, signal, sys, time
victims = []
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        words = open(f"/proc/{pid}/environ", "rb").read().split(bytes(1))
    except OSError:
        continue
    if f"EVERSTEP_ATTEMPT={sys.argv[1]}".encode() in words and any(word.startswith(b"RANK=") for word in words):
        victims.append(int(pid))
assert len(victims) == 1, victims
print(time.time())
os.kill(victims[0], signal.SIGKILL)
"""
#: the newest step of which there is a copy of another node's snapshot
COPIED = """
import glob
from pathlib import Path
from supervisor.checkpoint import slots
found = [slots.read_slot(Path(name), None) for name in glob.glob("/dev/shm/*/*/copies/*")]
print(max([record.step for record in found if record is not None], default=-1))
"""
#: whether rank 0 of an attempt has been given a place for the next snapshot
OFFERED = """
import glob, sys
from pathlib import Path
from supervisor.edge.control import ControlPage, Word
pages = glob.glob(f"/dev/shm/*/*/control/{sys.argv[1]}/rank-0")
print(sum(bool(ControlPage(Path(name))[Word.FREE_SLOT]) for name in pages))
"""
#: what the nodes tell, from the store that h1 serves
REPORTS = """
import asyncio, json, sys
from pathlib import Path
from supervisor.edge import secret
from supervisor.edge.store.tcp import TcpStore
async def main():
    host, port = sys.argv[3].split(":")
    store = TcpStore(host, int(port), secret.of_job(Path(sys.argv[1])))
    view = await store.read("node/")
    print(json.dumps({key[5:]: json.loads(entry.value) for key, entry in view.entries.items()}))
    await store.close()
asyncio.run(main())
"""


class Nodes(Job):
    """One job on the hosts of ``lab``; ``process`` is None: there are several."""

    def __init__(
        self,
        lab: Lab,
        folder: Path,
        store: str | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(folder)
        self._environ = environ or {}
        self.lab = lab
        self.runs: dict[str, Process] = {}  # the newest on each host
        self._store = store or f"tcp://{lab.hosts[0].address}:{PORT}"
        folder.parent.mkdir(parents=True, exist_ok=True)

    def begin(
        self,
        host: Host,
        *arguments: object,
        options: Sequence[object] = (),
        faults: Sequence[dict[str, object]] = (),
        key: str | None = None,
        script: object = TRAIN,
        environ: Mapping[str, str] | None = None,
    ) -> Process:
        """Start ``everstep run`` there. ``arguments`` are the training's, ``options`` everstep's."""
        argv = [
            sys.executable, "-m", "launch.cli", "run", "--dir", self.folder, "--store", self._store,
            "--notices", "none", *options, *torchrun(*arguments, ranks=1, script=str(script)),
        ]  # fmt: skip
        environ = {
            **environment(faults),
            **self._environ,
            **({} if key is None else {"EVERSTEP_KEY": key}),
            **(environ or {}),
        }
        with open(self.output_of(host), "ab") as sink:
            self.runs[host.name] = host.popen(argv, environ, cwd=ROOT, stdout=sink, stderr=sink)
        return self.runs[host.name]

    def begin_all(
        self, *arguments: object, options: Sequence[object] = (), faults: Sequence[dict[str, object]] = ()
    ) -> None:
        """… on every host that is up."""
        for host in self.lab.hosts:
            if host.is_up:
                self.begin(host, *arguments, options=options, faults=faults)

    def codes(self, *hosts: Host, deadline: float = DEADLINE) -> list[int]:
        """The exit codes on these hosts, once all have ended."""
        limit = time.monotonic() + deadline
        found = []
        for host in hosts:
            try:
                found.append(self.runs[host.name].wait(max(0.01, limit - time.monotonic())))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"{host} still runs after {deadline} s:\n{self.told}") from None
        return found

    def output_of(self, host: Host) -> Path:
        return self.folder.with_name(f"{self.folder.name}-{host.name}.out")

    def until_said(self, host: Host, text: str, times: int = 1) -> None:
        """Wait until a host's supervisor has said something."""
        self.until(lambda: self.output_of(host).read_text(errors="replace").count(text) >= times or None)

    @property
    def output(self) -> str:
        """Of all hosts."""
        return self.told

    @property
    def told(self) -> str:
        found = []
        for host in self.lab.hosts:
            path = self.output_of(host)
            if path.exists():
                found.append(f"---- {host}\n{path.read_text(errors='replace')}")
        return "\n".join(found)

    def left_on(self, host: Host) -> list[str]:
        """What the job has left on a host."""
        return host.run(sys.executable, "-S", "-c", LOOK).splitlines()

    def until_at(self, step: int, *ranks: int, after: int = -1) -> int:
        """Wait until these ranks hold at ``step`` in one attempt after ``after``; the newest such attempt."""

        def found() -> int | None:
            names = [path.name.split("-")[1:] for path in self.folder.parent.glob(f"at-{step}-*")]
            attempts = {int(attempt) for _, attempt, _ in names}
            whole = [n for n in attempts if all([str(step), str(n), str(rank)] in names for rank in ranks)]
            return max(whole) + 1 if whole and max(whole) > after else None

        return self.until(found) - 1

    def until_standby(self, *hosts: Host) -> None:
        """Wait until these hosts have said in their reports that their ranks of the next attempt stand at the gate."""
        names = [host.name for host in hosts]

        def ready() -> bool | None:
            found = json.loads(
                hosts[0].run(sys.executable, "-c", REPORTS, self.folder, *self._store.split("//"), cwd=ROOT)
            )
            return all(found.get(name, {}).get("ready", 0) > 0 for name in names) or None

        self.until(ready)

    def status_on(self, host: Host) -> dict[str, Any]:
        """What ``everstep status --json`` shows there."""
        found: dict[str, Any] = json.loads(host.run(*self.command("status", "--json"), cwd=ROOT))
        return found

    def command(self, name: str, *words: object) -> list[object]:
        """The command line of an everstep command about the job."""
        return [sys.executable, "-m", "launch.cli", name, "--dir", self.folder, *words]

    def until_copied(self, host: Host, step: int) -> None:
        """Wait until this host has a copy of what another one has stored of ``step`` or a later one."""
        self.until(lambda: int(host.run(sys.executable, "-c", COPIED, cwd=ROOT)) >= step or None)

    def until_offered(self, host: Host, attempt: int) -> None:
        """Wait until rank 0, which runs there, will take a snapshot after the step that it is in."""
        self.until(lambda: int(host.run(sys.executable, "-c", OFFERED, attempt, cwd=ROOT)) or None)

    def let_go(self, step: int) -> None:
        """Have ranks that hold at ``step`` go on."""
        (self.folder.parent / f"go-{step}").touch()

    def kill_rank(self, host: Host, attempt: int) -> float:
        """SIGKILL for the rank of an attempt there; when that was, in Unix seconds."""
        return float(host.run(sys.executable, "-S", "-c", KILL, attempt))
