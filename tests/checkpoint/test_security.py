"""Every way in which a supervisor takes a state from outside, against whoever lacks the key: nothing is accepted.

The ways: a checkpoint to resume from, a snapshot in RAM to resume from, a checkpoint that seems to be there already when one
is drained, one that a drain could share files with. (What runs torch, ``tests/training/test_security.py``.)
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from supervisor.checkpoint.catalog import list_checkpoints, step_directory, verify
from supervisor.checkpoint.commit import drain, seal
from supervisor.checkpoint.manifest import Key, read_manifest
from supervisor.checkpoint.sharing import SMALLEST
from supervisor.checkpoint.slots import SlotRecord, read_slot, write_slot
from supervisor.checkpoint.storage import LocalStorage
from supervisor.errors import CheckpointError
from supervisor.model import Tier
from supervisor.resume import Resume, Sources
from supervisor.resume import choose as choose_from
from supervisor.staging import Staging
from tests.checkpoint.tools import flip_bit, origin, write_source

OURS, THEIRS = Key.derive("ours"), Key.derive("theirs")
OLD, NEW = 100, 200
SIZE = SMALLEST + 10  # large enough to be shared


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """Two good ones, made with our key."""
    for step in (OLD, NEW):
        source = write_source(tmp_path / f"source-{step}", seed=step, size=SIZE)
        drain(source, step_directory(tmp_path / "checkpoints", step), origin(step), key=OURS)
    return tmp_path / "checkpoints"


def choose(snapshot: tuple[Path, SlotRecord] | None, checkpoints: Path, key: Key | None) -> Resume:
    """As the supervisor asks before each attempt."""
    staging = Staging(checkpoints.with_name("runtime"), checkpoints.parent)
    return choose_from(Sources(snapshot, [LocalStorage(checkpoints, key)], key, staging))


def another_payload(directory: Path) -> None:
    write_source(directory, seed=666, size=SIZE)
    (directory / "slot.json").unlink()


def unkeyed(directory: Path) -> None:
    another_payload(directory)
    seal(directory, origin(NEW))


def of_another_key(directory: Path) -> None:
    another_payload(directory)
    seal(directory, origin(NEW), key=THEIRS)


def claiming_our_key(directory: Path) -> None:
    """Unkeyed digests under our key's id, which is no secret."""
    unkeyed(directory)
    text = (directory / "everstep.json").read_text()
    (directory / "everstep.json").write_text(text.replace('"key":null', f'"key":"{OURS.id}"'))


def stripped(directory: Path) -> None:
    (directory / "everstep.json").unlink()


def of_another_step(directory: Path) -> None:
    """An older state of ours, played back as a newer one."""
    shutil.rmtree(directory)
    shutil.copytree(directory.with_name(f"step-{OLD:09d}"), directory)


def mixed(directory: Path) -> None:
    shutil.copy(directory.with_name(f"step-{OLD:09d}") / "__0_0.distcp", directory / "__0_0.distcp")


def swapped(directory: Path) -> None:
    first, second = directory / "__0_0.distcp", directory / "__1_0.distcp"
    first.rename(directory / "x")
    second.rename(first)
    (directory / "x").rename(second)


ATTACKS: dict[str, Callable[[Path], object]] = {
    "no key": unkeyed,
    "another key": of_another_key,
    "our key's id": claiming_our_key,
    "no manifest": stripped,
    "another step": of_another_step,
    "two steps mixed": mixed,
    "swapped files": swapped,
    "a bit of the payload": lambda directory: flip_bit(directory / "__0_0.distcp", SIZE // 2),
    "a bit of a header": lambda directory: flip_bit(directory / "__1_0.distcp", 3),
    "a bit of the index": lambda directory: flip_bit(directory / ".metadata", 40),
    "a bit of the manifest": lambda directory: flip_bit(directory / "everstep.json", 60),
    "a missing file": lambda directory: (directory / "__0_0.distcp").unlink(),
    "a truncated file": lambda directory: os.truncate(directory / "__0_0.distcp", SIZE - 1),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_attempt_resumes_from_it(checkpoints: Path, attack: str) -> None:
    ATTACKS[attack](step_directory(checkpoints, NEW))
    found = choose(None, checkpoints, OURS)
    assert (found.step, found.path) == (OLD, step_directory(checkpoints, OLD))
    assert [path for path, _ in found.rejected] == [step_directory(checkpoints, NEW)]
    shutil.rmtree(step_directory(checkpoints, OLD))
    with pytest.raises(CheckpointError, match="none that is whole"):  # and the job is not begun anew
        choose(None, checkpoints, OURS)


@pytest.mark.parametrize("attack", ATTACKS)
def test_it_does_not_stand_in_for_a_drain(checkpoints: Path, tmp_path: Path, attack: str) -> None:
    ATTACKS[attack](step_directory(checkpoints, NEW))
    source = tmp_path / f"source-{NEW}"
    manifest = drain(source, step_directory(checkpoints, NEW), origin(NEW, attempt=9), key=OURS)
    assert manifest.origin.attempt == 9
    record = list_checkpoints(checkpoints, OURS)[0]
    assert (record.step, verify(record, OURS)) == (NEW, [])
    assert (record.path / "__0_0.distcp").read_bytes() == (source / "__0_0.distcp").read_bytes()


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_of_it_is_shared(checkpoints: Path, tmp_path: Path, attack: str) -> None:
    """The same files are drained again, so whatever is still as it was may be linked, and nothing else."""
    ATTACKS[attack](step_directory(checkpoints, NEW))
    target = step_directory(checkpoints, NEW + 1)
    drain(tmp_path / f"source-{NEW}", target, origin(NEW + 1), key=OURS)
    record = list_checkpoints(checkpoints, OURS)[0]
    assert (record.step, verify(record, OURS)) == (NEW + 1, [])
    assert all(
        (target / name).read_bytes() == (tmp_path / f"source-{NEW}" / name).read_bytes()
        for name in read_manifest(target, OURS).files
    )


@pytest.mark.parametrize("reader", [None, THEIRS], ids=["no key", "another key"])
def test_without_our_key_nothing_of_ours_is_taken(checkpoints: Path, reader: Key | None) -> None:
    with pytest.raises(CheckpointError, match="none that is whole .*(set EVERSTEP_KEY|another key)"):
        choose(None, checkpoints, reader)


# --------------------------------------------------------------------------- RAM

SLOT = SlotRecord(step=NEW + 50, attempt=7, world_size=2, created=1.0, run_id="run-1")


def slot_unkeyed(slot: Path) -> None:
    write_slot(slot, SLOT)


def slot_of_another_key(slot: Path) -> None:
    write_slot(slot, SLOT, THEIRS)


def slot_of_another_step(slot: Path) -> None:
    text = (slot / "slot.json").read_text()
    (slot / "slot.json").write_text(text.replace(str(SLOT.step), str(SLOT.step + 1)))


SLOT_ATTACKS: dict[str, Callable[[Path], object]] = {
    "no key": slot_unkeyed,
    "another key": slot_of_another_key,
    "another step": slot_of_another_step,
    "a bit of the record": lambda slot: flip_bit(slot / "slot.json", 60),
    "a missing file": lambda slot: (slot / "__0_0.distcp").unlink(),
    "a truncated file": lambda slot: os.truncate(slot / "__0_0.distcp", 7),
    "a symbolic link": lambda slot: (
        (slot / "__0_0.distcp").rename(slot.with_name("x")),
        (slot / "__0_0.distcp").symlink_to(slot.with_name("x")),
    ),
}


@pytest.fixture
def slot(tmp_path: Path) -> Path:
    directory = write_source(tmp_path / "slot", seed=3)
    write_slot(directory, SLOT, OURS)
    return directory


def test_our_own_snapshot_is_taken(checkpoints: Path, slot: Path) -> None:
    assert choose((slot, SLOT), checkpoints, OURS).tier is Tier.RAM


@pytest.mark.parametrize("attack", SLOT_ATTACKS)
def test_no_attempt_resumes_from_a_forged_snapshot(checkpoints: Path, slot: Path, attack: str) -> None:
    SLOT_ATTACKS[attack](slot)
    found = choose((slot, SLOT), checkpoints, OURS)
    assert (found.step, found.tier) == (NEW, Tier.CHECKPOINT)
    assert [path for path, _ in found.rejected] == [slot]
    with pytest.raises(CheckpointError):
        read_slot(slot, OURS)


@pytest.mark.parametrize("reader", [None, THEIRS], ids=["no key", "another key"])
def test_without_our_key_no_snapshot_of_ours_is_taken(slot: Path, tmp_path: Path, reader: Key | None) -> None:
    found = choose((slot, SLOT), tmp_path / "none", reader)
    assert (found.step, found.tier) == (0, None)
    assert [path for path, _ in found.rejected] == [slot]
