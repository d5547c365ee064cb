"""slot.json: a snapshot counts only while every file is as it was when all ranks were complete."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import pytest

from supervisor.checkpoint.manifest import ForeignError, Key
from supervisor.checkpoint.slots import VERSION, SlotRecord, invalidate, read_slot, write_slot
from supervisor.checkpoint.stamps import UNFINISHED, Stamp, read
from supervisor.errors import CheckpointError, StorageError
from tests.checkpoint.tools import write_source

RECORD = SlotRecord(
    step=40, attempt=3, world_size=2, created=1.5, run_id="r", metrics={"loss": 0.25, "gain": math.inf}
)


@pytest.fixture
def slot(tmp_path: Path) -> Path:
    directory = write_source(tmp_path / "slot")
    (directory / "slot.json").unlink()
    return directory


@pytest.mark.parametrize("key", [None, Key.derive("secret")], ids=["unkeyed", "keyed"])
def test_it_comes_back_as_it_was(slot: Path, key: Key | None) -> None:
    assert read_slot(slot, key) is None
    written = write_slot(slot, RECORD, key)
    assert read_slot(slot, key) == written
    assert written.files == {".metadata": 100, "__0_0.distcp": 3000, "__1_0.distcp": 3001}
    assert written.bytes == 6101
    invalidate(slot)
    invalidate(slot)
    assert read_slot(slot, key) is None


def test_no_directory_is_no_slot(tmp_path: Path) -> None:
    assert read_slot(tmp_path / "none") is None


def test_files_that_changed_are_noticed(slot: Path) -> None:
    write_slot(slot, RECORD)
    os.truncate(slot / "__0_0.distcp", 10)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: 10 bytes, 3000 expected"):
        read_slot(slot)
    (slot / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: missing"):
        read_slot(slot)


STAMPS = {name: Stamp(rank, number, 40, b"L" * 16) for name, rank, number in [
    ("__0_0.distcp", 0, 0), ("__0_1.distcp", 0, 1), ("__1_0.distcp", 1, 0), ("__1_2.distcp", 1, 2),
]}  # fmt: skip


def stamp(slot: Path, name: str, value: Stamp) -> None:
    (slot / name).write_bytes(bytes(200) + value.encode())


@pytest.fixture
def stamped(slot: Path) -> Path:
    for name, value in STAMPS.items():
        stamp(slot, name, value)
    return slot


def test_stamps_are_of_the_step_and_of_one_layout(stamped: Path) -> None:
    written = write_slot(stamped, RECORD)
    assert written.layout == (b"L" * 16).hex()
    assert read_slot(stamped) == written
    constant = read(stamped / "__0_1.distcp", 264)
    assert constant == Stamp(0, 1, 0), "the same at every step, in every layout"


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("__1_0.distcp", Stamp(1, 0, 39, b"L" * 16), "is of step 39, not 40"),
        ("__1_2.distcp", Stamp(1, 2, 41, b"L" * 16), "is of step 41, not 40"),
        ("__1_0.distcp", Stamp(1, 0, UNFINISHED, b"L" * 16), "was not written to its end"),
        ("__0_1.distcp", Stamp(0, 1, UNFINISHED), "was not written to its end"),
        ("__1_0.distcp", Stamp(0, 0, 40, b"L" * 16), "is file 0 of rank 0"),
        ("__1_2.distcp", Stamp(1, 0, 40, b"L" * 16), "is file 0 of rank 1"),
        ("__1_0.distcp", Stamp(1, 0, 40, b"K" * 16), "is of another layout than the other files"),
    ],
)
def test_files_that_are_torn_stale_or_mixed_up(stamped: Path, name: str, value: Stamp, problem: str) -> None:
    write_slot(stamped, RECORD)
    stamp(stamped, name, value)  # of the same size
    with pytest.raises(CheckpointError, match=f"{re.escape(name)}: {problem}"):
        read_slot(stamped)
    with pytest.raises(CheckpointError, match=f"{re.escape(name)}: {problem}"):
        write_slot(stamped, RECORD)


def test_stamps_that_are_gone_or_damaged(stamped: Path) -> None:
    write_slot(stamped, RECORD)
    whole = (stamped / "__1_0.distcp").read_bytes()
    for position in range(208, 264):  # behind the magic
        flipped = whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :]
        (stamped / "__1_0.distcp").write_bytes(flipped)
        with pytest.raises(CheckpointError, match=r"__1_0\.distcp: its last 64 bytes are damaged"):
            read_slot(stamped)
    (stamped / "__1_0.distcp").write_bytes(bytes(264))
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp: bears no stamp"):
        read_slot(stamped)
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp: bears no stamp"):
        write_slot(stamped, RECORD)


def test_every_flipped_bit_is_noticed(slot: Path) -> None:
    write_slot(slot, RECORD)
    data = (slot / "slot.json").read_bytes()
    for position in range(len(data)):
        (slot / "slot.json").write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(CheckpointError, match=r"slot\.json"):
            read_slot(slot)


def test_another_key_or_version_is_refused(slot: Path) -> None:
    write_slot(slot, RECORD)
    with pytest.raises(ForeignError, match=r"slot\.json was made without a key"):
        read_slot(slot, Key.derive("secret"))
    document = json.loads((slot / "slot.json").read_text())
    (slot / "slot.json").write_text(json.dumps({**document, "version": VERSION + 1}))
    with pytest.raises(
        ForeignError, match=rf"slot\.json is of version {VERSION + 1}.*up to version {VERSION}"
    ):
        read_slot(slot)


def test_without_metadata_it_is_no_snapshot(slot: Path) -> None:
    (slot / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"no \.metadata"):
        write_slot(slot, RECORD)


def test_a_slot_that_cannot_be_written_says_so(slot: Path) -> None:
    (slot / "slot.json").mkdir()
    with pytest.raises(StorageError, match=r"writing .*slot\.json.* failed"):
        write_slot(slot, RECORD)
    with pytest.raises(StorageError, match=r"invalidating .*slot\.json failed"):
        invalidate(slot)
