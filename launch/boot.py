"""What happens in a worker before the user's script: the ties to the supervisor, and nothing the script could notice.

In this order, each for the reason given at its function: die with the parent, write to the rank's own log file, greet the
supervisor, take the signals, show signs of life, watch for torch's optimizer, pass the gate (``launch/warmup.py``). Standard library and ``supervisor.edge`` only, because
every worker of every attempt waits for this.

All our imports stand at the top: by the time the script runs, ``launch/worker`` has put our packages aside.
"""

from __future__ import annotations

import ctypes
import io
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

from launch import children, mainmodule, stepcount, vital
from launch.leaving import Leaving
from launch.shield import SHIELDED
from launch.warmup import Gate
from supervisor.edge import link as links
from supervisor.edge.control import Phase, SessionFlag, Word
from supervisor.edge.link import Link
from supervisor.errors import EverstepError

PR_SET_PDEATHSIG = 1
CANNOT_RUN = 127  # as a shell says that a command cannot be started


def run(words: list[str]) -> None:
    """Boot, then run the program in ``words`` (form, target, arguments). Returns or raises as the program does."""
    form, *rest = words
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _redirect()
    link = _greet()
    gate = Gate(link, str(Path(__file__).absolute().parents[1]))
    leaving = Leaving(link, gate)
    if form == "command":
        gate.wait()
        _execute(link, rest)
    _shield(link, gate)
    vital.write_stacks_on_request(link)
    stepcount.install(link.page, gate.told(), vital.Beat(link.page, threading.get_ident()).start)

    def before() -> None:
        gate.enter()
        link.page[Word.PHASE] = Phase.SETUP

    mainmodule.run(link, form, rest, before, leaving)


def _redirect() -> None:
    """Standard output and error into the rank's own file, so that no line waits in a process that is killed."""
    if os.environ.get("EVERSTEP_REDIRECT") != "0":
        attempt = int(os.environ[links.ATTEMPT])
        rank = int(os.environ.get("RANK", "0"))
        logs = Path(os.environ["EVERSTEP_DIR"], "attempts", f"{attempt:06d}", "logs")
        fd = os.open(logs / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        os.close(fd)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)


def _greet() -> Link:
    """Say hello. No supervisor means that it died while we started: then so do we."""
    environ = os.environ
    environ[links.WORKER_PID] = str(os.getpid())
    if "TORCHELASTIC_RUN_ID" in environ:  # only under torchrun: torch takes these for its presence
        environ["TORCHELASTIC_RESTART_COUNT"] = environ[links.ATTEMPT]
        environ["TORCHELASTIC_RUN_ID"] = environ["EVERSTEP_RUN_ID"]
    seen = dict(environ)
    if environ.get("EVERSTEP_VIRTUAL_LOCAL_RANK") == "1":  # LOCAL_RANK is 0 in all workers; pages must differ
        seen["LOCAL_RANK"] = str(int(environ["RANK"]) % int(environ["LOCAL_WORLD_SIZE"]))
    try:
        link = links.current(seen)
    except (OSError, EverstepError) as error:
        sys.exit(f"everstep: no supervisor for this worker ({error})")
    assert link is not None
    page = link.page
    page[Word.PID] = os.getpid()
    page[Word.HEARTBEAT_NS] = time.monotonic_ns()
    return link


def _shield(link: Link, gate: Gate) -> None:
    """While a Session is open, a signal to the whole tree does not kill the worker whose state is about to be saved.

    Without one it does what Python would have done. A handler that the script installs takes the place of ours;
    what its children do is said in ``launch/children.py``.
    """
    page = link.page

    def shield(signum: int, frame: FrameType | None) -> None:
        if gate.is_closed:
            return  # it has nothing to lose yet; the supervisor kills it if it is not needed
        session = page[Word.SESSION]
        if session & SessionFlag.OPEN and not session & SessionFlag.CLOSED:
            return
        if signum == signal.SIGINT:
            signal.default_int_handler(signum, frame)
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)

    for number in SHIELDED:
        signal.signal(number, shield)
        signal.siginterrupt(number, False)  # the script's system calls are not to notice
    children.install(link, shield)


def _execute(link: Link, words: list[str]) -> NoReturn:
    """Become the command of ``--no-python``. The connection stays open in it, so its end is seen like a worker's."""
    os.set_inheritable(link.fileno(), True)
    for number in (*SHIELDED, signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores the last two
        signal.signal(number, signal.SIG_DFL)
    os.environ["PYTHONUNBUFFERED"] = "1"
    link.page[Word.PHASE] = Phase.SETUP
    try:
        os.execvp(words[0], words)
    except OSError as error:
        link.tell("exiting", code=CANNOT_RUN)
        print(f"everstep: cannot run {words[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(CANNOT_RUN)
