"""Draining and sealing: what is committed is whole, what fails leaves nothing and takes nothing."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest

from supervisor.checkpoint.catalog import list_checkpoints, newest_good, step_directory, sweep, verify
from supervisor.checkpoint.commit import drain, seal
from supervisor.checkpoint.copying import TRANSIENT
from supervisor.checkpoint.directory import begin
from supervisor.checkpoint.manifest import VERSION, Key, read_manifest
from supervisor.checkpoint.verify import verify_directory
from supervisor.edge.files import LOCAL, WatchedFiles
from supervisor.errors import CancelledError, CheckpointError, StorageError
from tests.checkpoint.tools import at_once, flip_bit, origin, write_source

KEY = Key.derive("secret")
Hook = Callable[[str, Path], None]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "slot", seed=1)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """With a good step 100."""
    drain(write_source(tmp_path / "old"), step_directory(tmp_path / "checkpoints", 100), origin(100))
    return tmp_path / "checkpoints"


def raising(number: int, *, operation: str, name: str = "", times: int = 1) -> Hook:
    """Let ``operation`` on a file called ``…name`` fail ``times`` times with ``errno`` number."""
    left = [times]

    def before(seen: str, path: Path) -> None:
        if seen == operation and path.name.endswith(name) and left[0] > 0:
            left[0] -= 1
            raise OSError(number, os.strerror(number))

    return before


def steps(checkpoints: Path, key: Key | None = None) -> list[int]:
    """Steps of the verified checkpoints, everything else being an error."""
    records = list_checkpoints(checkpoints, key)
    assert [record.problem for record in records] == [None] * len(records)
    assert all(verify(record, key) == [] for record in records)
    assert len(list(checkpoints.iterdir())) == len(records)  # nothing else lies about
    return [record.step for record in records]


@pytest.mark.parametrize("key", [None, KEY], ids=["unkeyed", "keyed"])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_drain_copies_and_commits(source: Path, tmp_path: Path, key: Key | None, threads: int) -> None:
    (source / "nested").mkdir()
    (source / "nested" / "__2_0.distcp").write_bytes(bytes(3 << 20))  # several chunks
    (source / "empty.distcp").write_bytes(b"")
    target = step_directory(tmp_path / "a" / "b", 7)
    manifest = drain(source, target, origin(7), key=key, threads=threads)
    assert manifest == read_manifest(target, key)
    assert set(manifest.files) == {
        ".metadata", "__0_0.distcp", "__1_0.distcp", "nested/__2_0.distcp", "empty.distcp",
    }  # fmt: skip
    for name in manifest.files:
        assert (target / name).read_bytes() == (source / name).read_bytes()
    assert sorted(os.listdir(target)) == [
        ".metadata", "__0_0.distcp", "__1_0.distcp", "empty.distcp", "everstep.json", "nested",
    ]  # fmt: skip
    assert steps(target.parent, key) == [7]


@pytest.mark.parametrize("key", [None, KEY], ids=["unkeyed", "keyed"])
def test_sealing_commits_what_is_there(source: Path, tmp_path: Path, key: Key | None) -> None:
    sealed = seal(source, origin(7), key=key)
    drained = drain(source, step_directory(tmp_path / "checkpoints", 7), origin(7), key=key)
    assert sealed == drained
    assert read_manifest(source, key) == sealed


def test_a_manifest_in_the_source_is_not_payload(source: Path, tmp_path: Path) -> None:
    manifest = seal(source, origin(7))
    assert drain(source, step_directory(tmp_path / "checkpoints", 7), origin(7)).files == manifest.files


def test_only_named_files_if_names_are_given(source: Path, tmp_path: Path) -> None:
    target = step_directory(tmp_path / "checkpoints", 7)
    assert set(drain(source, target, origin(7), names=[".metadata", "__1_0.distcp"]).files) == {
        ".metadata",
        "__1_0.distcp",
    }
    with pytest.raises(CheckpointError, match=r"lacks __9_0\.distcp"):
        drain(source, target, origin(7), names=[".metadata", "__9_0.distcp"])


def test_the_order_is_files_then_manifest_then_directory(source: Path, tmp_path: Path) -> None:
    seen = []
    files = WatchedFiles(LOCAL, lambda operation, path: seen.append((operation, path.name)))
    fences: list[int] = []
    target = step_directory(tmp_path / "checkpoints", 7)
    drain(source, target, origin(7), files=files, threads=1, fence=lambda: fences.append(len(seen)))
    rename = seen.index(("rename", "everstep.json"))
    for name in (".metadata", "__0_0.distcp", "__1_0.distcp"):
        writes = [i for i, entry in enumerate(seen) if entry == ("write", name)]
        assert max(writes) < seen.index(("sync", name)) < rename
    assert seen.index(("open", "everstep.json.partial")) == 0
    assert seen[rename - 1] == ("sync", "everstep.json.partial")
    assert seen[rename + 1 :] == [("open", target.name), ("sync", target.name)]
    assert ("sync", "checkpoints") in seen[:rename]
    assert rename in fences  # asked between the manifest's sync and its rename


@pytest.mark.parametrize("when", ["at the start", "at a file", "at the commit"])
def test_a_fence_refuses_and_nothing_is_left(source: Path, checkpoints: Path, when: str) -> None:
    asked = []

    def fence() -> None:
        asked.append(None)
        if len(asked) == {"at the start": 1, "at a file": 3, "at the commit": 5}[when]:
            raise StorageError("epoch 2 has taken over")

    with pytest.raises(StorageError, match="epoch 2 has taken over"):
        drain(source, step_directory(checkpoints, 200), origin(200), fence=fence, threads=1)
    assert steps(checkpoints) == [100]


def test_after_the_fence_has_fallen_nothing_of_the_newer_epoch_is_removed(
    source: Path, checkpoints: Path
) -> None:
    target = step_directory(checkpoints, 200)
    asked = []

    def fence() -> None:
        asked.append(None)
        if len(asked) == 3:  # the newer epoch clears the directory away and commits its own
            shutil.rmtree(target)
            drain(source, target, origin(200, epoch=2))
        if len(asked) >= 3:
            raise StorageError("epoch 2 has taken over")

    with pytest.raises(StorageError, match="epoch 2"):
        drain(source, target, origin(200), fence=fence, threads=1)
    assert steps(checkpoints) == [200, 100]


def test_a_sealing_that_the_fence_refuses_leaves_the_files_as_they_were(source: Path) -> None:
    before = sorted(os.listdir(source))

    def fence() -> None:
        raise StorageError("epoch 2 has taken over")

    with pytest.raises(StorageError, match="epoch 2"):
        seal(source, origin(7), fence=fence)
    assert sorted(os.listdir(source)) == before


# --------------------------------------------------------------------------- what is there already


def test_a_good_checkpoint_is_kept(source: Path, checkpoints: Path) -> None:
    target = step_directory(checkpoints, 100)
    before = {path.name: path.stat().st_ino for path in target.iterdir()}
    manifest = drain(source, target, origin(100, attempt=9))
    assert manifest.origin.attempt == 2
    assert {path.name: path.stat().st_ino for path in target.iterdir()} == before


def test_a_damaged_one_is_replaced(source: Path, checkpoints: Path) -> None:
    flip_bit(step_directory(checkpoints, 100) / "__0_0.distcp", 7)
    drain(source, step_directory(checkpoints, 100), origin(100, attempt=9))
    assert steps(checkpoints) == [100]
    assert read_manifest(step_directory(checkpoints, 100), None).origin.attempt == 9


def test_a_leftover_is_replaced(source: Path, checkpoints: Path) -> None:
    target = step_directory(checkpoints, 200)
    begin(target)
    (target / "__0_0.distcp").write_bytes(b"half")
    (target / "__7_0.distcp").write_bytes(b"of another world size")
    drain(source, target, origin(200))
    assert steps(checkpoints) == [200, 100]
    assert not (target / "__7_0.distcp").exists()


@pytest.mark.parametrize(
    "what", ["stock DCP files", "another key", "a newer version", "another step", "a file", "a link"]
)
def test_what_is_not_ours_to_judge_is_set_aside_whole(source: Path, checkpoints: Path, what: str) -> None:
    target = step_directory(checkpoints, 200)
    if what == "stock DCP files":
        write_source(target, seed=5)
    elif what == "another key":
        drain(source, target, origin(200), key=KEY)
    elif what == "a newer version":
        drain(source, target, origin(200))
        (target / "everstep.json").write_text(f'{{"format":"everstep-checkpoint","version":{VERSION + 1}}}')
    elif what == "another step":
        shutil.copytree(step_directory(checkpoints, 100), target)
    elif what == "a file":
        target.write_text("precious")
    else:
        target.symlink_to(step_directory(checkpoints, 100))
    before = {path.name: path.read_bytes() for path in target.iterdir()} if target.is_dir() else None
    assert drain(source, target, origin(200)).step == 200
    assert newest_good(checkpoints)[0] == list_checkpoints(checkpoints)[0]
    aside = checkpoints / "step-000000200.aside-1"
    assert os.path.lexists(aside)
    assert before == ({path.name: path.read_bytes() for path in aside.iterdir()} if aside.is_dir() else None)
    assert sweep(checkpoints) == []


@pytest.mark.parametrize("what", ["damaged", "stock", "another key"])
def test_a_drain_that_fails_puts_back_what_it_displaced(source: Path, checkpoints: Path, what: str) -> None:
    target = step_directory(checkpoints, 200)
    drain(source, target, origin(200), key=KEY if what == "another key" else None)
    if what == "stock":
        (target / "everstep.json").unlink()
    if what == "damaged":
        flip_bit(target / ".metadata", 0)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    files = WatchedFiles(LOCAL, raising(errno.EROFS, operation="sync", name="__1_0.distcp"))
    with pytest.raises(StorageError, match="Read-only"):
        drain(source, target, origin(200), files=files)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert sorted(os.listdir(checkpoints)) == ["step-000000100", "step-000000200"]


# --------------------------------------------------------------------------- failing storage

OPERATIONS = ["open", "write", "sync", "rename"]


@pytest.mark.parametrize("number", sorted(TRANSIENT), ids=errno.errorcode.get)
@pytest.mark.parametrize("operation", ["open", "write", "sync"])
def test_a_passing_error_at_a_file_is_retried(
    source: Path, checkpoints: Path, operation: str, number: int
) -> None:
    files = WatchedFiles(LOCAL, raising(number, operation=operation, name="__0_0.distcp", times=3))
    drain(source, step_directory(checkpoints, 200), origin(200), files=files, retries=at_once())
    assert steps(checkpoints) == [200, 100]


def test_a_passing_error_in_reading_the_source_is_retried(source: Path, checkpoints: Path) -> None:
    files = WatchedFiles(LOCAL, raising(errno.EIO, operation="read", name=".distcp", times=4))
    drain(source, step_directory(checkpoints, 200), origin(200), files=files, retries=at_once())
    assert steps(checkpoints) == [200, 100]


@pytest.mark.parametrize(("operation", "name"), [
    ("open", "everstep.json.partial"), ("write", "everstep.json.partial"), ("sync", "everstep.json.partial"),
    ("rename", "everstep.json"),
])  # fmt: skip
def test_a_passing_error_in_the_commit_is_retried(
    source: Path, checkpoints: Path, operation: str, name: str
) -> None:
    fail = raising(errno.EIO, operation=operation, name=name, times=2)
    copied = []

    def before(seen: str, path: Path) -> None:
        if copied:
            fail(seen, path)
        elif (seen, path.name) == ("sync", ".metadata"):  # the smallest file is the last one
            copied.append(path)

    files = WatchedFiles(LOCAL, before)
    drain(source, step_directory(checkpoints, 200), origin(200), files=files, retries=at_once(), threads=1)
    assert steps(checkpoints) == [200, 100]


def test_a_failed_sync_is_never_called_again_on_the_same_file(source: Path, checkpoints: Path) -> None:
    """The second call would succeed, for pages that the kernel has given up."""
    inodes = []

    def before(operation: str, path: Path) -> None:
        if operation == "sync" and path.name == "__0_0.distcp":
            inodes.append((path.stat().st_ino, path.stat().st_ctime_ns))
            if len(inodes) < 3:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

    drain(
        source,
        step_directory(checkpoints, 200),
        origin(200),
        files=WatchedFiles(LOCAL, before),
        retries=at_once(),
    )
    assert len(set(inodes)) == 3


def test_sealing_does_not_retry_a_failed_sync(source: Path) -> None:
    before = sorted(os.listdir(source))
    files = WatchedFiles(LOCAL, raising(errno.EIO, operation="sync", name="__0_0.distcp"))
    with pytest.raises(StorageError, match="sealing .* failed: Input/output error"):
        seal(source, origin(7), files=files)
    assert sorted(os.listdir(source)) == before


def test_the_budget_is_one_for_all_files(source: Path, checkpoints: Path) -> None:
    waits: list[float] = []
    retries = at_once(budget=5)
    retries.sleep = waits.append
    files = WatchedFiles(LOCAL, raising(errno.EIO, operation="write", name=".distcp", times=100))
    with pytest.raises(StorageError, match=r"draining to .*_0\.distcp failed: Input/output error"):
        drain(source, step_directory(checkpoints, 200), origin(200), files=files, retries=retries)
    assert 5 <= len(waits) <= 6
    assert waits[0] < 0.5
    assert max(waits) <= 2.0
    assert steps(checkpoints) == [100]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_full_disk_is_not_retried(source: Path, checkpoints: Path, operation: str, number: int) -> None:
    retries = at_once()
    retries.sleep = lambda seconds: pytest.fail("waited for a full disk")
    files = WatchedFiles(LOCAL, raising(number, operation=operation, times=1))
    with pytest.raises(StorageError, match=r"checkpoint .*step-000000200 needs 6101 bytes, \d+ are free"):
        drain(source, step_directory(checkpoints, 200), origin(200), files=files, retries=retries)
    assert steps(checkpoints) == [100]


def test_an_error_at_any_operation_leaves_nothing_and_takes_nothing(source: Path, checkpoints: Path) -> None:
    """The N-th operation fails, for all N; what is left is swept."""
    for n in range(1000):
        count = [0]

        def before(operation: str, path: Path, count: list[int] = count, n: int = n) -> None:
            count[0] += 1
            if count[0] == n + 1:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        try:
            drain(
                source,
                step_directory(checkpoints, 200),
                origin(200),
                files=WatchedFiles(LOCAL, before),
                threads=1,
            )
        except StorageError:
            assert steps(checkpoints) == [100]
        else:
            break
    assert 20 < n < 100
    assert steps(checkpoints) == [200, 100]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_cancelled_drain_leaves_nothing(source: Path, checkpoints: Path, threads: int) -> None:
    asked = []

    def cancelled() -> bool:
        asked.append(None)
        return len(asked) >= 2

    with pytest.raises(CancelledError, match="was cancelled"):
        drain(source, step_directory(checkpoints, 200), origin(200), cancelled=cancelled, threads=threads)
    assert steps(checkpoints) == [100]


def test_an_error_in_one_file_stops_the_others_and_is_the_one_told(tmp_path: Path, checkpoints: Path) -> None:
    source = write_source(tmp_path / "slot", ranks=8, size=1 << 20)
    files = WatchedFiles(LOCAL, raising(errno.EROFS, operation="write", name="__5_0.distcp"))
    with pytest.raises(StorageError, match=r"__5_0\.distcp failed: Read-only"):
        drain(source, step_directory(checkpoints, 200), origin(200), files=files, threads=4)
    assert steps(checkpoints) == [100]


def test_after_an_error_no_other_file_is_copied_to_its_end(tmp_path: Path, checkpoints: Path) -> None:
    """The first file fails while the second is at its first chunk; the second asks for a few more at most."""
    chunks = 64
    source = write_source(tmp_path / "slot", size=1000)
    os.truncate(source / "__0_0.distcp", chunks << 20)
    os.truncate(source / "__1_0.distcp", chunks << 20)
    failing = Event()
    written = []

    def before(operation: str, path: Path) -> None:
        if operation == "write" and path.name == "__0_0.distcp":
            assert failing.wait(30)
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        if operation == "write" and path.name == "__1_0.distcp":
            written.append(path)
            failing.set()

    files = WatchedFiles(LOCAL, before)
    with pytest.raises(StorageError, match=r"__0_0\.distcp failed: Read-only"):
        drain(source, step_directory(checkpoints, 200), origin(200), files=files, threads=2, bandwidth=2e7)
    assert len(written) < chunks
    assert steps(checkpoints) == [100]


def test_a_rivals_file_is_not_written_over(source: Path, checkpoints: Path) -> None:
    rival: list[int] = []

    def before(operation: str, path: Path) -> None:
        if operation == "open" and path == step_directory(checkpoints, 200) / "__0_0.distcp" and not rival:
            path.write_text("the rival's")
            rival.append(os.open(path, os.O_RDONLY))

    with pytest.raises(StorageError, match=r"__0_0\.distcp failed: File exists"):
        drain(source, step_directory(checkpoints, 200), origin(200), files=WatchedFiles(LOCAL, before))
    assert os.read(rival[0], 100) == b"the rival's"
    os.close(rival[0])


def test_what_cannot_be_read_now_is_set_aside_and_not_lost(source: Path, checkpoints: Path) -> None:
    target = step_directory(checkpoints, 100)

    def before(operation: str, path: Path) -> None:
        if operation == "read" and path == target / "__0_0.distcp":
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    drain(source, target, origin(100, attempt=9), files=WatchedFiles(LOCAL, before))
    assert read_manifest(target, None).origin.attempt == 9
    (checkpoints / "step-000000100.aside-1").rename(step_directory(checkpoints, 99))
    assert verify_directory(step_directory(checkpoints, 99), None).origin.attempt == 2


def test_what_could_not_be_set_aside_for_good_is_where_it_was(source: Path, checkpoints: Path) -> None:
    target = step_directory(checkpoints, 100)
    (target / "__0_0.distcp").write_bytes(b"damaged")
    renamed: list[bool] = []

    def before(operation: str, path: Path) -> None:
        renamed.append(not target.exists())
        if operation == "sync" and path == checkpoints and renamed[-1]:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(StorageError, match="Input/output error"):
        drain(source, target, origin(100), files=WatchedFiles(LOCAL, before), retries=at_once())
    assert any(renamed)
    assert sorted(os.listdir(checkpoints)) == ["step-000000100"]
    assert (target / "__0_0.distcp").read_bytes() == b"damaged"


def test_a_file_system_that_does_not_say_what_is_free(
    source: Path, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = os.statvfs(checkpoints)
    nothing = os.statvfs_result((told.f_bsize, told.f_frsize, *[0] * 6, told.f_flag, told.f_namemax))
    monkeypatch.setattr(os, "statvfs", lambda _: nothing)
    drain(source, step_directory(checkpoints, 200), origin(200))
    assert steps(checkpoints) == [200, 100]


def test_a_limited_drain_is_whole(source: Path, checkpoints: Path) -> None:
    drain(source, step_directory(checkpoints, 200), origin(200), bandwidth=1e6)
    assert steps(checkpoints) == [200, 100]


# --------------------------------------------------------------------------- a source that is none


def test_a_source_without_metadata_is_refused(source: Path, checkpoints: Path) -> None:
    (source / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"no \.metadata"):
        drain(source, step_directory(checkpoints, 200), origin(200))
    with pytest.raises(CheckpointError, match=r"no \.metadata"):
        seal(source, origin(200))
    assert steps(checkpoints) == [100]


def test_a_source_with_a_link_is_refused(source: Path, checkpoints: Path) -> None:
    (source / "secrets").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match="secrets is not a regular file"):
        drain(source, step_directory(checkpoints, 200), origin(200))
    assert steps(checkpoints) == [100]


def test_a_source_that_is_gone_is_an_error_of_storage(tmp_path: Path, checkpoints: Path) -> None:
    with pytest.raises(StorageError, match="No such file or directory"):
        drain(tmp_path / "none", step_directory(checkpoints, 200), origin(200))
    with pytest.raises(StorageError, match="No such file or directory"):
        seal(tmp_path / "none", origin(200))


def test_a_source_that_shrinks_under_the_drain_is_noticed(source: Path, checkpoints: Path) -> None:
    def before(operation: str, path: Path) -> None:
        if operation == "open" and path == source / "__0_0.distcp":
            os.truncate(path, 10)

    with pytest.raises(StorageError, match="changed while it was copied: 10 bytes read, it had 3000"):
        drain(source, step_directory(checkpoints, 200), origin(200), files=WatchedFiles(LOCAL, before))
    assert steps(checkpoints) == [100]
