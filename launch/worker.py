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


class _BesideUs:
    """Finds our two packages in ``root``, and nothing else."""

    def __init__(self, root: str) -> None:
        self.root = root

    def find_spec(
        self, fullname: str, _path: Sequence[str] | None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(fullname, [self.root]) if fullname in ("supervisor", "launch") else None


def main() -> None:
    """Boot this worker and run the user's program in the real ``__main__``."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    finder = _BesideUs(root)
    sys.meta_path.insert(0, finder)
    try:
        from launch import boot
        from launch.handback import Handback
    finally:
        sys.meta_path.remove(finder)
    ours = [name for name in sys.modules if name.partition(".")[0] in ("supervisor", "launch")]
    modules = {name: sys.modules.pop(name) for name in ours}
    kept = {name: module for name, module in modules.items() if name.startswith("supervisor.")}
    sys.meta_path.insert(0, Handback(root, kept))
    boot.run(sys.argv[1:])


if __name__ == "__main__":
    main()
