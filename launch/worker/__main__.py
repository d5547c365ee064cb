"""Fetches the boot (``launch/boot.py``) and hands over, in front of the user's script.

``supervisor`` and ``launch`` are imported from beside this directory, whatever the user's directory or ``PYTHONPATH``
holds under those names, and are then put aside (``launch/handback.py``): the script's own ``import supervisor`` finds
what it would find without us.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

if sys.version_info < (3, 11):  # noqa: UP036 (it is the user's interpreter, whichever that is)
    print(f"everstep: Python 3.11 or newer is required, {sys.executable} is {sys.version_info[0]}.{sys.version_info[1]}",
          file=sys.stderr)  # fmt: skip
    sys.exit(2)  # as for wrong arguments: trying again is of no use


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
    root = str(Path(__file__).absolute().parents[2])
    del sys.path[0]  # this directory; the script's own takes its place
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
