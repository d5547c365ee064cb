"""The life of a checkpoint's directory: unfinished, committed, and gone.

Two names tell them apart. ``everstep.json.partial`` is created before anything else and becomes ``everstep.json`` by
one rename, the commit; a removal starts with the rename back. So at any moment, whatever a crash left behind,

- ``everstep.json`` is there: it was whole when it was committed (and ``verify`` says whether it still is);
- only ``everstep.json.partial`` is there, or nothing: a leftover, of no use, removed by ``catalog.sweep``;
- other files without either: not ours. It may be a stock DCP checkpoint that somebody put there: never touched.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from supervisor.checkpoint.manifest import MANIFEST_NAME, PARTIAL_NAME, check_name
from supervisor.edge.files import LOCAL, Files
from supervisor.errors import CheckpointError, StorageError

SLOT_NAME: Final = "slot.json"
#: names in a directory that are not a checkpoint's payload
_OURS: Final = frozenset({MANIFEST_NAME, PARTIAL_NAME, SLOT_NAME, f"{SLOT_NAME}.partial"})
_NO_DIRECTORY_SYNC: Final = frozenset({errno.EINVAL, errno.EOPNOTSUPP})  # some FUSE file systems


def begin(directory: Path, *, files: Files = LOCAL) -> None:
    """Make ``directory`` if it is missing and mark it unfinished, durably, before files are written into it."""
    directory.mkdir(parents=True, exist_ok=True)
    os.close(files.open(directory / PARTIAL_NAME, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW))
    sync_directory(directory, files=files)
    sync_directory(directory.parent, files=files)


def is_leftover(directory: Path) -> bool:
    """Whether it is an unfinished directory of ours (or an empty one)."""
    try:
        names = os.listdir(directory)
    except OSError:
        return False
    return MANIFEST_NAME not in names and (PARTIAL_NAME in names or not names)


def discard(directory: Path, *, files: Files = LOCAL) -> None:
    """Remove a checkpoint or a leftover, its manifest first and its mark last. Raises OSError."""
    if os.path.lexists(directory / MANIFEST_NAME):
        files.rename(directory / MANIFEST_NAME, directory / PARTIAL_NAME)
        sync_directory(directory, files=files)
    elif os.listdir(directory) and not os.path.lexists(directory / PARTIAL_NAME):
        begin(directory, files=files)
    for path in _bottom_up(directory):
        if path != directory / PARTIAL_NAME:
            files.remove(path)
    if os.path.lexists(directory / PARTIAL_NAME):
        files.remove(directory / PARTIAL_NAME)
    files.remove(directory)
    sync_directory(directory.parent, files=files)


def payload(directory: Path) -> dict[str, int]:
    """Size by relative name of every file that a checkpoint made of ``directory`` has.

    Raises CheckpointError for a file that could not be copied as it is (a symbolic link, a device, an odd name).
    """
    sizes = {}
    for path in _bottom_up(directory):
        name = path.relative_to(directory).as_posix()
        status = path.lstat()
        if name in _OURS or stat.S_ISDIR(status.st_mode):
            continue
        check_name(name)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is not a regular file: a checkpoint consists of nothing else")
        sizes[name] = status.st_size
    return sizes


def entry_status(directory: Path, name: str) -> os.stat_result:
    """The status of a payload file. Raises CheckpointError (text: the problem) unless it is a regular file inside.

    Symbolic links on the way are refused: a checkpoint is self-contained, and its names lead nowhere else.
    """
    path = directory
    for part in name.split("/"):
        path = path / part
        try:
            status = path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointError(f"{name}: missing") from None
        except OSError as error:
            raise CheckpointError(f"{name}: cannot be read: {error.strerror or error}") from error
        if stat.S_ISLNK(status.st_mode):
            raise CheckpointError(f"{name}: is a symbolic link or lies behind one")
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{name}: is not a regular file")
    return status


def sync_directory(directory: Path, *, files: Files = LOCAL) -> None:
    """Make the directory's entries durable."""
    fd = files.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        files.sync(fd)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:
            raise
    finally:
        os.close(fd)


def translated(error: OSError, doing: str, where: Path) -> StorageError:
    """The error to raise for a file operation that failed."""
    return StorageError(f"{doing} {error.filename or where} failed: {error.strerror or error}")


def _bottom_up(directory: Path) -> Iterator[Path]:
    """Everything below, contents before their directories; symbolic links are not followed."""

    def refuse(error: OSError) -> None:
        raise error

    for parent, directories, names in os.walk(directory, topdown=False, onerror=refuse):
        for name in sorted(names) + sorted(directories):
            yield Path(parent, name)
