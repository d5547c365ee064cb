"""Our own modules, given back to a script that imports them: a link to the supervisor is one per process.

In a module of its own, since what ``worker.py`` defines is gone once the user's script is ``__main__``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class Handback:
    """Gives back the modules of ``supervisor`` that the boot has loaded, to whoever imports that very package."""

    def __init__(self, root: str, modules: dict[str, ModuleType]) -> None:
        self.package = os.path.realpath(os.path.join(root, "supervisor"))
        self.modules = modules
        self.specs = {name: module.__spec__ for name, module in modules.items()}

    def find_spec(
        self, fullname: str, _path: Sequence[str] | None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec that yields the module as it is, for a name of ours under our own package."""
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
        """The module, as it is."""
        return self.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        """Nothing but its own spec back."""
        module.__spec__ = self.specs[module.__name__]  # loaded long ago
