"""Processes: spawn them, hear of their death at once, learn how they died, and leave none behind.

The node supervisor is a *subreaper*: whatever an attempt leaves behind, however it was forked, becomes its child.
So "everything of the attempt" is found among our descendants, and no process can hide by a double fork.

A worker is torchrun's child, not ours, so its exit status is torchrun's to collect. We read it without collecting:
from the pidfd where the kernel keeps it (Linux 6.15), else from ``/proc/<pid>/stat`` while it is still a zombie.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import signal
import struct
import subprocess
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from supervisor.edge import kernel

PR_SET_CHILD_SUBREAPER = 36
PF_EXITING = 0x4  # include/linux/sched.h
_PIDFD_INFO_EXIT = 1 << 3
_PIDFD_INFO_SIZE = 64  # struct pidfd_info, first version: mask, cgroupid, then 11 u32 ids and the exit code
_PIDFD_GET_INFO = (3 << 30) | (_PIDFD_INFO_SIZE << 16) | (0xFF << 8) | 11


@dataclass(frozen=True)
class Exit:
    """How a process ended: exactly one of the two is set."""

    code: int | None = None
    signal: int | None = None

    @classmethod
    def of_status(cls, status: int) -> Exit:
        """From a wait status (as of ``waitpid``)."""
        if os.WIFSIGNALED(status):
            return cls(signal=os.WTERMSIG(status))
        return cls(code=os.WEXITSTATUS(status))


def become_subreaper() -> None:
    """Adopt every orphan among our descendants (Linux 3.4)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def spawn(
    argv: Sequence[str], environment: Mapping[str, str], output: Path, stdin: int = subprocess.DEVNULL
) -> int:
    """Start ``argv`` in a session of its own, its output appended to ``output``; returns the pid.

    Must be called from the main thread: the child asks for SIGKILL at the death of the *thread* that forked it.
    Raises OSError when the program cannot be started.
    """
    with open(output, "ab") as sink:
        process = subprocess.Popen(
            list(argv),
            env=dict(environment),
            stdin=stdin,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )
    process.returncode = 0  # reaping is ours (`reap`): Popen must neither wait nor warn
    return process.pid


def exit_of(pidfd: int, pid: int) -> Exit | None:
    """How the process behind ``pidfd`` ended, without reaping it; None when nobody can tell any more."""
    request = bytearray(struct.pack("=Q", _PIDFD_INFO_EXIT).ljust(_PIDFD_INFO_SIZE, b"\0"))
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, request)
    except OSError:
        return _exit_of_zombie(pid)
    mask = struct.unpack_from("=Q", request)[0]
    if mask & _PIDFD_INFO_EXIT:
        return Exit.of_status(struct.unpack_from("=i", request, _PIDFD_INFO_SIZE - 4)[0])
    return _exit_of_zombie(pid)


def _exit_of_zombie(pid: int) -> Exit | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rsplit(b")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return Exit.of_status(int(fields[49])) if fields[0] == b"Z" else None


def is_exiting(pid: int) -> bool:
    """Whether the process's main thread is on its way out (or gone), though other threads may keep its pidfd silent yet.

    The kernel sends a parent-death signal when the *thread* that forked exits, so a child can be dead of it before its
    parent counts as dead.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rsplit(b")", 1)[1].split()
    except (OSError, IndexError):
        return True
    return fields[0] in (b"Z", b"X") or bool(int(fields[6]) & PF_EXITING)


def state_of(pid: int) -> tuple[str, bool]:
    """The letter of its state (``T``: stopped, ``D``: waits in the kernel) and whether a debugger is attached to it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "", False
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    return fields.get("State", "")[:1], fields.get("TracerPid", "0").strip() != "0"


#: how those ended whom somebody waits for while others collect every child: pid → how, None as long as it runs
_expected: dict[int, Exit | None] = {}


def expect(pid: int) -> None:
    """Somebody will ask ``end_of`` our child ``pid``: whoever collects it before is to remember how it ended."""
    _expected[pid] = None


def end_of(pid: int) -> Exit:
    """How our expected child ``pid``, which has ended, did that; collects it. Asked once."""
    with contextlib.suppress(ChildProcessError):
        collected, status = os.waitpid(pid, os.WNOHANG)
        if collected:
            _note(pid, status)
    return _expected.pop(pid, None) or Exit(code=0)


def forget(pid: int) -> None:
    """Nobody will ask how it ended; it is collected as any orphan is."""
    _expected.pop(pid, None)


def _note(pid: int, status: int) -> None:
    if pid in _expected:
        _expected[pid] = Exit.of_status(status)


def reap() -> dict[int, Exit]:
    """Collect every child that has ended: pid → how."""
    ended: dict[int, Exit] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended[pid] = Exit.of_status(status)
        _note(pid, status)


def reap_adopted(keep: Collection[int]) -> None:
    """Reap the orphans that were given to us and have ended, but none of ``keep``: their ends are somebody's evidence."""
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None or ended.si_pid in keep:
            return
        _note(*os.waitpid(ended.si_pid, 0))


def descendants(run_id: str, launchers: Collection[int] = ()) -> list[int]:
    """Every living process below this one that belongs to the run ``run_id`` (zombies left out), in no order.

    Below this process there may be others: children of the program that became us by exec, and, where we are a container's
    first process, anybody's orphans. A direct child is the run's if it is one of ``launchers`` or bears the run's id in its
    environment (or has overwritten that); what is below such a child is the run's in any case.
    """
    children = _children()
    ours = [pid for pid in children.get(os.getpid(), []) if pid in launchers or _is_of(pid, run_id)]
    return ours + [pid for child in ours for pid in _below(child, children)]


def below(root: int) -> list[int]:
    """Every living process below ``root`` (zombies left out), in no order."""
    return _below(root, _children())


def _below(root: int, children: Mapping[int, list[int]]) -> list[int]:
    found: list[int] = []
    queue = [root]
    while queue:
        added = children.get(queue.pop(), [])
        found += added
        queue += added
    return found


def _children() -> dict[int, list[int]]:
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            fields = Path(f"/proc/{entry}/stat").read_bytes().rsplit(b")", 1)[1].split()
        except (OSError, IndexError):
            continue  # it ended meanwhile
        if fields[0] not in (b"Z", b"X"):  # a zombie's children were given to us already
            children.setdefault(int(fields[1]), []).append(int(entry))
    return children


def _is_of(pid: int, run_id: str) -> bool:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
    return not environment.strip(b"\0") or f"EVERSTEP_RUN_ID={run_id}\0".encode() in environment


def bears(pid: int, entry: str) -> bool:
    """Whether ``NAME=value`` stood in the environment that the process was started with."""
    try:
        return os.fsencode(entry) in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False  # gone, or not ours to ask


def reap_these(pids: Iterable[int]) -> None:
    """Collect these of our children where they have ended, and leave the others' exit statuses alone."""
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            collected, status = os.waitpid(pid, os.WNOHANG)
            if collected:
                _note(pid, status)


def yield_cpu(pid: int) -> bool:
    """Let whatever wakes up go before ``pid`` and its children to come; whether that could be done.

    SCHED_BATCH, because everybody may leave it again: an unprivileged user can neither raise a nice value nor leave
    SCHED_IDLE. Where we ourselves have a policy of our user's choice, it is kept.
    """
    if os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False
    try:
        os.sched_setscheduler(pid, os.SCHED_BATCH, os.sched_param(0))
    except OSError:
        return False  # gone, or a sandbox without scheduling policies
    return True


def compete_again(pids: Iterable[int]) -> None:
    """Undo ``yield_cpu`` for every thread of each process."""
    for pid in pids:
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{pid}/task"):
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setscheduler(int(thread), os.SCHED_OTHER, os.sched_param(0))


def offer_to_oom_killer(pid: int) -> None:
    """Have the kernel, should it run out of memory, kill ``pid`` and its children to come before anything else."""
    with contextlib.suppress(OSError):  # gone, or a sandbox without that file
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000")


def take_from_oom_killer(pids: Iterable[int]) -> None:
    """Undo ``offer_to_oom_killer``: as this process. The kernel lets anybody go back to where they came from."""
    for pid in pids:
        with contextlib.suppress(OSError):
            Path(f"/proc/{pid}/oom_score_adj").write_text(Path("/proc/self/oom_score_adj").read_text())


def send(pids: Iterable[int], signum: signal.Signals) -> None:
    """Signal each process; those that are gone are no error."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # gone, or another user's by sudo
            os.kill(pid, signum)


def open_pidfd(pid: int) -> int | None:
    """A pidfd (readable once the process has ended), or None when it is gone already."""
    try:
        return kernel.pidfd_open(pid)
    except OSError as error:
        if error.errno == errno.ESRCH:
            return None
        raise
