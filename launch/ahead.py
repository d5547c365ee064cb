"""The standby's deep gate: the script is run ahead, up to the first thing that would be noticed outside of its process.

What a script does to itself (imports, arguments, environment, seeds, building a model) may be done an hour early. It must not
*change* anything outside while another attempt trains, and nothing that it has *learned* from outside may be older than its
attempt. So the gate stands, whichever comes first, in front of

- ``init_process_group`` (any rendezvous of torch's), a Session, the first step of an optimizer, the first use of a GPU;
- an act on the outside: a file opened for writing, made, renamed, removed or locked, a directory listed, a connection, another
  process. The interpreter's *audit events* tell of each before it is done, in the thread that is about to do it, and that thread waits
  in the event's hook until its attempt begins;
- the job's own directory, and what an earlier standby has read in vain (below).

Files may be read and looked for before. What was read, or looked for in vain, is written down with its identity, size and time of change,
and told at the gate. When the attempt is to begin the supervisor looks again, and where anything has changed the standby
is not used (``supervisor/standby.py``). This holds for the script's own source too, so one that was mended meanwhile runs mended.

Not seen: files that are read or written by code that is not Python's (a library's own ``fopen``), unless they are still open or mapped at
the gate; ``os.stat`` and ``os.access`` called by their own names; the time of day. What that means for a user is said in docs/how-it-works.md.

A script that ends before it gets to the gate is killed where it ends: its exit handlers are not to run for nothing.

Standard library only. An audit hook cannot be taken away again: what is left of ours is one comparison for each event.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import stat
import sys
import threading
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, Final

from launch.stepcount import AfterLoad
from supervisor.edge import marks

_MOST: Final = 4096  # files; then the gate is as good as any other place
_WRITING: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_IMPORTING: Final = (
    "<frozen importlib._bootstrap_external>",
    "<frozen importlib._bootstrap>",
    "<frozen zipimport>",
)
#: looks through the directories of ``sys.path`` for installed packages and their versions
_METADATA: Final = os.path.join(os.path.dirname(os.__file__), "importlib", "metadata", "__init__.py")
_TEMPFILE: Final = os.path.join(os.path.dirname(os.__file__), "tempfile.py")
_HARMLESS: Final = (
    "/proc/",
    "/sys/",
    "/dev/null",
    "/dev/zero",
    "/dev/random",
    "/dev/urandom",
    "/etc/",
    "/usr/lib",
)
_LISTING: Final = ("os.listdir", "os.scandir", "glob.glob", "glob.glob/2")
_CHANGING: Final = frozenset(
    f"os.{name}"
    for name in "mkdir remove rename rmdir truncate chmod chown link symlink utime setxattr removexattr lockf".split()
)
#: acts on what is outside, whoever it is that asks for them
_OUTSIDE: Final = frozenset(
    (
        *(
            "os.exec",
            "os.fork",
            "os.forkpty",
            "os.kill",
            "os.killpg",
            "os.posix_spawn",
            "os.spawn",
            "os.system",
        ),
        *("subprocess.Popen", "pty.spawn", "signal.pthread_kill"),
        *("socket.bind", "socket.connect", "socket.sendmsg", "socket.sendto"),
        *(
            "fcntl.flock",
            "fcntl.lockf",
            "sqlite3.connect",
            "tempfile.mkstemp",
            "tempfile.mkdtemp",
            "syslog.openlog",
        ),
        *("shutil.rmtree", "shutil.move", "shutil.chown"),
    )
)
_ACCELERATORS: Final = ("cuda", "xpu", "mtia")


class Ahead:
    """The gate of a script that runs ahead. ``wait`` returns when the attempt begins; it is told where, and what was read.

    ``places``: directories whose files do not change under a job (installed packages). ``held``: paths in front of which
    the gate stands, files or whole directories.
    """

    def __init__(
        self, wait: Callable[[str, dict[str, marks.Mark]], None], places: Iterable[str], held: Iterable[str]
    ) -> None:
        self._wait = wait
        self._places = (*places, *_HARMLESS)
        self._held = tuple(held)
        self._lock = threading.Lock()
        self._within: int | None = None  # the thread that is at the gate, whose own acts are ours
        self._marks: dict[str, marks.Mark] = {}
        self._undo: list[Callable[[], object]] = []
        self._opened = threading.Event()

    def start(self) -> None:
        """From now on until the gate has opened."""
        for name in ("genericpath", "posixpath", "pathlib", "pathlib._local", "pathlib._abc"):
            if (module := sys.modules.get(name)) is not None and getattr(module, "os", None) is os:
                self._put(module, "os", _Os(self._looks_for))
        if "torch" in sys.modules:
            self._guard(sys.modules["torch"])
        else:
            sys.meta_path.insert(0, AfterLoad("torch", self._guard))
        sys.addaudithook(self._hear)

    def stand(self, where: str) -> None:
        """Wait for the attempt to begin, once; whoever comes later waits for the same."""
        if self._opened.is_set() or self._within == threading.get_ident():
            return
        with self._lock:
            if self._opened.is_set():
                return
            self._within = threading.get_ident()
            try:
                self._mark_what_is_open()
                self._wait(where, self._marks)
                for undo in reversed(self._undo):
                    undo()
            finally:
                self._opened.set()
                self._within = None

    def give_up(self) -> bool:
        """The main thread is through. Whether nobody has come to the gate; else wait with who has."""
        with self._lock:
            if self._opened.is_set():
                return False
            self._within = threading.get_ident()
            return True

    # ------------------------------------------------------------------ torch

    def _guard(self, torch: Any) -> None:
        """Stand in front of its doors to the outside; put back as they were once the gate has opened."""
        if self._opened.is_set():
            return
        c10d = sys.modules.get("torch.distributed.distributed_c10d")
        if c10d is not None and hasattr(c10d, "init_process_group"):
            init = self._in_front(c10d.init_process_group, "init_process_group")
            self._put(c10d, "rendezvous", self._in_front(c10d.rendezvous, "init_process_group"))
            self._put(c10d, "init_process_group", init)
            self._put(torch.distributed, "init_process_group", init)
        for name in _ACCELERATORS:
            module = sys.modules.get(f"torch.{name}")
            if module is not None and hasattr(module, "_lazy_init"):
                self._put(module, "_lazy_init", self._in_front(module._lazy_init, f"the first use of {name}"))
        optimizer: Any = sys.modules["torch.optim.optimizer"]
        hook = optimizer.register_optimizer_step_pre_hook(lambda *_: self.stand("the first optimizer step"))
        self._undo.append(hook.remove)

    def _in_front(self, function: Any, where: str) -> Any:
        @functools.wraps(function)
        def standing(*args: Any, **kwargs: Any) -> Any:
            self.stand(where)
            return function(*args, **kwargs)

        return standing

    def _put(self, module: Any, name: str, value: Any) -> None:
        self._undo.append(functools.partial(setattr, module, name, getattr(module, name)))
        setattr(module, name, value)

    # ------------------------------------------------------------------ the outside

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._opened.is_set() or self._within == threading.get_ident():
            return
        with contextlib.suppress(TypeError, ValueError):  # no path at all: the function itself will complain
            self._judge(event, arguments)

    def _judge(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            self._opens(*arguments)
        elif event in _OUTSIDE:
            self.stand(event)
        elif event in _LISTING:
            path = arguments[0] if arguments else None
            if not (self._is_installed(path) or _is_importing(sys._getframe(1), _METADATA)):
                self.stand(f"{event} of {path}")
        elif event in _CHANGING and not _is_importing(sys._getframe(1)):
            self.stand(f"{event} of {arguments[0]}")

    def _opens(self, path: Any, _mode: Any, flags: Any) -> None:
        if isinstance(path, int):
            return
        name = _absolute(path)
        if name.startswith(_HARMLESS):
            return
        if flags & _WRITING:
            if not _is_importing(sys._getframe(2)):  # it keeps what it has compiled, as ever
                self.stand(f"writing to {name}")
        elif not self._is_installed(name):
            self._reads(name)
            if name.endswith(".pyc") and _is_importing(sys._getframe(1)):
                self._reads(importlib.util.source_from_cache(name))  # what it was compiled from

    def _looks_for(self, path: Any) -> None:
        """Somebody asks whether it is there, and what it is like."""
        if self._opened.is_set() or self._within == threading.get_ident() or isinstance(path, int):
            return
        with contextlib.suppress(TypeError, ValueError):
            if not self._is_installed(name := _absolute(path)):
                self._reads(name)

    def _reads(self, name: str) -> None:
        if any(name == held or name.startswith(held + os.sep) for held in self._held):
            self.stand(f"reading {name}")
            return
        try:
            found = os.stat(name)
        except OSError:
            self._marks.setdefault(name, None)
        else:
            if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
                self.stand(f"reading {name}")
                return
            self._marks.setdefault(name, marks.mark_of(found))
        if len(self._marks) >= _MOST:
            self.stand(f"having read {_MOST} files")

    def _mark_what_is_open(self) -> None:
        """Also files that a library has opened or mapped by itself."""
        names = []
        for fd in os.listdir("/proc/self/fd"):
            try:
                names.append(os.readlink(f"/proc/self/fd/{fd}"))
            except OSError:
                continue  # the listing's own
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
            names += [fields[5].rstrip("\n") for line in maps if len(fields := line.split(maxsplit=5)) == 6]
        for name in names:
            if name.startswith("/") and not self._is_installed(name) and not name.endswith(" (deleted)"):
                try:
                    found = os.stat(name)
                except OSError:
                    continue
                if stat.S_ISREG(found.st_mode) and not self._is_held(name):
                    self._marks.setdefault(name, marks.mark_of(found))

    def _is_held(self, name: str) -> bool:
        return any(name.startswith(held + os.sep) for held in self._held)

    def _is_installed(self, path: Any) -> bool:
        return path is not None and not isinstance(path, int) and _absolute(path).startswith(self._places)


class _Os:
    """The module ``os`` as some modules of the standard library see it: told what is looked for."""

    def __init__(self, told: Callable[[Any], None]) -> None:
        def stat_told(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
            told(path)
            return os.stat(path, *args, **kwargs)

        def lstat_told(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
            told(path)
            return os.lstat(path, *args, **kwargs)

        self.stat, self.lstat = stat_told, lstat_told

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


def _absolute(path: Any) -> str:
    return os.path.abspath(os.fsdecode(path))


def _is_importing(frame: FrameType | None, *others: str) -> bool:
    """Whether the import system itself is at it (or a file of ``others``), and not a module that is being imported.

    Or ``tempfile``, which tries, with a file that it removes again, where temporary files can be made.
    """
    while frame is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    if frame is None:
        return False
    code = frame.f_code
    return code.co_filename in (*_IMPORTING, *others) or (
        code.co_name == "_get_default_tempdir" and code.co_filename == _TEMPFILE
    )
