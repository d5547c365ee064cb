"""slot.json: a snapshot counts only while every file is as it was when all ranks were complete."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from supervisor.checkpoint.manifest import ForeignError, Key
from supervisor.checkpoint.slots import SlotRecord, invalidate, read_slot, write_slot
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
    (slot / "slot.json").write_text(json.dumps({**document, "version": 3}))
    with pytest.raises(ForeignError, match=r"slot\.json is of version 3.*up to version 2"):
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
