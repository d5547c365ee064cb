"""The worker's half of the standby: note what the script imports, import it ahead, and wait at the gate.

What may be imported ahead of a script without the script noticing? Modules of the standard library, of installed
packages and of ours, as far as the script asked for them before it first changed ``os.environ`` or ``sys.path``: scripts set
KERAS_BACKEND or OMP_NUM_THREADS in front of the import that reads it. Nothing of the user's own: that is read when the gate
opens, so a script that was mended meanwhile runs mended.

The recorder is a finder on ``sys.meta_path`` that finds nothing. (An audit hook could not be taken away again, and
is called for far more than imports.) It is asked once for every module that is not loaded yet, in order, nested imports too.
It tells at the first step, when what is imported lazily (by the first optimizer, the first backward) has been.

Whatever the imports change in ``os.environ``, ``sys.path`` and ``sys.argv`` is undone, since the script may look there for
what it has set itself.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import Any

from launch.ahead import Ahead
from supervisor.edge import link as links
from supervisor.edge.link import Link
from supervisor.edge.marks import Mark
from supervisor.errors import EverstepError

#: set by torch itself while it is imported, to a path of its own making; no sign of the script
_TORCHS_OWN = "TORCHINDUCTOR_CACHE_DIR"


class Recorder:
    """Notes the names of modules as they are first asked for, while the script has left its surroundings as they were."""

    def __init__(self, known: Iterable[str] = ()) -> None:
        self.names = list(known)
        self._environ = _surroundings()
        self._path = list(sys.path)
        self._noting = True

    def find_spec(
        self, fullname: str, _path: Sequence[str] | None, _target: ModuleType | None = None
    ) -> None:
        """Finds nothing."""
        if self._noting:
            self._noting = _surroundings() == self._environ and sys.path == self._path
            if self._noting:
                self.names.append(fullname)

    def importable(self, root: str) -> list[str]:
        """Those that are loaded, from installed packages, the standard library, or ``root``."""
        places = _installed_places(root)
        return [name for name in dict.fromkeys(self.names) if _lies_in(sys.modules.get(name), places)]


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


def _lies_in(module: ModuleType | None, places: tuple[str, ...]) -> bool:
    origin = getattr(getattr(module, "__spec__", None), "origin", None)
    return isinstance(origin, str) and origin.startswith(places)


def preimport(names: Iterable[str]) -> None:
    """Import them in order. What fails is left to the script: if it still asks for that, it will be told."""
    environ, path, argv = dict(os.environ), list(sys.path), list(sys.argv)
    for name in names:
        try:
            importlib.import_module(name)
        except Exception:  # noqa: BLE001, S112 (a module may raise anything; see above)
            continue
    for key in os.environ.keys() - environ.keys():
        del os.environ[key]
    os.environ.update({key: value for key, value in environ.items() if os.environ.get(key) != value})
    sys.path[:], sys.argv[:] = path, argv


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
        names = [str(name) for name in self._link.welcome.get("preimport", ())]
        if self.is_closed:
            preimport(names)
            if not self._link.welcome.get("ahead"):
                self.wait()
        if self._link.local_rank == 0:
            self._recorder = Recorder(names)
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
                self._link.tell("imported", names=recorder.importable(self._root))

        return tell
