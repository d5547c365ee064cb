"""Files that did not change are stored once, whatever happens to one of the checkpoints that have them."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest

from supervisor.checkpoint import commit
from supervisor.checkpoint.catalog import list_checkpoints, newest_good, remove, step_directory, verify
from supervisor.checkpoint.commit import drain
from supervisor.checkpoint.manifest import Key, read_manifest
from supervisor.checkpoint.sharing import SMALLEST, Sharing, on_disk
from supervisor.edge.files import LOCAL, WatchedFiles, link
from supervisor.errors import CancelledError, StorageError
from tests.checkpoint.tools import at_once, flip_bit, origin, write_source

KEY = Key.derive("secret")
FROZEN, MOVING = "__0_0.distcp", "__1_0.distcp"
SIZE = SMALLEST + 12_345


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "slot", seed=1, size=SIZE)


def step(source: Path, number: int, key: Key | None = None, **options: object) -> Path:
    """The checkpoint of a step at which ``MOVING`` has changed everywhere, and ``FROZEN`` has not."""
    write_source(source.with_name("next"), seed=number, size=SIZE)
    shutil.copy(source.with_name("next") / MOVING, source / MOVING)
    target = step_directory(source.with_name("checkpoints"), number)
    drain(source, target, origin(number), key=key, **options)  # type: ignore[arg-type]
    return target


def inode(path: Path) -> int:
    return path.stat().st_ino


def shared(*targets: Path, name: str = FROZEN) -> bool:
    return len({inode(target / name) for target in targets}) == 1


def good(checkpoints: Path, key: Key | None = None) -> list[int]:
    return [record.step for record in list_checkpoints(checkpoints, key) if not verify(record, key)]


@pytest.mark.parametrize("key", [None, KEY], ids=["unkeyed", "keyed"])
def test_what_did_not_change_is_stored_once(source: Path, key: Key | None) -> None:
    targets = [step(source, number, key) for number in (1, 2, 3)]
    assert shared(*targets)
    assert (targets[0] / FROZEN).stat().st_nlink == 3
    assert not shared(targets[0], targets[1], name=MOVING)
    assert not shared(targets[0], targets[1], name=".metadata")  # equal, but small
    assert good(targets[0].parent, key) == [3, 2, 1]
    assert (targets[2] / MOVING).read_bytes() == (source / MOVING).read_bytes()
    taken = on_disk((target, read_manifest(target, key).files) for target in targets)
    whole, part = (
        sum(-(-size // 4096) * 4096 for size in sizes) for sizes in ((SIZE, SIZE + 1, 100), (SIZE + 1, 100))
    )
    assert [taken[target] for target in targets] == [whole, part, part]


def test_each_lives_on_without_the_others_and_as_a_copy(source: Path, tmp_path: Path) -> None:
    targets = [step(source, number) for number in (1, 2, 3)]
    shutil.copytree(targets[1], step_directory(tmp_path / "copies", 2))
    for record in list_checkpoints(targets[0].parent):
        if record.step != 2:
            remove(record)
    assert good(targets[0].parent) == [2]
    assert (targets[1] / FROZEN).stat().st_nlink == 1
    assert good(tmp_path / "copies") == [2]


def test_a_file_of_another_name_is_found(source: Path) -> None:
    old = step(source, 1)
    (source / FROZEN).rename(source / "__7_0.distcp")
    assert inode(step(source, 2) / "__7_0.distcp") == inode(old / FROZEN)


def test_damage_of_one_is_that_of_all_and_said(source: Path) -> None:
    targets = [step(source, number) for number in (1, 2)]
    (source / FROZEN).write_bytes(bytes(SIZE))  # the weights were unfrozen for a moment
    step(source, 3)
    shutil.copy(targets[0] / FROZEN, source / FROZEN)
    flip_bit(targets[0] / FROZEN, SIZE // 2)
    flip_bit(step_directory(targets[0].parent, 3) / MOVING, 1)
    found, rejected = newest_good(targets[0].parent)
    assert found is None
    assert [record.problem for record in rejected] == [
        f"{MOVING}: digest does not match",
        *[f"{FROZEN}: digest does not match (shared by 2 checkpoints)"] * 2,
    ]


def test_a_damaged_file_is_not_linked_but_stored_anew(source: Path) -> None:
    old = step(source, 1)
    flip_bit(old / FROZEN, SIZE - 5000)
    assert not shared(old, step(source, 2))
    assert good(old.parent) == [2]


def test_equal_to_a_damaged_file_is_not_enough(source: Path) -> None:
    """Source and older file agree, their manifest does not: the copy gets a digest that holds."""
    old = step(source, 1)
    for file in (old, source):
        flip_bit(file / FROZEN, SIZE - 5000)
    assert not shared(old, step(source, 2))
    assert good(old.parent) == [2]


def test_a_change_between_the_samples_is_found(source: Path) -> None:
    old = step(source, 1)
    for position in (5000, SIZE - 5000):
        flip_bit(source / FROZEN, position)
        new = step(source, 2)
        assert (new / FROZEN).read_bytes() == (source / FROZEN).read_bytes() != (old / FROZEN).read_bytes()
        assert good(old.parent) == [2, 1]
        shutil.rmtree(new)


@pytest.mark.parametrize("theirs", [None, Key.derive("other")], ids=["none", "another"])
def test_what_another_key_vouches_for_is_not_linked(source: Path, theirs: Key | None) -> None:
    old = step(source, 1, theirs)
    assert not shared(old, step(source, 2, KEY))
    assert good(old.parent, KEY) == [2]


def without_manifest(old: Path) -> None:
    (old / "everstep.json").unlink()


def link_elsewhere(old: Path) -> None:
    (old / FROZEN).rename(old.parent / "elsewhere")
    (old / FROZEN).symlink_to(old.parent / "elsewhere")


def gone(old: Path) -> None:
    (old / FROZEN).unlink()


@pytest.mark.parametrize("harm", [without_manifest, link_elsewhere, gone])
def test_what_is_no_file_of_a_checkpoint_is_not_linked(source: Path, harm: Callable[[Path], None]) -> None:
    harm(step(source, 1))
    new = step(source, 2)
    assert (new / FROZEN).stat().st_nlink == 1
    assert not (new / FROZEN).is_symlink()
    assert good(new.parent) == [2]


def test_where_links_cannot_be_made_it_is_copied(source: Path) -> None:
    old = step(source, 1)
    manifest = read_manifest(old, None)
    sharing = Sharing(source, {FROZEN: SIZE}, old, manifest, None, LOCAL, link=lambda old, new: False)
    assert sharing.likely == {FROZEN: FROZEN}
    assert sharing.adopt(FROZEN, old / "new", lambda: None) is None
    assert not (old / "new").exists()
    assert not link(old / "none", old / "new")
    assert not link(old / FROZEN, Path("/dev/shm/everstep-test-no-link"))  # another file system


def test_reading_errors_of_the_older_one_do_not_matter(source: Path) -> None:
    old = step(source, 1)

    def before(operation: str, path: Path) -> None:
        if operation == "read" and path == old / FROZEN:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    assert not shared(old, step(source, 2, files=WatchedFiles(LOCAL, before), retries=at_once(budget=0)))


def test_passing_errors_of_the_source_are_retried(source: Path) -> None:
    old = step(source, 1)
    left = [2]

    def before(operation: str, path: Path) -> None:
        if operation == "read" and path == source / FROZEN and left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    assert shared(old, step(source, 2, files=WatchedFiles(LOCAL, before), retries=at_once()))


def test_a_comparison_can_be_cancelled(source: Path) -> None:
    old = step(source, 1)
    reading = Event()

    def before(operation: str, path: Path) -> None:
        if operation == "read" and path == old / FROZEN:
            reading.set()

    with pytest.raises(CancelledError):
        step(source, 2, files=WatchedFiles(LOCAL, before), cancelled=reading.is_set, threads=1)
    assert good(old.parent) == [1]


def test_room_is_asked_for_what_is_new_only(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = step(source, 1)
    monkeypatch.setattr(commit, "free_bytes", lambda path: SIZE + 5000)
    assert shared(old, step(source, 2))
    monkeypatch.setattr(commit, "free_bytes", lambda path: SIZE - 5000)
    with pytest.raises(StorageError, match=f"needs {SIZE + 1 + 100} bytes"):
        step(source, 3)
    assert good(old.parent) == [2, 1]
