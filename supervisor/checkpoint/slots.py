"""RAM snapshots: a slot is a directory in tmpfs with stock DCP files and, once every rank is complete, ``slot.json``.

``slot.json`` is to a slot what the manifest is to a checkpoint, without the digests: RAM does not rot, and hashing
would cost more than the snapshot. Each file is stamped instead (``stamps``). ``slot.json`` is removed before a slot is written again.

A rank's files are called ``__<rank>_<n>.distcp``, as stock DCP calls them. On several nodes, the file of number ``COPIES`` holds
what ranks of other nodes store, so that the node can resume from its own slot (``training/copies.py``). Such files are no part of a
checkpoint, nor is the ``.metadata`` of any node but the first: it knows of that node's files alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Final

from supervisor.checkpoint import stamps
from supervisor.checkpoint.directory import SLOT_NAME, entry_status, payload, translated
from supervisor.checkpoint.manifest import (
    METADATA_NAME,
    Key,
    authenticate,
    check_name,
    decode_metrics,
    encode_metrics,
    sign,
)
from supervisor.errors import CheckpointError

VERSION: Final = 2
_FORMAT: Final = "everstep-slot"
COPIES: Final = 2
_OF_RANK: Final = re.compile(r"__([0-9]+)_([0-9]+)\.distcp")


@dataclass(frozen=True, kw_only=True)
class SlotRecord:
    """A complete snapshot: the state after ``step`` steps. ``created`` is Unix seconds, ``files`` size by name."""

    step: int
    attempt: int
    world_size: int
    created: float
    run_id: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, int] = field(default_factory=dict)
    nodes: int = 1  # … on several nodes each has its own part
    node_rank: int = 0
    layout: str = ""  # that all files are stamped with, in hexadecimal; empty: they are not stamped

    @property
    def bytes(self) -> int:
        """The size of all files together."""
        return sum(self.files.values())


_FIELDS: Final = tuple(entry.name for entry in fields(SlotRecord))


def numbers_of_file(name: str) -> tuple[int, int] | None:
    """The rank whose file this is, and which of its files; None: no rank's."""
    match = _OF_RANK.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


def rank_of_file(name: str) -> int | None:
    """The rank whose file this is; None: no rank's."""
    numbers = numbers_of_file(name)
    return None if numbers is None else numbers[0]


def is_copy_file(name: str) -> bool:
    """Whether this file of a slot holds copies, and is left out of a checkpoint."""
    numbers = numbers_of_file(name)
    return numbers is not None and numbers[1] == COPIES


def check_stamps(directory: Path, record: SlotRecord) -> str:
    """The layout, in hexadecimal, that all files of the slot are stamped with, and with the step of ``record``; empty: none is.

    Raises CheckpointError if some are stamped otherwise, or with another layout than ``record`` says.
    """
    found = []
    for name, size in sorted(record.files.items()):
        if (numbers := numbers_of_file(name)) is not None:
            try:
                found.append((name, numbers, stamps.read(directory / name, size)))
            except OSError as error:
                raise CheckpointError(f"{name}: cannot be read: {error.strerror or error}") from error
    layouts = [stamp.layout for _, _, stamp in found if stamp is not None]
    if not record.layout and not layouts:
        return ""
    layout = bytes.fromhex(record.layout) or max(layouts)  # that of a constant file is 0
    for name, numbers, stamp in found:
        if stamp is None:
            raise CheckpointError(f"{name}: bears no stamp")
        stamps.check(name, stamp, stamps.Stamp(*numbers, record.step, layout))
    return layout.hex()


def write_slot(directory: Path, record: SlotRecord, key: Key | None = None) -> SlotRecord:
    """Declare the snapshot in ``directory`` complete; the record as written, with the sizes of its files.

    Raises StorageError when it cannot be written, CheckpointError when the files are no DCP checkpoint, or not of that step.
    """
    record = replace(record, files=payload(directory))
    if METADATA_NAME not in record.files:
        raise CheckpointError(f"{directory} has no {METADATA_NAME}: not a DCP checkpoint")
    record = replace(record, layout=check_stamps(directory, record))
    document = {
        **asdict(record),
        "format": _FORMAT,
        "version": VERSION,
        "key": key.id if key else None,
        "metrics": encode_metrics(record.metrics),
    }
    partial = directory / f"{SLOT_NAME}.partial"
    try:
        partial.write_bytes(sign(document, key))
        partial.rename(directory / SLOT_NAME)
    except OSError as error:
        raise translated(error, "writing", directory / SLOT_NAME) from error
    return record


def read_slot(directory: Path, key: Key | None = None) -> SlotRecord | None:
    """The complete snapshot in ``directory``; None when there is none.

    Raises CheckpointError when ``slot.json`` is damaged or its files are not as it says.
    """
    try:
        data = (directory / SLOT_NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(f"{SLOT_NAME} cannot be read: {error.strerror or error}") from error
    record = parse_slot(data, key)
    for name, size in record.files.items():
        if (found := entry_status(directory, name).st_size) != size:
            raise CheckpointError(f"{name}: {found} bytes, {size} expected")
    check_stamps(directory, record)
    return record


def parse_slot(data: bytes, key: Key | None = None) -> SlotRecord:
    """What a ``slot.json`` says. Raises CheckpointError when it is damaged."""
    document = authenticate(data, key, kind=_FORMAT, newest=VERSION, name=SLOT_NAME)
    try:
        record = SlotRecord(
            **{
                **{name: document[name] for name in _FIELDS},
                "metrics": decode_metrics(document["metrics"]),
            }
        )
        sizes = {name: int(size) for name, size in record.files.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{SLOT_NAME} is damaged: {error!r}") from None
    for name in sizes:
        check_name(name)
    return replace(record, files=sizes)


def invalidate(directory: Path) -> None:
    """Before the slot is written again: it is no snapshot any more. Raises StorageError."""
    try:
        (directory / SLOT_NAME).unlink(missing_ok=True)
    except OSError as error:
        raise translated(error, "invalidating", directory / SLOT_NAME) from error
