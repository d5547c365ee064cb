"""What there is, which of it is good, and how it is removed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from supervisor.checkpoint.catalog import (
    CheckpointRecord,
    list_checkpoints,
    newest_good,
    remove,
    step_directory,
    sweep,
    verify,
)
from supervisor.checkpoint.commit import drain, seal
from supervisor.checkpoint.directory import begin
from supervisor.checkpoint.manifest import Key
from supervisor.errors import StorageError
from tests.checkpoint.tools import flip_bit, origin, write_source

KEY = Key.derive("secret")


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """Steps 100, 200 and 300, all good."""
    for step in (100, 200, 300):
        source = write_source(tmp_path / f"source-{step}", seed=step)
        drain(
            source, step_directory(tmp_path / "checkpoints", step), origin(step, metrics={"loss": 1 / step})
        )
    return tmp_path / "checkpoints"


def test_the_list_is_newest_first_with_what_the_manifest_says(checkpoints: Path) -> None:
    records = list_checkpoints(checkpoints)
    assert [record.step for record in records] == [300, 200, 100]
    assert all(record.problem is None and verify(record) == [] for record in records)
    newest = records[0]
    assert newest.path == checkpoints / "step-000000300"
    assert newest.bytes == 3000 + 3001 + 100
    assert newest.metrics == {"loss": 1 / 300}
    assert newest.created == 1_700_000_000.25
    assert newest.manifest is not None
    assert newest.manifest.origin == origin(300, metrics={"loss": 1 / 300})


def test_no_directory_is_an_empty_list(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path / "none") == []
    assert newest_good(tmp_path / "none") == (None, [])
    assert sweep(tmp_path / "none") == []


def test_a_file_in_its_place_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(StorageError, match="listing .*checkpoints failed: Not a directory"):
        list_checkpoints(tmp_path / "checkpoints")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def swap_files(directory: Path) -> None:
    first, second = directory / "__0_0.distcp", directory / "__1_0.distcp"
    first.rename(directory / "x")
    second.rename(first)
    (directory / "x").rename(second)


def mix_in_another_step(directory: Path) -> None:
    shutil.copy(directory.parent / "step-000000200" / "__0_0.distcp", directory / "__0_0.distcp")


def take_anothers_manifest(directory: Path) -> None:
    shutil.copy(directory.parent / "step-000000200" / "everstep.json", directory / "everstep.json")


def link_elsewhere(directory: Path) -> None:
    payload = directory / "__0_0.distcp"
    payload.rename(directory.parent / "elsewhere")
    payload.symlink_to(directory.parent / "elsewhere")


def make_a_fifo(directory: Path) -> None:
    (directory / "__0_0.distcp").unlink()
    os.mkfifo(directory / "__0_0.distcp")


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "bit flip in the payload": (lambda d: flip_bit(d / "__1_0.distcp", 2000), "__1_0.distcp: digest"),
    "bit flip in the header": (lambda d: flip_bit(d / "__0_0.distcp", 0, 7), "__0_0.distcp: digest"),
    "bit flip at the end": (lambda d: flip_bit(d / "__0_0.distcp", 2999), "__0_0.distcp: digest"),
    "bit flip in .metadata": (lambda d: flip_bit(d / ".metadata", 50), ".metadata: digest"),
    "bit flip in the manifest": (lambda d: flip_bit(d / "everstep.json", 30), "everstep.json is damaged"),
    "truncated payload": (
        lambda d: truncate(d / "__0_0.distcp"),
        "__0_0.distcp: truncated, 2999 of 3000 bytes",
    ),
    "longer payload": (lambda d: append(d / "__0_0.distcp"), "__0_0.distcp: 3001 bytes, 3000 expected"),
    "missing payload": (lambda d: (d / "__0_0.distcp").unlink(), "__0_0.distcp: missing"),
    "missing .metadata": (lambda d: (d / ".metadata").unlink(), ".metadata: missing"),
    "truncated manifest": (lambda d: truncate(d / "everstep.json"), "everstep.json is damaged"),
    "empty manifest": (lambda d: os.truncate(d / "everstep.json", 0), "everstep.json is damaged"),
    "missing manifest": (lambda d: (d / "everstep.json").unlink(), "no everstep.json: not a checkpoint"),
    "manifest that is a directory": (
        lambda d: ((d / "everstep.json").unlink(), (d / "everstep.json").mkdir())[1],
        "everstep.json cannot be read",
    ),
    "swapped files": (swap_files, "__0_0.distcp"),
    "files of two steps": (mix_in_another_step, "__0_0.distcp: digest"),
    "another step's manifest": (take_anothers_manifest, "manifest is of step 200"),
    "a symbolic link": (link_elsewhere, "__0_0.distcp: is a symbolic link"),
    "a fifo": (make_a_fifo, "__0_0.distcp: is not a regular file"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_named_and_passed_over(checkpoints: Path, kind: str) -> None:
    damage, expected = DAMAGE[kind]
    damage(checkpoints / "step-000000300")
    newest = list_checkpoints(checkpoints)[0]
    problems = verify(newest)
    assert problems
    assert any(expected in problem for problem in problems)
    assert all("\n" not in problem for problem in problems)
    good, rejected = newest_good(checkpoints)
    assert good is not None
    assert good.step == 200
    assert [record.step for record in rejected] == [300]
    assert expected in (rejected[0].problem or "")


@pytest.mark.parametrize(
    "kind", [kind for kind in DAMAGE if "bit flip" not in kind and "two steps" not in kind]
)
def test_all_but_changed_bytes_is_seen_without_reading_the_files(checkpoints: Path, kind: str) -> None:
    DAMAGE[kind][0](checkpoints / "step-000000300")
    assert DAMAGE[kind][1] in (list_checkpoints(checkpoints)[0].problem or "")


def test_every_problem_is_a_line(checkpoints: Path) -> None:
    directory = checkpoints / "step-000000300"
    (directory / ".metadata").unlink()
    truncate(directory / "__0_0.distcp")
    flip_bit(directory / "__1_0.distcp", 9)
    (directory / "notes.txt").write_text("an extra file is fine")
    record = list_checkpoints(checkpoints)[0]
    assert verify(record) == [
        ".metadata: missing",
        "__0_0.distcp: truncated, 2999 of 3000 bytes",
        "__1_0.distcp: digest does not match",
    ]


def test_files_beside_the_checkpoint_are_fine(checkpoints: Path) -> None:
    (checkpoints / "step-000000300" / "notes.txt").write_text("keep")
    (checkpoints / "step-000000300" / "everstep.json.partial").write_text("")
    good, rejected = newest_good(checkpoints)
    assert good is not None
    assert good.step == 300
    assert not rejected


def test_garbage_is_tolerated(checkpoints: Path) -> None:
    (checkpoints / "notes.txt").write_text("")
    (checkpoints / "tensorboard").mkdir()
    (checkpoints / "step-x").mkdir()
    (checkpoints / "step-400").mkdir()
    (checkpoints / "step-000000500").write_text("a file")
    (checkpoints / "step-000000600").symlink_to("step-000000300")
    (checkpoints / "step-000000700").mkdir()
    write_source(checkpoints / "step-0000000800")
    (checkpoints / "step-00000090٠").mkdir()
    found = {record.path.name: record.problem for record in list_checkpoints(checkpoints)}
    assert set(found) == {
        "step-x", "step-400", "step-0000000800", "step-00000090٠", "step-000000500", "step-000000600",
        "step-000000300", "step-000000200", "step-000000100",
    }  # fmt: skip
    assert found["step-x"] == "'step-x' is not the name of a checkpoint"
    assert found["step-400"] == "'step-400' is not the name of a checkpoint"
    assert found["step-000000500"] == "is not a directory"
    assert found["step-000000600"] == "is a symbolic link"
    good, rejected = newest_good(checkpoints)
    assert good is not None
    assert good.step == 300
    assert [record.step for record in rejected] == [600, 500]


def test_a_stock_dcp_directory_is_not_a_checkpoint(checkpoints: Path) -> None:
    write_source(checkpoints / "step-000000900")
    record = list_checkpoints(checkpoints)[0]
    assert (record.step, record.manifest) == (900, None)
    assert "not a checkpoint" in (record.problem or "")
    assert newest_good(checkpoints)[0] != record
    assert sweep(checkpoints) == []
    assert record.path.is_dir()


def test_a_copy_of_a_checkpoint_is_one(checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoints / "step-000000200", tmp_path / "other" / "step-000000200")
    good, _ = newest_good(tmp_path / "other")
    assert good is not None
    assert good.step == 200


def test_a_skipped_one_is_passed_over_in_silence(checkpoints: Path) -> None:
    good, rejected = newest_good(checkpoints, skip=[str(checkpoints / "step-000000300")])
    assert good is not None
    assert (good.step, rejected) == (200, [])


def test_when_none_is_good_all_are_told(checkpoints: Path) -> None:
    for step in (100, 200, 300):
        flip_bit(step_directory(checkpoints, step) / "__0_0.distcp", 5)
    good, rejected = newest_good(checkpoints)
    assert good is None
    assert [record.step for record in rejected] == [300, 200, 100]


def test_keys_are_told_apart(checkpoints: Path, tmp_path: Path) -> None:
    drain(tmp_path / "source-300", step_directory(checkpoints, 400), origin(400), key=KEY)
    good, rejected = newest_good(checkpoints, KEY)
    assert good is not None
    assert (good.step, rejected) == (400, [])
    good, rejected = newest_good(checkpoints)
    assert good is not None
    assert good.step == 300
    assert "set EVERSTEP_KEY" in (rejected[0].problem or "")
    good, rejected = newest_good(checkpoints, Key.derive("other"))
    assert good is None
    assert "another key" in (rejected[0].problem or "")
    assert "made without a key" in (rejected[1].problem or "")


def test_whoever_lacks_the_key_cannot_exchange_a_file(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    drain(source, step_directory(tmp_path, 5), origin(5), key=KEY)
    write_source(source, seed=666)
    seal(source, origin(5))  # the best an attacker can do
    shutil.copy(source / "__0_0.distcp", step_directory(tmp_path, 5) / "__0_0.distcp")
    assert verify(list_checkpoints(tmp_path, KEY)[0], KEY) == ["__0_0.distcp: digest does not match"]


def test_removal_leaves_nothing_and_is_repeatable(checkpoints: Path) -> None:
    record = list_checkpoints(checkpoints)[1]
    (record.path / "extra").mkdir()
    (record.path / "extra" / "file").write_text("")
    (record.path / "link").symlink_to(checkpoints / "step-000000300")
    remove(record)
    remove(record)
    assert sorted(os.listdir(checkpoints)) == ["step-000000100", "step-000000300"]
    assert verify(list_checkpoints(checkpoints)[0]) == []


@pytest.mark.parametrize("kind", ["truncated manifest", "missing manifest", "bit flip in the payload"])
def test_a_damaged_one_can_be_removed(checkpoints: Path, kind: str) -> None:
    DAMAGE[kind][0](checkpoints / "step-000000300")
    remove(list_checkpoints(checkpoints)[0])
    assert not (checkpoints / "step-000000300").exists()


def test_a_link_is_not_followed_by_removal(checkpoints: Path) -> None:
    link = checkpoints / "step-000000600"
    link.symlink_to("step-000000300")
    with pytest.raises(StorageError, match="not a directory: not removed"):
        remove(CheckpointRecord(step=600, path=link))
    assert list_checkpoints(checkpoints)[1].problem is None


def test_the_sweep_takes_leftovers_and_nothing_else(checkpoints: Path) -> None:
    abandoned, owned = step_directory(checkpoints, 400), step_directory(checkpoints, 500)
    for directory in (abandoned, owned):
        begin(directory)
        (directory / "__0_0.distcp").write_bytes(b"half")
    step_directory(checkpoints, 600).mkdir()  # killed between mkdir and the mark
    begin(checkpoints / "mine")
    assert [record.step for record in list_checkpoints(checkpoints)] == [300, 200, 100]
    assert sweep(checkpoints, owned=[owned]) == [abandoned, step_directory(checkpoints, 600)]
    assert owned.is_dir()
    assert (checkpoints / "mine").is_dir()
    assert [record.step for record in list_checkpoints(checkpoints)] == [300, 200, 100]
