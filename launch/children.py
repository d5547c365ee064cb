"""Which children of a worker are shielded from signals to the whole tree (``launch/shield.py`` says how): multiprocessing's.

Their processes are part of the training (a data loader's workers), and end by the worker's word. Other forks and
programs that are executed get Python's own handlers and a clean mask: they do as they would without us.

Forked children are met by the fork hooks. For those of ``spawn`` and ``forkserver`` the signals are blocked when the new
interpreter is executed, and what it unpickles first attaches the shield.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import Any

from launch import shield
from launch.shield import SHIELDED
from launch.stepcount import AfterLoad
from supervisor.edge.control import SessionFlag, Word
from supervisor.edge.link import Link, page_path

Handler = Callable[[int, FrameType | None], None]

#: once the script has imported this it is going to open a Session; children made before that are to be shielded then
_TRAINING = "supervisor.training"
_FORK, _SPAWN = "multiprocessing.popen_fork", "multiprocessing.spawn"


def install(link: Link, handler: Handler) -> None:
    """Shield multiprocessing's children of this process; ``handler`` is the worker's own, which no child keeps."""
    page = link.page

    def is_open() -> bool:
        session = page[Word.SESSION]
        return bool(session & SessionFlag.OPEN) and not session & SessionFlag.CLOSED

    def is_wanted() -> bool:
        if page[Word.SESSION] & SessionFlag.CLOSED:
            return False
        return is_open() or _TRAINING in sys.modules

    _over_forks(is_open, is_wanted, handler)
    place = (str(page_path(link.runtime, link.attempt, link.local_rank)), Word.SESSION * 8)

    def over_spawns(spawn: ModuleType) -> None:
        _over_spawns(spawn, place, is_wanted)

    if _SPAWN in sys.modules:
        over_spawns(sys.modules[_SPAWN])
    else:
        sys.meta_path.insert(0, AfterLoad(_SPAWN, over_spawns))


def _over_forks(is_open: Callable[[], bool], is_wanted: Callable[[], bool], handler: Handler) -> None:
    """The signals are held back over the fork: one that comes before the child has changed its handlers would be lost,
    because Python forgets in a child what it was about to handle.
    """
    local = threading.local()

    def before() -> None:
        caller = sys._getframe().f_back
        local.shielded = caller is not None and caller.f_globals.get("__name__") == _FORK and is_wanted()
        local.saved = signal.pthread_sigmask(signal.SIG_BLOCK, SHIELDED)

    def in_parent() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, local.saved)

    def in_child() -> None:
        for number in SHIELDED:
            if signal.getsignal(number) is handler:
                signal.signal(
                    number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
                )
        before_us = local.saved - shield.added
        if local.shielded:
            shield.attach(is_open, None, before_us)
        else:
            signal.pthread_sigmask(signal.SIG_SETMASK, before_us)

    os.register_at_fork(before=before, after_in_parent=in_parent, after_in_child=in_child)


def _over_spawns(spawn: ModuleType, place: tuple[str, int], is_wanted: Callable[[], bool]) -> None:
    """Also the fork server is executed like this; it ends with the worker, and its children inherit its mask."""
    module: Any = spawn
    util = module.util
    execute, prepare = util.spawnv_passfds, module.get_preparation_data

    def spawnv_passfds(path: bytes, args: list[str], passfds: list[int]) -> int:
        saved = signal.pthread_sigmask(signal.SIG_BLOCK, SHIELDED if is_wanted() else ())
        try:
            return execute(path, args, passfds)  # type: ignore[no-any-return]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, saved)

    def get_preparation_data(name: str) -> dict[str, object]:
        data: dict[str, object] = prepare(name)
        if is_wanted():
            data["everstep"] = _Attachment(place)
        return data

    util.spawnv_passfds, module.get_preparation_data = spawnv_passfds, get_preparation_data


class _Attachment:
    """Unpickled in the new process, it attaches the shield there, before anything of the script's is imported."""

    def __init__(self, place: tuple[str, int]) -> None:
        page, offset = place
        blocked = sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ()) - shield.added))
        flags = (int(SessionFlag.OPEN), int(SessionFlag.CLOSED))
        self.source = (
            "import importlib.util as u\n"
            f"s = u.spec_from_file_location('everstep_shield', {shield.__file__!r})\n"
            "m = u.module_from_spec(s)\n"
            "s.loader.exec_module(m)\n"
            f"m.attach_spawned({page!r}, {offset}, {flags}, {os.getpid()}, {blocked})\n"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (self.source, {})
