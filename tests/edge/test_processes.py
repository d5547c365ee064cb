"""Real children that end in real ways."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from supervisor.edge import forensics, processes
from supervisor.edge.ports import ReservedPort

ROOT = Path(__file__).parent.parent.parent


def ended(how: Callable[[], None]) -> tuple[int, int]:
    """Pid and pidfd of a child that has ended, not reaped."""
    pid = os.fork()
    if pid == 0:
        how()
        os._exit(0)
    pidfd = processes.open_pidfd(pid)
    assert pidfd is not None
    assert select.select([pidfd], [], [], 20)[0]
    return pid, pidfd


@pytest.mark.parametrize("code", [0, 1, 7, 255])
def test_an_exit_code_is_read_without_reaping(code: int) -> None:
    pid, pidfd = ended(lambda: os._exit(code))
    try:
        assert processes.exit_of(pidfd, pid) == processes.Exit(code=code)
        assert processes._exit_of_zombie(pid) == processes.Exit(code=code)  # what older kernels fall back to
    finally:
        os.close(pidfd)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGABRT])
def test_a_signal_is_read_without_reaping(signum: signal.Signals) -> None:
    def die() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signum)

    pid, pidfd = ended(die)
    try:
        assert processes.exit_of(pidfd, pid) == processes.Exit(signal=signum)
        assert processes._exit_of_zombie(pid) == processes.Exit(signal=signum)
    finally:
        os.close(pidfd)
        os.waitpid(pid, 0)


def test_a_process_that_is_gone_has_no_pidfd() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    assert processes.open_pidfd(pid) is None
    processes.send([pid], signal.SIGKILL)


def test_a_subreaper_finds_and_ends_what_was_forked_twice(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import os, signal, sys, time
        from pathlib import Path
        from supervisor.edge import processes

        processes.become_subreaper()
        escape = (
            "import os, time\\nif os.fork(): os._exit(0)\\nos.setsid()\\nif os.fork(): os._exit(0)\\n"
            "while os.getppid() != int(os.environ['REAPER']): time.sleep(0.001)\\n"  # its parent lives on for a moment
            "open('up', 'w').close()\\ntime.sleep(60)"
        )
        stranger = os.fork()  # as a container's side program, started before us by the same shell
        if stranger == 0:
            time.sleep(60)
            os._exit(0)
        environment = {**os.environ, "EVERSTEP_RUN_ID": "r1", "REAPER": str(os.getpid())}
        launcher = processes.spawn([sys.executable, "-c", escape], environment, Path("log"))
        deadline = time.monotonic() + 20
        while not os.path.exists("up") and time.monotonic() < deadline:
            processes.reap_adopted({launcher})
        found = [pid for pid in processes.descendants("r1") if pid != launcher]
        assert processes.descendants("r2") == []
        assert len(found) == 1, found
        processes.send(found, signal.SIGKILL)
        ended = {}
        while found[0] not in ended and time.monotonic() < deadline:
            ended |= processes.reap()
        assert ended[found[0]] == processes.Exit(signal=9), ended
        assert processes.descendants("r1") == []
        assert stranger not in ended
        os.kill(stranger, signal.SIGKILL)
        """
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True, timeout=60)


def test_a_reserved_port_can_be_bound_by_its_owner_and_is_given_to_nobody_else() -> None:
    import socket

    reserved = ReservedPort()
    others = [ReservedPort() for _ in range(50)]
    try:
        assert reserved.number not in {other.number for other in others}
        with socket.socket() as store:  # as the attempt's own store does
            store.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            store.bind(("127.0.0.1", reserved.number))
            store.listen()
    finally:
        for port in [reserved, *others]:
            port.release()


def test_torchruns_own_report_is_understood(tmp_path: Path) -> None:
    """The fallback for an exit status that torchrun collected before we could read it."""
    script = tmp_path / "die.py"
    script.write_text("import os\nprint(os.getpid(), file=open('pid', 'w'))\nos.kill(os.getpid(), 9)\n")
    with open(tmp_path / "log", "wb") as log:
        subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", str(script)],
            cwd=tmp_path, stdout=log, stderr=log, timeout=120, check=False,
        )  # fmt: skip
    assert forensics.exit_codes_in(tmp_path / "log") == {int((tmp_path / "pid").read_text()): -9}


def test_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert forensics.last_lines(log) == ()
    log.write_bytes(b"".join(b"line %d\n" % n for n in range(9000)) + b"half\xff")
    assert forensics.last_lines(log, 2) == ("line 8999", "half�")


def test_out_of_memory_kills_are_counted_somewhere() -> None:
    assert forensics.oom_kills() >= 0
    assert forensics._oom_sources()
