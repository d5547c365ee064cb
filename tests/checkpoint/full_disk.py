"""Drains to a tmpfs of 4 MB that is full. Run by ``test_full_disk.py`` in a mount namespace of its own.

``full_disk.py DIRECTORY``: mounts over ``DIRECTORY/disk``, so that nobody else sees it and it goes with the process.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from pathlib import Path

from supervisor.checkpoint.catalog import list_checkpoints, step_directory, verify
from supervisor.checkpoint.commit import drain
from supervisor.checkpoint.copying import Retries
from supervisor.edge.files import LOCAL, WatchedFiles
from supervisor.errors import StorageError
from tests.checkpoint.tools import origin, write_source

MIB = 1 << 20


def refuse(seconds: float) -> None:
    """A full disk is not waited for."""
    raise AssertionError(f"slept for {seconds} s")


def expect_refusal(source: Path, checkpoints: Path, files: WatchedFiles | None = None) -> str:
    """Drain step 200 and return the error; whatever happens, step 100 is the only thing there."""
    try:
        drain(
            source,
            step_directory(checkpoints, 200),
            origin(200),
            files=files or LOCAL,
            retries=Retries(sleep=refuse),
        )
    except StorageError as error:
        records = list_checkpoints(checkpoints)
        assert [record.step for record in records] == [100], records
        assert verify(records[0]) == []
        assert [path.name for path in checkpoints.iterdir()] == ["step-000000100"]
        print(error)
        return str(error)
    raise AssertionError("the drain did not fail")


def main(root: Path) -> None:
    disk = root / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,nr_inodes=40", "tmpfs", disk], check=True)
    checkpoints = disk / "checkpoints"
    drain(write_source(root / "old", size=10_000), step_directory(checkpoints, 100), origin(100))

    # larger than the disk: refused before anything is written
    error = expect_refusal(write_source(root / "large", size=3 * MIB), checkpoints)
    needed, free = map(int, re.findall(r"needs (\d+) bytes, (\d+) are free", error)[0])
    assert "No space left on device: checkpoint " + str(checkpoints / "step-000000200") in error
    assert needed == 6 * MIB + 1 + 100
    assert 3 * MIB < free < 4 * MIB
    assert "quota" not in error

    # filled by somebody else while the drain writes
    def fill(operation: str, path: Path) -> None:
        if operation == "write" and not others.exists():
            with contextlib.suppress(OSError), others.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

    others = disk / "others"
    error = expect_refusal(write_source(root / "fits", size=MIB), checkpoints, WatchedFiles(LOCAL, fill))
    needed, free = map(int, re.findall(r"needs (\d+) bytes, (\d+) are free", error)[0])
    assert needed == 2 * MIB + 1 + 100
    assert free < needed
    others.unlink()

    # bytes enough, but no inodes
    error = expect_refusal(write_source(root / "many", size=10, ranks=60), checkpoints)
    assert "a quota or the inodes" in error

    drain(root / "fits", step_directory(checkpoints, 200), origin(200))
    assert [record.step for record in list_checkpoints(checkpoints) if not verify(record)] == [200, 100]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
