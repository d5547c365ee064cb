"""Snapshots into a tmpfs that has room for one and a half. Run by ``test_engine_room.py`` in a mount namespace of its own.

``full_memory.py DIRECTORY``: mounts over ``DIRECTORY/memory``, so that nobody else sees it and it goes with the process.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from supervisor.errors import StorageError
from tests.training.test_engine import Engine


def main(root: Path) -> None:
    slots = root / "memory"
    slots.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", slots], check=True)
    engine = Engine()
    values = {"a": torch.randn(1 << 20)}
    engine.write(slots / "0", values)
    kept = (slots / "0" / "__0_0.distcp").read_bytes()
    for _ in range(2):
        with pytest.raises(StorageError, match="No space left on device"):
            engine.write(slots / "1", values)
        assert (slots / "0" / "__0_0.distcp").read_bytes() == kept
        assert not (slots / "1" / "__0_0.distcp").exists(), "what was allocated of it is given back"
    disk = root / "disk"
    disk.mkdir()
    (slots / "1").rmdir()
    (slots / "1").symlink_to(disk)  # as the supervisor does
    values["a"] += 1
    engine.write(slots / "1", values)
    assert torch.equal(_load_state_dict_from_keys(checkpoint_id=slots / "1")["a"], values["a"])
    engine.write(slots / "0", values)
    assert torch.equal(_load_state_dict_from_keys(checkpoint_id=slots / "0")["a"], values["a"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
