"""Hosts on a network of their own, on this machine: namespaces that a bridge joins, for as long as a block lasts.

A host has what a machine has of its own: network, process ids (so nobody sees, or ends, another host's processes), name, ``/dev/shm``
(so what lies in a host's RAM is lost with it). It shares the files, like hosts with one network file system. Its first process holds all
of it: when that is killed, the kernel ends every other process of the host and takes its interfaces away, which is what ``crash`` does.
The first processes die with the thread that has made the lab, so no process or interface is ever left, and nothing has a name outside:
labs stand side by side.

Needs root, iproute2 and util-linux.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

#: why tests that have a lab are skipped; None: they are not
WHY_NOT = None if os.geteuid() == 0 else "only root makes network namespaces"
DEADLINE = 60.0
#: programs, and the Debian package that has each
NEEDED = {"ip": "iproute2", "tc": "iproute2", "nsenter": "util-linux", "unshare": "util-linux",
          "setpriv": "util-linux", "setsid": "util-linux", "mount": "mount"}  # fmt: skip
INTERFACE = "eth0"  # of a host
NOBODY = "02:00:00:00:00:00"  # a station that is not there

#: a host's first process: it buries whoever has lost its parent
INIT = """
import os, signal, socket, sys
socket.sethostname(sys.argv[1])
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
os.write(1, b"up\\n")
while True:
    signal.sigwait({signal.SIGCHLD})
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
"""
#: names are looked up in the file alone: a name server that nobody reaches is waited for
BOOT = (
    'mount --bind "$1" /etc/hosts && { [ ! -e /etc/resolv.conf ] || mount --bind /dev/null /etc/resolv.conf; } && '
    'mount -t tmpfs -o mode=1777 tmpfs /dev/shm && exec "$2" -S -c "$3" "$0"'
)


class Process(subprocess.Popen[bytes]):
    """A process on a host, in a session of its own. ``pid`` is its parent outside, which ends as it does; signals go to itself."""

    inner: int | None = None

    def send_signal(self, sig: int) -> None:
        """To the process; nothing if it has ended."""
        if self.poll() is None and self.inner is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.inner, sig)


class Host:
    """One of them, up or down. Made by ``Lab``."""

    def __init__(self, lab: Lab, number: int) -> None:
        self.name = f"h{number}"
        self.address = f"10.77.0.{number}"
        self.station = f"02:00:00:00:01:{number:02x}"  # like a machine's, the same after every boot
        self.first = 0  # its first process, as it is called outside
        self._lab = lab
        self._boot: subprocess.Popen[bytes] | None = None
        self._boots = 0

    def __repr__(self) -> str:
        return self.name

    @property
    def is_up(self) -> bool:
        """Whether it runs."""
        return self._boot is not None and self._boot.poll() is None

    @property
    def port(self) -> str:
        """Where it is plugged in; each boot has one of its own, as the kernel takes a dead host's away when it sees fit."""
        return f"p{self.name}b{self._boots}"

    def popen(
        self, argv: Sequence[object], env: Mapping[str, str] | None = None, *, cwd: Path | str | None = None, **rest: Any
    ) -> Process:  # fmt: skip
        """Start a program there: it is on the host when this returns. What it prints goes where ``rest`` (for ``subprocess.Popen``) says."""
        assert self.is_up, f"{self.name} is down"
        words = [
            "nsenter", f"--target={self.first}", "--net", "--uts", "--ipc", "--mount", "--pid", "--",
            "setsid", "sh", "-c", 'cd "$0" && exec "$@"', cwd or os.getcwd(), *argv,
        ]  # fmt: skip
        rest.setdefault("stdin", subprocess.DEVNULL)
        process = Process([str(word) for word in words], env=None if env is None else dict(env), **rest)
        process.inner = _child(process)
        return process

    def run(self, *argv: object, deadline: float = DEADLINE, **rest: Any) -> str:
        """What a program prints there; fails with all of it where it did not succeed."""
        with tempfile.TemporaryFile() as sink:
            process = self.popen(argv, stdout=sink, stderr=subprocess.STDOUT, **rest)
            try:
                process.wait(deadline)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            sink.seek(0)
            output = sink.read().decode(errors="replace")
        assert process.returncode == 0, f"{self.name}: {argv}: {process.returncode}: {output}"
        return output

    def crash(self) -> None:
        """As if the power had gone: every process of it, what was in its RAM, and no word to anybody."""
        self._lab.cut(self)
        self.end()

    def boot(self) -> None:
        """Up again after a crash, as it was at first: same name and address, plugged in, nothing in RAM, no process."""
        self.begin()
        self.finish()

    def begin(self) -> None:
        """The first half of ``boot``, so that several come up at once."""
        assert not self.is_up, f"{self.name} is up"
        self._boots += 1
        with open(self._lab.folder / f"{self.name}.log", "ab") as log:
            self._boot = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork",
                 "--mount-proc", "--kill-child=KILL", "--", "sh", "-c", BOOT, self.name, self._lab.folder / "hosts",
                 sys.executable, INIT],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip

    def finish(self) -> None:
        """The second half."""
        assert self._boot is not None
        assert self._boot.stdout is not None
        with self._boot.stdout as stdout:
            said, log = stdout.readline(), self._lab.folder / f"{self.name}.log"
        assert said == b"up\n", f"{self.name} has not come up: {log.read_text()}"
        first = _child(self._boot)
        assert first is not None, f"{self.name} has gone down at once"
        self.first = first
        self._lab.plug(self)
        self.ip(f"addr add {self.address}/24 dev {INTERFACE}", f"link set {INTERFACE} up", "link set lo up")

    def end(self) -> None:
        """Kill what there is of it."""
        if self._boot is not None and self._boot.poll() is None:
            first = _child(self._boot)
            if first is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(first, signal.SIGKILL)
            self._boot.wait(DEADLINE)

    def ip(self, *lines: str) -> None:
        """Commands of ``ip`` on this host."""
        _ip(self.first, *lines)


class Lab:
    """``count`` hosts at first. All of it is gone when the block is left."""

    def __init__(self, count: int) -> None:
        self.hosts: list[Host] = []
        self._count = count
        self._stack = contextlib.ExitStack()
        self._switch = 0

    def __enter__(self) -> Lab:
        lacking = {package for program, package in NEEDED.items() if shutil.which(program) is None}
        assert not lacking, f"these tests need: apt-get install {' '.join(sorted(lacking))} (.ci/run does)"
        with self._stack:
            self.folder = Path(tempfile.mkdtemp(prefix="everstep-hosts-"))
            self._stack.callback(shutil.rmtree, self.folder)
            (self.folder / "hosts").write_text("127.0.0.1 localhost\n")
            switch = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--", "sh", "-c", "echo up; exec sleep infinity"],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            )  # fmt: skip
            self._stack.callback(_end, switch)
            assert switch.stdout is not None
            with switch.stdout as stdout:
                assert stdout.readline() == b"up\n"
            self._switch = switch.pid
            _ip(self._switch, "link add br0 type bridge", "link set br0 up")
            for host in [self._add() for _ in range(self._count)]:
                host.finish()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def join(self) -> Host:
        """One host more."""
        host = self._add()
        host.finish()
        return host

    def cut(self, host: Host) -> None:
        """The network loses whatever comes from the host or is for it. Nobody is told, the host's link stays up."""
        _ip(self._switch, f"link set {host.port} nomaster")

    def heal(self, host: Host) -> None:
        """Undo ``cut``."""
        _ip(self._switch, f"link set {host.port} master br0")

    def cut_pair(self, one: Host, other: Host) -> None:
        """These two do not reach each other, silently; both reach everybody else."""
        one.ip(f"neigh replace {other.address} lladdr {NOBODY} nud permanent dev {INTERFACE}")
        other.ip(f"neigh replace {one.address} lladdr {NOBODY} nud permanent dev {INTERFACE}")

    def heal_pair(self, one: Host, other: Host) -> None:
        """Undo ``cut_pair``."""
        one.ip(f"neigh del {other.address} dev {INTERFACE}")
        other.ip(f"neigh del {one.address} dev {INTERFACE}")

    def rate(self, host: Host, mbit: float | None) -> None:
        """The host's link carries at most so many megabits a second each way; None: as many as it can."""
        for pid, device in ((host.first, INTERFACE), (self._switch, host.port)):
            if mbit is None:
                _inside(pid, "tc", "qdisc", "del", "dev", device, "root")
            else:
                limit = ["tbf", "rate", f"{mbit}mbit", "burst", "32kb", "latency", "400ms"]
                _inside(pid, "tc", "qdisc", "replace", "dev", device, "root", *limit)

    def plug(self, host: Host) -> None:
        """A cable between the switch and a host that has come up."""
        _ip(
            self._switch,
            f"link add {host.port} type veth peer name {INTERFACE} address {host.station} netns {host.first}",
            f"link set {host.port} master br0 up",
        )

    def _add(self) -> Host:
        host = Host(self, len(self.hosts) + 1)
        self.hosts.append(host)
        with open(self.folder / "hosts", "a") as file:  # the file that all hosts have before their eyes
            file.write(f"{host.address} {host.name}\n")
        self._stack.callback(host.end)
        host.begin()
        return host


def _ip(pid: int, *lines: str) -> None:
    _inside(pid, "ip", "-batch", "-", typed="\n".join(lines).encode())


def _inside(pid: int, *words: str, typed: bytes = b"") -> None:
    """A program in the network of a process."""
    argv = ["nsenter", f"--net=/proc/{pid}/ns/net", "--", *words]
    result = subprocess.run(argv, input=typed, capture_output=True, timeout=DEADLINE, check=False)
    assert result.returncode == 0, f"{words} {typed!r}: {result.stderr.decode()}"


def _child(process: subprocess.Popen[bytes]) -> int | None:
    """The one child, which the process makes at once; None where the process has ended."""
    limit = time.monotonic() + DEADLINE
    while process.poll() is None:
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            if children:
                return int(children[0])
        assert time.monotonic() < limit, f"{process.args} starts nothing"
        time.sleep(0.001)
    return None


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
