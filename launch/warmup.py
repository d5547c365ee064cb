"""The worker's half of the standby: note what the script imports, import it ahead, and wait at the gate.

What may be imported ahead of a script without the script noticing? Modules of the standard library, of installed
packages and of ours, as far as the script asked for them before it first changed ``os.environ``: scripts set
KERAS_BACKEND or OMP_NUM_THREADS in front of the import that reads it. Nothing of the user's own: that is read when the gate
opens, so a script that was mended meanwhile runs mended. What a script asks for after it has changed ``sys.path`` (``beyond``) is imported
ahead only where the path as it was leads to the same file, and to none that the script finds elsewhere.

The recorder is a finder on ``sys.meta_path`` that finds nothing. (An audit hook could not be taken away again, and
is called for far more than imports.) It is asked once for every module that is not loaded yet, in order, nested imports too.
It tells at the first step, when what is imported lazily (by the first optimizer, the first backward) has been.

Whatever the imports change in ``os.environ``, ``sys.path`` and ``sys.argv`` is undone, since the script may look there for
what it has set itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import MappingProxyType, ModuleType
from typing import Any, Final, TypeVar

from launch.ahead import Ahead
from supervisor.edge import link as links
from supervisor.edge.link import Link
from supervisor.edge.marks import Mark
from supervisor.errors import EverstepError

T = TypeVar("T")

_EVERYWHERE: Final = ("built-in", "frozen")  # whatever the path
_FOREIGN: Final = "*"

#: set by torch itself while it is imported, to a path of its own making; no sign of the script
_TORCHS_OWN: Final = "TORCHINDUCTOR_CACHE_DIR"


class Recorder:
    """Notes the names of modules as they are first asked for, while the script has left its environment as it was.

    ``names``, ``beyond``: what was imported ahead, which nobody will ask for.
    """

    def __init__(self, names: Iterable[str] = (), beyond: Iterable[str] = ()) -> None:
        self.names = list(names)
        self.beyond = list(beyond)  # … after the path was changed
        self._environ = _surroundings()
        self._path = list(sys.path)
        self._noting = True
        self.stopped_by: list[str] = []  # variables that the script has changed before it asked for torch

    def find_spec(
        self, fullname: str, _path: Sequence[str] | None, _target: ModuleType | None = None
    ) -> None:
        """Finds nothing."""
        if self._noting:
            now = _surroundings()
            self._noting = now == self._environ
            if self._noting:
                (self.names if sys.path == self._path else self.beyond).append(fullname)
            elif "torch" not in sys.modules:
                changed = {key for key, _ in now.items() ^ self._environ.items()}
                self.stopped_by = sorted(os.fsdecode(key) for key in changed)

    def importable(self, root: str) -> tuple[list[str], dict[str, str]]:
        """Those that are loaded, from installed packages, the standard library, or ``root``.

        Of those beyond, where each was found, in order; also the top-level ones from elsewhere, marked with a ``*``: their names must
        not lead to anything else.
        """
        places = _installed_places(root)
        names = [name for name in dict.fromkeys(self.names) if _place_of(name).startswith(places)]
        beyond = {}
        for name in dict.fromkeys(self.beyond):
            place = _place_of(name)
            if place.startswith(places) or place in _EVERYWHERE:
                beyond[name] = place
            elif place and "." not in name:
                beyond[name] = f"{_FOREIGN}{place}"
        return names, beyond


def _surroundings() -> dict[Any, Any]:
    """The environment, less what torch puts there. ``_data``: without decoding every value for every import."""
    values = dict(getattr(os.environ, "_data", os.environ))
    key = os.fsencode(_TORCHS_OWN)
    if os.path.basename(os.fsencode(values.get(key, b""))).startswith(b"torchinductor_"):
        del values[key]
    return values


def _installed_places(root: str) -> tuple[str, ...]:
    import site  # here, because every worker waits for the boot
    import sysconfig

    paths = sysconfig.get_paths()
    places = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    places += [*site.getsitepackages(), os.path.join(root, "supervisor")]
    if site.ENABLE_USER_SITE:
        places.append(site.getusersitepackages())
    return tuple(os.path.join(place, "") for place in places)


def _place_of(name: str) -> str:
    """Where a module that is loaded was found: its file, or its directory; empty where that is not known."""
    return _place(getattr(sys.modules.get(name), "__spec__", None))


def _place(spec: ModuleSpec | None) -> str:
    if spec is None:
        return ""
    return spec.origin or next(iter(spec.submodule_search_locations or ()), "")


def preimport(names: Iterable[str], beyond: Mapping[str, str] = MappingProxyType({})) -> None:
    """Import them in order. What fails is left to the script: if it still asks for that, it will be told."""
    environ, path, argv = dict(os.environ), list(sys.path), list(sys.argv)
    for name in names:
        _try(importlib.import_module, name)
    foreign = [name for name, place in beyond.items() if place.startswith(_FOREIGN)]
    if all(_found(name) in ("", beyond[name].removeprefix(_FOREIGN)) for name in foreign):
        for name, place in beyond.items():
            parent = name.rpartition(".")[0]
            if (not parent or parent in sys.modules) and _found(name) == place:
                _try(importlib.import_module, name)
    for key in os.environ.keys() - environ.keys():
        del os.environ[key]
    os.environ.update({key: value for key, value in environ.items() if os.environ.get(key) != value})
    sys.path[:], sys.argv[:] = path, argv


def _found(name: str) -> str:
    """Where the path as it is leads to; empty: nowhere."""
    return _place(_try(importlib.util.find_spec, name))


def _try(act: Callable[[str], T], name: str) -> T | None:
    try:
        return act(name)
    except Exception:  # noqa: BLE001 (a module may raise anything; see above)
        return None


class Gate:
    """Stands between the boot and the script: open at once, except in a standby. Or further on, in the script (``ahead.py``)."""

    def __init__(self, link: Link, root: str) -> None:
        self._link, self._root = link, root
        self._recorder: Recorder | None = None
        self._ahead: Ahead | None = None
        #: whether this is a standby's worker that has not been let begin
        self.is_closed = bool(os.environ.get(links.STANDBY))

    def enter(self) -> None:
        """Import ahead, wait if need be, and note what is imported from here on. Last thing before the script."""
        ahead: dict[str, Any] = self._link.welcome.get("preimport") or {}
        names, beyond = ahead.get("names", []), ahead.get("beyond", {})
        if self.is_closed:
            preimport(names, beyond)
            if not self._link.welcome.get("ahead"):
                self.wait()
        if self._link.local_rank == 0:
            self._recorder = Recorder(names, [name for name in beyond if name in sys.modules])
            sys.meta_path.insert(0, self._recorder)
        if self.is_closed:
            self._go_ahead()

    def wait(self, where: str = "", read: Mapping[str, Mark] = MappingProxyType({})) -> None:
        """Until the supervisor lets this attempt begin; a standby that is not needed is killed here."""
        if not self.is_closed:
            return
        cuda: Any = getattr(sys.modules.get("torch"), "cuda", None)
        cuda_in_use = bool(cuda and cuda.is_initialized())
        try:
            self._link.ask("gate", deadline=None, cuda=cuda_in_use, where=where, read=dict(read))
        except EverstepError:
            os.kill(os.getpid(), signal.SIGKILL)  # no trace, no exit handlers: it never began
        self.is_closed = False

    def _go_ahead(self) -> None:
        own = [os.environ["EVERSTEP_DIR"], str(self._link.runtime)]
        held = [*map(os.path.abspath, own), *self._link.welcome.get("hold", ())]
        self._ahead = ahead = Ahead(self.wait, _installed_places(self._root), held)
        links.in_front_of_current = lambda: ahead.stand("a Session")
        ahead.start()

    def ends_here(self) -> None:
        """The main thread is through. Where nobody has come to the gate the process ends, without any of its exit handlers."""
        if self._ahead is not None and self._ahead.give_up():
            if sys.exc_info()[0] is not None:
                traceback.print_exc()
            os.kill(os.getpid(), signal.SIGKILL)

    def told(self) -> Callable[[], None]:
        """What to call at the first step: it tells what was imported, once."""

        def tell() -> None:
            if self._recorder is not None:
                recorder, self._recorder = self._recorder, None
                if recorder in sys.meta_path:
                    sys.meta_path.remove(recorder)
                names, beyond = recorder.importable(self._root)
                stopped_by = recorder.stopped_by if "torch" in sys.modules else []
                self._link.tell("imported", names=names, beyond=beyond, stopped_by=stopped_by)

        return tell
