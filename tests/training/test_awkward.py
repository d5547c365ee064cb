"""What users do and tutorials do not: odd gradients, loops and objects, storage that fails, two runs in one directory."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from supervisor.errors import CheckpointError, JobError, StateMismatchError, StorageError, UsageError
from supervisor.training import Session, saving
from tests.training.harness import RankError, launch
from tests.training.programs import awkward


def saved(root: Path) -> list[int]:
    return sorted(int(path.parent.name[5:]) for path in (root / "checkpoints").glob("step-*/everstep.json"))


def save(root: Path, step: int = 1, **options: Any) -> None:
    with Session(dir=root, **{"checkpoint_every": "1step", **options}) as session:
        for number in session.steps(step):
            session.state["step"] = number


# --------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("kind", ["wrapped", "sealed", "delayed"])
def test_no_save_while_gradients_are_pending(kind: str, tmp_path: Path) -> None:
    _, expected = awkward.accumulate(str(tmp_path / "a"), kind, 8)
    with pytest.raises(KeyboardInterrupt):
        awkward.accumulate(str(tmp_path / "b"), kind, 8, stop=5)
    first, weights = awkward.accumulate(str(tmp_path / "b"), kind, 8)
    # a body that steps first always leaves gradients; they are saved without when there is no later step
    assert first == (0 if kind == "delayed" else 3)
    assert torch.equal(weights, expected)


def test_a_save_does_not_wait_for_gradients_for_ever(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "PATIENCE", 4)
    awkward.accumulate(str(tmp_path), "delayed", 8)
    assert saved(tmp_path) == [5, 8]
    assert (
        "gradients of optimizer were pending at the end of 4 steps: step 5 is saved" in capfd.readouterr().err
    )


def test_fsdp_that_accumulates_without_synchronising(tmp_path: Path) -> None:
    expected = launch(awkward.fsdp_without_sync, 2, str(tmp_path / "a"))
    assert saved(tmp_path / "a") == [3, 6, 9]
    launch(awkward.fsdp_without_sync, 2, str(tmp_path / "b"), stop=5)
    results = launch(awkward.fsdp_without_sync, 2, str(tmp_path / "b"))
    assert [first for first, _ in results] == [3, 3]
    assert [weights for _, weights in results] == [weights for _, weights in expected]


def test_what_fsdp_keeps_is_found_in_the_dtype_it_is_reduced_in_and_in_parts_used_late() -> None:
    (found,) = launch(awkward.fsdp_pending, 1)
    assert found == [["model"], [], [], ["model"], []]


def test_gradients_that_nobody_uses_keep_nothing_waiting(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    with Session(dir=tmp_path, checkpoint_every="1step", model=model, optimizer=optimizer) as session:
        for _ in session.steps(2):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
    assert saved(tmp_path) == [1, 2]


def test_sparse_gradients_are_pending_as_others_are(tmp_path: Path) -> None:
    model = nn.Embedding(10, 4, sparse=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Session(
        dir=tmp_path, checkpoint_every="1step", keep_last=9, model=model, optimizer=optimizer
    ) as session:
        for step in session.steps(6):
            model(torch.tensor([step, step])).sum().backward()
            if step % 3 == 2:
                optimizer.step()
                optimizer.zero_grad(set_to_none=step == 2)
    assert saved(tmp_path) == [3, 6]


def test_optimizers_that_are_made_and_dropped_are_let_go_of(tmp_path: Path) -> None:
    """A training may make one for each epoch, or for each step."""
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    alive = weakref.WeakSet[torch.optim.Optimizer]()
    with Session(dir=tmp_path, checkpoint_every="never", model=model, optimizer=optimizer) as session:
        for _ in session.steps(5):
            inner = torch.optim.Adam(model.parameters())
            alive.add(inner)
            model(torch.ones(2, 4)).sum().backward()
            inner.step()
        del inner
        gc.collect()
        assert len(alive) == 0


# --------------------------------------------------------------------------- loops


def epochs(root: Path, number: int, every: int = 1, stop: int | None = None) -> torch.Tensor:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Session(
        dir=root, checkpoint_every="1step", keep_last=99, model=model, optimizer=optimizer
    ) as session:
        for epoch in range(number):
            torch.randperm(5)
            for step in session.steps((epoch + 1) * 5):
                if step == stop:
                    raise KeyboardInterrupt
                model(torch.randn(3, 4)).pow(2).mean().backward()
                if step % every == every - 1:
                    optimizer.step()
                    optimizer.zero_grad()
    return model.weight.detach().clone()


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("stop", [7, 11])
def test_a_loop_over_epochs_resumes_bit_for_bit(every: int, stop: int, tmp_path: Path) -> None:
    expected = epochs(tmp_path / "a", 3, every)
    with pytest.raises(KeyboardInterrupt):
        epochs(tmp_path / "b", 3, every, stop)
    assert torch.equal(epochs(tmp_path / "b", 3, every), expected)


def test_what_is_pending_at_the_very_end_is_saved_and_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    epochs(tmp_path, 1, 3)
    assert saved(tmp_path) == [3, 5]
    epochs(tmp_path, 2, 3)
    assert "step 5 was saved while gradients of optimizer were accumulated" in capfd.readouterr().err


def test_save_and_break(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Session(dir=tmp_path, checkpoint_every="never") as session:
        for step in session.steps():
            session.state["step"] = step
            if step == 7:
                session.save()
                break
    assert session.step == 8
    assert saved(tmp_path) == [8]
    with Session(dir=tmp_path, checkpoint_every="never") as session:
        assert (session.step, session.state) == (8, {"step": 7})
        for _ in session.steps():
            break
    assert session.step == 8
    with Session(dir=tmp_path, checkpoint_every="never") as session:
        for step in session.steps():
            if step == 9:
                break
    assert "step 9 was broken out of" in capfd.readouterr().err
    assert saved(tmp_path) == [8]


def test_leaving_together_saves_and_leaving_apart_does_not(tmp_path: Path) -> None:
    assert launch(awkward.left, 2, str(tmp_path / "a"), "break") == [4, 4]
    assert saved(tmp_path / "a") == [4]
    assert launch(awkward.left, 2, str(tmp_path / "b"), "error") == [3, 3]
    assert saved(tmp_path / "b") == []


def test_ranks_at_different_steps_are_told(tmp_path: Path) -> None:
    for text in launch(awkward.uneven, 2, str(tmp_path)):
        assert text.startswith(
            "UsageError: the ranks are not at the same step: one has completed 4, another 5"
        )


# --------------------------------------------------------------------------- loading


def test_no_rank_trains_on_what_another_could_not_load(tmp_path: Path) -> None:
    assert launch(awkward.grumpy, 2, str(tmp_path), 2) == [2, 2]
    first, second = launch(awkward.grumpy, 2, str(tmp_path), 4)
    assert first == "CheckpointError: rank 1: 'on purpose'"
    assert second == "KeyError: 'on purpose'"
    assert saved(tmp_path) == [1, 2]


def test_checkpoints_that_are_all_refused_are_no_fresh_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVERSTEP_KEY", "secret" * 8)
    save(tmp_path, 3)
    monkeypatch.delenv("EVERSTEP_KEY")
    with pytest.raises(CheckpointError, match="none of the checkpoints in .* can be used .*EVERSTEP_KEY"):
        save(tmp_path, 9)
    assert saved(tmp_path) == [1, 2, 3]
    monkeypatch.setenv("EVERSTEP_KEY", "secret" * 8)
    save(tmp_path, 4)
    assert saved(tmp_path) == [2, 3, 4]


_ERRNO = 0


def _moody() -> int:
    """Unpickles after ``_ERRNO`` is 0, counting down."""
    global _ERRNO
    if _ERRNO:
        _ERRNO -= 1
        raise OSError(errno.ESTALE, "Stale file handle")
    return 5


class Moody:
    def __reduce__(self) -> Any:
        return _moody, ()


@pytest.fixture
def moods() -> Iterator[None]:
    global _ERRNO
    yield
    _ERRNO = 0


@pytest.mark.usefixtures("moods")
def test_storage_that_fails_for_a_moment_is_asked_again_and_never_taken_for_damage(tmp_path: Path) -> None:
    global _ERRNO
    with Session(dir=tmp_path, checkpoint_every="1step") as session:
        for _ in session.steps(2):
            session.state["moody"] = Moody()
    _ERRNO = 2
    with Session(dir=tmp_path) as session:
        assert session.step == 2
        assert session.state == {"moody": 5}
    _ERRNO = 100
    with pytest.raises(StorageError, match="Stale file handle"), Session(dir=tmp_path):
        pass


def test_an_object_that_does_not_unpickle_is_named_and_its_checkpoint_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 2)
    with Session(dir=tmp_path) as session:
        for _ in session.steps(3):
            session.state["moody"] = Moody()
    monkeypatch.delattr(f"{__name__}._moody")
    with pytest.raises(CheckpointError, match=r"step-000000003: 'session.state' cannot be unpickled: Attr"):
        save(tmp_path, 9)
    assert saved(tmp_path) == [1, 2, 3]


# --------------------------------------------------------------------------- the directory


def test_two_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    with Session(dir=tmp_path):
        with pytest.raises(JobError, match=rf"is in use: a Session, pid {os.getpid()} on"):
            save(tmp_path)
    save(tmp_path)
    with pytest.raises(StateMismatchError), Session(dir=tmp_path, other=nn.Linear(1, 1)):
        pass
    save(tmp_path, 2)


def test_leftovers_are_swept_and_what_is_not_ours_is_set_aside(tmp_path: Path) -> None:
    places = [tmp_path / "checkpoints" / f"step-{step:09d}" for step in (1, 2, 7)]
    for place in places:
        place.mkdir(parents=True)
        (place / "__0_0.distcp").write_bytes(b"theirs")
    (places[2] / "everstep.json.partial").touch()
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        save(tmp_path)
    assert not places[2].exists()
    for place in places[:2]:
        shutil.rmtree(place)
    with Session(dir=tmp_path, checkpoint_every="1step") as session:
        for _ in session.steps(2):
            places[1].mkdir(exist_ok=True)
            (places[1] / "__0_0.distcp").write_bytes(b"theirs")
    assert saved(tmp_path) == [1, 2]
    assert (places[1].with_name(f"{places[1].name}.aside-1") / "__0_0.distcp").read_bytes() == b"theirs"


def test_a_seal_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from supervisor.training import shelf

    save(tmp_path, 1)

    def refuse(*_: Any, **__: Any) -> None:
        raise StorageError("on purpose")

    monkeypatch.setattr(shelf, "seal", refuse)
    save(tmp_path, 3)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000001"]


def test_a_relative_directory_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with Session(dir="job", checkpoint_every="1step") as session:
        for _ in session.steps(3):
            monkeypatch.chdir(tmp_path / "elsewhere")
    assert saved(tmp_path / "job") == [1, 2, 3]


def test_a_checkpoint_without_another_rank_s_file_is_refused(tmp_path: Path) -> None:
    from supervisor.checkpoint.manifest import Origin
    from supervisor.decide.retention import RetentionPolicy
    from supervisor.training.shelf import Shelf

    shelf = Shelf(tmp_path, RetentionPolicy(keep_last=1))
    target = tmp_path / "checkpoints" / "step-000000001"
    shelf.begin(target)
    (target / ".metadata").write_bytes(b"index")
    origin = Origin(step=1, attempt=0, epoch=0, run_id="r", world_size=2, created=0.0)
    with pytest.raises(CheckpointError, match="lacks __1_0.distcp.*storage that all nodes share"):
        shelf.commit(target, origin, {".metadata", "__1_0.distcp"})
    assert not target.exists()
    shelf.close()


# --------------------------------------------------------------------------- objects


def test_what_can_never_be_saved_raises_at_once(tmp_path: Path) -> None:
    session = Session(dir=tmp_path, checkpoint_every="1step")

    def train() -> None:
        with session:
            for _ in session.steps(9):
                session.state["f"] = lambda: 1

    with pytest.raises(UsageError, match=r"cannot be saved, now or later: rank 0: .*lambda"):
        train()
    assert session.step == 1


def test_a_learning_rate_that_is_a_tensor_is_filled_in_place(tmp_path: Path) -> None:
    def run(start: float) -> tuple[torch.Tensor, Any]:
        rate, model = torch.tensor(start), nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        with Session(dir=tmp_path, model=model, optimizer=optimizer) as session:
            for _ in session.steps(1):
                pass
        return rate, optimizer.param_groups[0]["lr"]

    run(0.5)
    rate, present = run(0.1)
    assert rate is present
    assert float(rate) == 0.5


def test_state_for_each_shard_does_not_go_to_other_shards(tmp_path: Path) -> None:
    assert launch(awkward.momentum, 2, str(tmp_path), 2) == [2, 2]
    assert launch(awkward.momentum, 2, str(tmp_path), 3) == [3, 3]
    with pytest.raises(
        RankError, match=r"StateMismatchError.*optimizer.state.weight.m is a plain tensor per shard"
    ):
        launch(awkward.momentum, 1, str(tmp_path), 4)
