"""The file that a worker's Python is started with, in front of the user's script: ``worker.py FORM TARGET ARGS…``.

It only fetches the boot (``launch/boot.py``) and hands over. ``supervisor`` and ``launch`` are imported from beside this
file, whatever the user's directory or ``PYTHONPATH`` holds under those names, and are then put aside: the script's own
``import supervisor`` finds what it would find without us. If that is our package, its modules that the boot has
already loaded are handed back as they are (one link to the supervisor per process, not two).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class _BesideUs:
    """Finds our two packages in ``root``, and nothing else."""

    def __init__(self, root: str) -> None:
        self.root = root

    def find_spec(
        self, fullname: str, _path: Sequence[str] | None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(fullname, [self.root]) if fullname in ("supervisor", "launch") else None


class _Handback:
    """Gives back the modules of ``supervisor`` that the boot has loaded, to whoever imports that very package."""

    def __init__(self, root: str, modules: dict[str, ModuleType]) -> None:
        self.package = os.path.realpath(os.path.join(root, "supervisor"))
        self.modules = modules
        self.specs = {name: module.__spec__ for name, module in modules.items()}

    def find_spec(
        self, fullname: str, _path: Sequence[str] | None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.modules:
            return None
        ours = getattr(sys.modules.get("supervisor"), "__path__", ())
        if self.package not in (os.path.realpath(entry) for entry in ours):
            return None
        original = self.specs[fullname]
        places = original.submodule_search_locations if original else None
        loader: Any = self
        spec = ModuleSpec(fullname, loader, origin=original.origin if original else None)
        spec.submodule_search_locations = places
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.specs[module.__name__]  # loaded long ago


def main() -> None:
    """Boot this worker and run the user's program in the real ``__main__``."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    finder = _BesideUs(root)
    sys.meta_path.insert(0, finder)
    try:
        from launch import boot
    finally:
        sys.meta_path.remove(finder)
    ours = [name for name in sys.modules if name.partition(".")[0] in ("supervisor", "launch")]
    modules = {name: sys.modules.pop(name) for name in ours}
    kept = {name: module for name, module in modules.items() if name.startswith("supervisor.")}
    sys.meta_path.insert(0, _Handback(root, kept))
    boot.run(sys.argv[1:])


if __name__ == "__main__":
    main()
