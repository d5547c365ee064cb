"""A job in a tmpfs that becomes full at every page. Run by ``test_full.py`` in a mount namespace of its own.

``full.py DIRECTORY``: mounts over /dev/shm, where nobody else sees it, and it goes with the process; ``DIRECTORY`` is where
slots go that have no room there. Prints how often it was too small for a run, for a snapshot or a checkpoint, and for nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from supervisor.errors import StorageError
from tests.faults import node

PAGE = os.sysconf("SC_PAGE_SIZE")
AMPLE = "64m"
MEMORY = Path("/dev/shm")


def mount(size: str, *options: str) -> None:
    """Give it another size: what is in it stays."""
    text = ",".join([*options, f"size={size}"])
    subprocess.run(["mount", "-t", "tmpfs", "-o", text, "tmpfs", MEMORY], check=True)


def main(elsewhere: Path) -> None:
    torch.set_num_threads(1)
    tempfile.tempdir = str(elsewhere)
    mount(AMPLE)
    expected = node.reference()
    refused = failed = fine = 0
    for pages in range(8, 200):
        root = MEMORY / "job"
        root.mkdir()
        told = [0]
        failures: list[str] = []
        mount(str(pages * PAGE), "remount")
        try:
            supervisor = node.Supervisor(root, 0, lambda step, told=told: told.__setitem__(0, step))
            failures = supervisor.failures
            assert node.work(supervisor, supervisor.runtime).digest() == expected[node.STEPS]
        except (OSError, StorageError):  # there is not even room for the job's own small files
            refused += 1
        else:
            assert all("No space left on device" in failure for failure in failures), failures
            failed, fine = failed + bool(failures), fine + (not failures)
        mount(AMPLE, "remount")
        node.check(root, expected, told[0])
        shutil.rmtree(root)
        if fine == 3:
            break
    print(refused, failed, fine)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
