"""Copies behind the next step: every snapshot is, bit for bit, the state at its save point; or it is dropped, and that said."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from supervisor.errors import StorageError
from supervisor.training import engine, moves
from supervisor.training.engine import ArenaWriter
from supervisor.training.flight import Flight, Samples
from supervisor.training.frozen import Frozen
from supervisor.training.items import Items
from supervisor.training.slots import Slot
from supervisor.training.state import TrainingState
from supervisor.training.world import World
from supervisor.training.writer import READY, StaleError, TornError, Written
from tests.training.slow_gpu import SlowGpu

AdamW = torch.optim.AdamW
WIDTH = 300  # its matrices are large ones, its biases small


class Run:
    """A training whose every step is a save point; what is read back is compared as soon as it is said to be whole."""

    def __init__(self, root: Path, **objects: Any) -> None:
        torch.manual_seed(0)
        self.root = root
        world = World()
        self.state = TrainingState(objects, {}, world)
        self.writer = ArenaWriter(
            world,
            cleans=True,
            optimizers=self.state.optimizers,
            completed=lambda: self.step,
            slots=[root / str(slot) for slot in range(3)],
        )
        self.step = 0
        self.good: list[int] = []
        self.torn: list[int] = []
        self.put_off: list[int] = []
        self.behind = 0
        self.hasty = 0
        self.stale: list[int] = []

    def run(self, steps: int, one: Callable[[int], object]) -> None:
        for _ in range(steps):
            one(self.step)
            self.step += 1
            self.writer.poll()
            self.save()
        self.writer.flush()

    def save(self, *, behind: bool = True) -> None:
        step = self.step
        directory = self.root / str(step % 3)
        expected: dict[str, Any] = {}

        def gather() -> Items:
            items = self.state.gather_hastily(step)
            now = self.state.gather(step).whole()
            for key, value in now.values.items():
                expected[key] = (
                    value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)
                )
            return items

        def finished(outcome: Written | StorageError | None) -> None:
            if outcome is None:
                self.put_off.append(step)
                return
            if isinstance(outcome, TornError):
                (self.stale if isinstance(outcome, StaleError) else self.torn).append(step)
                return
            assert isinstance(outcome, Written), outcome
            with torch.device("cpu"):
                found = _load_state_dict_from_keys(checkpoint_id=directory)
            flat = _flat(found)
            for key, value in expected.items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(bits(flat[key]).cpu(), bits(value).cpu()), f"{key} of step {step}"
            assert found["session"]["step"] == step
            self.good.append(step)

        agreed = self.writer.ask(gather, behind=behind)
        self.hasty += agreed == READY
        self.writer.write(directory, gather, finished, behind=behind, agreed=agreed)
        self.behind += self.writer.is_busy


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return moves.local_of(tensor).detach().contiguous().reshape(-1).view(torch.uint8)


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, torch.Tensor):
        return {path: tree}
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return {
        k: v for name, part in pairs for k, v in _flat(part, f"{path}.{name}" if path else str(name)).items()
    }


@pytest.fixture(
    autouse=True,
    params=[
        "cpu",
        "slow gpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.may_skip("few machines that run the tests have a GPU"),
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
            ],
        ),
    ],
)
def slow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowGpu | None]:
    """Everything holds with copies that are queued, too."""
    slow = SlowGpu() if request.param == "slow gpu" else None
    if slow is not None:
        slow.install(monkeypatch)
    with torch.device("cuda" if request.param == "cuda" else "cpu"):
        yield slow


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    from torch.optim.optimizer import _global_optimizer_pre_hooks

    _global_optimizer_pre_hooks.clear()


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(8, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
    )


def train(model: nn.Module, *optimizers: Any, times: int = 1) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    for _ in range(times):
        model(torch.randn(16, 8)).pow(2).mean().backward()
    for optimizer in optimizers:
        optimizer.step()


@pytest.mark.parametrize(
    "options", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=lambda o: next(iter(o))
)
@pytest.mark.parametrize("kind", [AdamW, torch.optim.SGD])
def test_optimizers(kind: Any, options: dict[str, bool], slow: SlowGpu | None, tmp_path: Path) -> None:
    model = net()
    extra = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=1e-2, **extra, **options)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    run = Run(tmp_path, model=model, optimizer=optimizer, scheduler=scheduler)
    run.run(8, lambda _: (train(model, optimizer, times=2), scheduler.step()))
    assert run.good == list(range(1, 9))
    assert run.behind == 6  # but the one that was laid out, and the one that was proven
    assert slow is None or slow.copied >= 6


def test_another_default_device(tmp_path: Path) -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    run = Run(tmp_path, model=model, optimizer=optimizer)

    def one(_step: int) -> None:
        with torch.device("cpu"):
            train(model, optimizer)

    with torch.device("meta"):
        run.run(8, one)
    assert run.good == list(range(1, 9))
    assert run.behind


def test_several_optimizers(tmp_path: Path) -> None:
    body, head = net(), nn.Linear(1, 1)
    first, second = AdamW(body.parameters()), torch.optim.SGD(head.parameters(), lr=0.1)
    run = Run(tmp_path, body=body, head=head, first=first, second=second)
    run.run(8, lambda _: train(nn.Sequential(body, head), second, first))
    assert run.good == list(range(1, 9))
    assert run.behind == 6
    assert run.hasty == 5  # once all three slots are laid out


def test_one_that_does_not_step_each_time(tmp_path: Path) -> None:
    body, head = net(), nn.Linear(1, 1)
    first, second = AdamW(body.parameters()), torch.optim.SGD(head.parameters(), lr=0.1)
    run = Run(tmp_path, body=body, head=head, first=first, second=second)
    run.run(9, lambda step: train(nn.Sequential(body, head), *([first, second] if step % 2 else [first])))
    assert run.good == list(range(1, 10))
    assert 0 < run.behind < 5


def test_steps_without_an_optimizer_step(tmp_path: Path) -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    run = Run(tmp_path, model=model, optimizer=optimizer)

    def one(step: int) -> None:
        model(torch.randn(16, 8)).pow(2).mean().backward()
        if step % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()

    run.run(12, one)
    assert run.good == list(range(1, 13))
    assert run.behind > 0


def test_averaged_weights(tmp_path: Path) -> None:
    model = net()
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    optimizer = AdamW(model.parameters())
    run = Run(tmp_path, model=model, average=average, optimizer=optimizer)

    def one(_: int) -> None:
        average.update_parameters(model)  # also at the beginning of a step: behind the save point
        train(model, optimizer)

    run.run(8, one)
    assert run.good == list(range(1, 9))
    assert run.behind > 0


def adapted() -> tuple[nn.Module, AdamW]:
    """A model of which only the head is trained."""
    model = net()
    for part in (model[0], model[3]):
        part.requires_grad_(False)
    return model, AdamW([p for p in model.parameters() if p.requires_grad])


def waiting(run: Run) -> list[int]:
    """Where that lies for which the training stood, for each slot; but buffers, for which it always does."""
    buffers = {b.data_ptr() for module in run.state.modules.values() for b in module.buffers()}
    slots = run.writer._rack._slots.values()
    places = [tensor.data_ptr() for slot in slots for tensor in slot.now.tensors]
    return [place for place in places if place not in buffers]


def test_frozen_weights_are_copied_behind_the_step(tmp_path: Path) -> None:
    model, optimizer = adapted()
    run = Run(tmp_path, model=model, optimizer=optimizer)
    run.run(6, lambda _: train(model, optimizer))
    assert run.good == list(range(1, 7))
    assert run.behind > 0
    assert waiting(run) == []


def test_nothing_is_a_number(tmp_path: Path) -> None:
    model = net()
    for name, dtype in {
        "real": torch.float32,
        "wide": torch.complex128,
        "conjugate": torch.complex64,
    }.items():
        value = torch.full((), torch.nan, dtype=dtype)
        model.register_buffer(name, value.conj() if name == "conjugate" else value)
    optimizer = AdamW(model.parameters())
    model[3].weight.data = model[3].weight.data.t().contiguous().t()  # it lies the other way round
    run = Run(tmp_path, model=model, optimizer=optimizer)

    def one(_: int) -> None:
        train(model, optimizer)
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)

    run.run(6, one)
    assert run.good == list(range(1, 7))
    assert run.behind > 0


@pytest.mark.parametrize("through_data", [True, False])
def test_averages_that_look_frozen_are_found_out_and_the_rest_flies(
    through_data: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = net()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = AdamW(model.parameters())
    run = Run(tmp_path, model=model, average=average, optimizer=optimizer)

    def one(_: int) -> None:
        with torch.no_grad():  # at the beginning of a step: behind the save point
            for held, new in zip(average.parameters(), model.parameters(), strict=True):
                (held.data if through_data else held).lerp_(new, 0.1)
        train(model, optimizer)

    run.run(8, one)
    assert run.good == list(range(1, 9))
    assert run.behind > 0
    assert len(waiting(run)) == 3 * len(list(average.parameters()))
    assert "outside of optimizer.step()" not in capsys.readouterr().err


def test_frozen_weights_counted_as_written_are_not_trusted_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, optimizer = adapted()
    run = Run(tmp_path, model=model, optimizer=optimizer)

    def one(step: int) -> None:
        train(model, optimizer)
        if step in (5, 9):
            with torch.no_grad():
                model[3].weight[17, 4] += 1

    run.run(12, one)
    assert run.torn in ([], [5])  # if the copy of step 5 had not come to it
    assert sorted(run.good + run.torn) == list(range(1, 13))
    assert run.behind > 5
    assert waiting(run) == [model[3].weight.data_ptr()] * 3
    assert "outside of optimizer.step()" not in capsys.readouterr().err


@pytest.mark.parametrize("through_data", [True, False])
def test_frozen_weights_that_are_others_at_a_save_point_only(through_data: bool, tmp_path: Path) -> None:
    model, optimizer = adapted()
    run = Run(tmp_path, model=model, optimizer=optimizer)
    kept = model[3].weight.detach().clone()

    def one(step: int) -> None:
        weight = model[3].weight.data if through_data else model[3].weight
        with torch.no_grad():
            if step == 6:
                weight.copy_(kept)  # before the copy of step 6 has come to it, or after
        train(model, optimizer)
        with torch.no_grad():
            if step == 5:
                weight.add_(1)

    run.run(10, one)
    assert sorted(run.good + run.torn) == list(range(1, 11))
    assert set(run.torn) <= ({5, 6, 7} if through_data else {5})


def test_frozen_weights_that_are_written_one_after_the_other(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(12)))
    model.requires_grad_(False)
    model[0].requires_grad_(True)
    optimizer = AdamW(model[0].parameters())
    run = Run(tmp_path, model=model, optimizer=optimizer)

    def one(step: int) -> None:
        optimizer.zero_grad()
        model(torch.randn(4, 64)).pow(2).mean().backward()
        optimizer.step()
        if 5 <= step < 16:
            model[step - 4].weight.data.mul_(0.9)

    run.run(20, one)
    assert 1 <= len(run.torn) <= 3
    assert sorted(run.good + run.torn) == list(range(1, 21))


def test_a_slot_is_not_compared_with_itself(tmp_path: Path) -> None:
    """What was at its place before it was made anew may be the very same pages."""
    model, optimizer = adapted()
    run = Run(tmp_path, model=model, optimizer=optimizer)
    run.run(6, lambda _: train(model, optimizer))
    assert run.good[-1] == 6
    path = tmp_path / "0"
    before = run.writer._rack.get(path)
    run.writer._rack.forget(path)
    assert run.writer._layout is not None
    anew = run.writer._rack.make(path, run.writer._layout)
    assert run.writer._frozen._before is before
    assert not run.writer._frozen.may_wait(anew)


def test_frozen_weights_written_around_the_counters_cost_one_snapshot_and_are_not_trusted_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, optimizer = adapted()
    run = Run(tmp_path, model=model, optimizer=optimizer)

    def one(step: int) -> None:
        if step in (5, 9):
            model[3].weight.data[17, 4] += 1  # one of 90,000
        train(model, optimizer)

    run.run(12, one)
    assert run.torn in ([5], [6])  # it was written before or after the copy of step 5 was over
    assert sorted(run.good + run.torn) == list(range(1, 13))
    assert run.behind > 5
    assert waiting(run) == [model[3].weight.data_ptr()] * 3
    told = capsys.readouterr().err
    assert told.count("weights that are not trained were written") == 1
    assert "outside of optimizer.step()" not in told


def test_optimizers_do_not_wait_for_frozen_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = adapted()
    run = Run(tmp_path, model=model, optimizer=optimizer)
    stepped, copied = threading.Event(), Frozen.copy
    waited: list[bool] = []
    stepped.set()

    def late(frozen: Frozen, slot: Slot) -> str | None:
        waited.append(stepped.wait(60))
        return copied(frozen, slot)

    monkeypatch.setattr(Frozen, "copy", late)

    def one(step: int) -> None:
        train(model, optimizer)
        stepped.set()  # no step is complete before
        if step == 5:
            run.writer.flush()
            stepped.clear()

    run.run(8, one)
    assert run.good == list(range(1, 9))
    assert waited
    assert all(waited)


def test_frozen_weights_written_in_a_slot_of_another_layout(tmp_path: Path) -> None:
    model, optimizer = adapted()
    extra = nn.BatchNorm1d(8, affine=False)
    run = Run(tmp_path, model=model, optimizer=optimizer, extra=extra)

    def one(step: int) -> None:
        if step == 5:
            extra.register_buffer("late", torch.zeros(3))
        if step in (4, 6):
            model[3].weight.data.mul_(0.99)
        train(model, optimizer)

    run.run(12, one)
    assert sorted(run.good + run.torn + run.stale) == list(range(1, 13))
    assert len(run.torn) <= 1
    assert waiting(run) == [model[3].weight.data_ptr()] * 3


def test_thawed_weights(tmp_path: Path) -> None:
    model, optimizer = adapted()
    run = Run(tmp_path, model=model, optimizer=optimizer)

    def one(step: int) -> None:
        if step == 5:
            model[3].requires_grad_(True)
            optimizer.add_param_group({"params": list(model[3].parameters())})
        train(model, optimizer)

    run.run(10, one)
    assert sorted(run.good + run.stale) == list(range(1, 11))
    assert run.stale in ([], [5])  # there are more parameters when its copy is over
    assert run.behind > 3
    assert waiting(run) == []


def test_large_files_are_made_behind_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_LARGE", 0)
    model = net()
    optimizer = AdamW(model.parameters())
    run = Run(tmp_path, model=model, optimizer=optimizer)
    while len(run.good) < 6 and run.step < 1000:
        run.run(1, lambda _: train(model, optimizer))
    assert run.put_off[0] == 1
    assert sorted(run.good + run.put_off) == list(range(1, run.step + 1))
    assert run.behind > 0


def test_a_save_that_was_asked_for_does_not_wait_for_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_LARGE", 0)
    model = net()
    optimizer = AdamW(model.parameters())
    run = Run(tmp_path, model=model, optimizer=optimizer)
    run.run(1, lambda _: train(model, optimizer))
    assert run.put_off == [1]
    run.save(behind=False)
    assert run.good == [1]


@pytest.mark.parametrize("through_data", [True, False])
def test_weights_changed_outside_at_every_step_are_found_by_the_proof(
    through_data: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    run = Run(tmp_path, model=model, optimizer=optimizer)

    def one(_: int) -> None:
        with torch.no_grad():
            weight = model[3].weight
            (weight.data if through_data else weight).mul_(0.99)
        train(model, optimizer)

    run.run(6, one)
    assert run.good == list(range(1, 7))
    assert run.behind == 0
    assert capsys.readouterr().err.count("outside of optimizer.step()") == 1


@pytest.mark.parametrize("through_data", [True, False])
def test_weights_changed_outside_later_tear_the_copy_and_end_it(
    through_data: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    run = Run(tmp_path, model=model, optimizer=optimizer)
    changed, fly = threading.Event(), Flight.run
    changed.set()

    def late(flight: Flight) -> None:
        changed.wait()
        fly(flight)

    monkeypatch.setattr(Flight, "run", late)

    def one(step: int) -> None:
        if step == 5:
            with torch.no_grad():
                (model[3].weight.data if through_data else model[3].weight).mul_(0.99)
            changed.set()
        train(model, optimizer)
        if step == 4:
            changed.clear()  # the copy of step 5 begins when its weights are others

    run.run(8, one)
    assert run.torn == [5]
    assert run.good == [1, 2, 3, 4, 6, 7, 8]
    assert run.behind == 3
    assert capsys.readouterr().err.count("outside of optimizer.step()") == 1


def test_renormalised_embeddings(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(50, 8, max_norm=0.5), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    run = Run(tmp_path, model=model, optimizer=optimizer)

    def one(_: int) -> None:
        optimizer.zero_grad()
        model(torch.randint(50, (16,))).mean().backward()
        optimizer.step()

    run.run(6, one)
    assert sorted(run.good + run.torn) == list(range(1, 7))
    assert len(run.torn) <= 1


@pytest.fixture
def mesh(request: pytest.FixtureRequest) -> Iterator[DeviceMesh]:
    """Of this process alone."""
    kind = "cuda" if request.node.callspec.params["slow"] == "cuda" else "cpu"
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh(kind, (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("how", ["itself", "its part", "data of its part"])
def test_sharded_weights_changed_outside_later(
    how: str,
    trained: bool,
    mesh: DeviceMesh,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each way is counted elsewhere, or nowhere."""
    if how != "data of its part":
        monkeypatch.setattr(Samples, "differ", lambda _: False)
        monkeypatch.setattr(Samples, "differ_on_gpu", lambda _: False)
    model = net()
    model[3].weight.requires_grad_(trained)
    for part in (model[0], model[3], model):
        fully_shard(part, mesh=mesh)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad])
    run = Run(tmp_path, model=model, optimizer=optimizer)
    changed, fly = threading.Event(), Flight.run
    changed.set()

    def late(flight: Flight) -> None:
        changed.wait()
        fly(flight)

    monkeypatch.setattr(Flight, "run", late)

    def one(step: int) -> None:
        if step == 5:
            weight = model[3].weight
            assert isinstance(weight, DTensor)
            with torch.no_grad():
                to_write = weight if how == "itself" else weight.to_local()
                (to_write.data if how.startswith("data") else to_write).mul_(0.99)
            changed.set()
        train(model, optimizer)
        if step == 4:
            changed.clear()  # the copy of step 5 begins when its weights are others

    run.run(8, one)
    assert run.torn == [5]
    assert run.good == [1, 2, 3, 4, 6, 7, 8]
    assert run.behind == (3 if trained else 6)


class Foreign:
    """An optimizer that torch knows nothing of."""

    def __init__(self, optimizer: Any) -> None:
        self.inner = optimizer

    def step(self) -> None:
        for group in self.inner.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad, alpha=-0.1)

    def zero_grad(self) -> None:
        self.inner.zero_grad()


def test_foreign_optimizers_never_pass_the_fence(tmp_path: Path) -> None:
    model = net()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    run = Run(tmp_path, model=model, optimizer=inner)
    run.run(5, lambda _: train(model, Foreign(inner)))
    assert run.good == list(range(1, 6))
    assert run.behind == 0


def test_optimizers_inside_the_backward_pass(tmp_path: Path) -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward

    model, head = net(), nn.Linear(1, 1)
    _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})
    optimizer = AdamW(head.parameters())
    run = Run(tmp_path, model=model, head=head, optimizer=optimizer)
    run.run(6, lambda _: train(nn.Sequential(model, head), optimizer))
    assert run.good == list(range(1, 7))


def test_a_scaler_that_skips_steps(tmp_path: Path) -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    scaler = torch.amp.GradScaler("cpu")
    run = Run(tmp_path, model=model, optimizer=optimizer, scaler=scaler)

    def one(step: int) -> None:
        optimizer.zero_grad()
        loss = scaler.scale(model(torch.randn(16, 8)).pow(2).mean())
        (loss * float("inf") if step % 3 == 2 else loss).backward()
        scaler.step(optimizer)
        scaler.update()

    run.run(9, one)
    assert run.good == list(range(1, 10))
    assert run.behind > 0


def test_lbfgs(tmp_path: Path) -> None:
    model = nn.Linear(8, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    run = Run(tmp_path, model=model, optimizer=optimizer)
    data = torch.randn(16, 8)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(data).sub(1).pow(2).mean()
        loss.backward()
        return loss

    run.run(6, lambda _: optimizer.step(closure))
    assert run.good == list(range(1, 7))


def test_parameters_added_and_moved(tmp_path: Path) -> None:
    model, late = net(), nn.Linear(WIDTH, WIDTH)
    optimizer = AdamW(model.parameters())
    run = Run(tmp_path, model=model, late=late, optimizer=optimizer)

    def one(step: int) -> None:
        train(model, optimizer)
        if step == 4:
            optimizer.add_param_group({"params": list(late.parameters())})
        if step == 7:
            model[3].weight.data = model[3].weight.data.clone()
        if step == 9:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    run.run(12, one)
    # a tensor put elsewhere is noticed too late once, and from then on at once
    assert run.stale == [8]
    assert run.good == [step for step in range(1, 13) if step not in run.stale]
    assert run.behind > 5


def test_compiled_steps(tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = Run(tmp_path, model=model, optimizer=optimizer)

    @torch.compile(backend="eager")
    def whole(batch: torch.Tensor) -> None:
        optimizer.zero_grad()
        model(batch).pow(2).mean().backward()
        optimizer.step()

    run.run(6, lambda _: whole(torch.randn(16, 8)))
    assert run.good == list(range(1, 7))


# ---------------------------------------------------------------- looks that are put off


def hooked(model: nn.Module) -> None:
    def scaled(_module: nn.Module, state: dict[str, Any], prefix: str, _local: Any) -> None:
        state[f"{prefix}3.bias"] = state[f"{prefix}3.bias"] * 0 + 7

    model._register_state_dict_hook(scaled)


def replaced(optimizer: torch.optim.Optimizer) -> None:
    state = next(iter(optimizer.state.values()))
    state["exp_avg"] = state["exp_avg"].clone()


@pytest.mark.parametrize("change", ["a hook", "another tensor"])
def test_what_changes_the_state_dict_is_noticed_behind_the_step(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    run = Run(tmp_path, model=model, optimizer=optimizer)

    def one(step: int) -> None:
        train(model, optimizer)
        if step == 5:
            hooked(model) if change == "a hook" else replaced(optimizer)

    run.run(9, one)
    assert run.stale == [6]
    assert run.good == [1, 2, 3, 4, 5, 7, 8, 9]
    assert not run.torn
    assert not capsys.readouterr().err


def test_a_slot_that_was_taken_away_is_noticed_behind_the_step(tmp_path: Path) -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    run = Run(tmp_path, model=model, optimizer=optimizer)

    def one(step: int) -> None:
        train(model, optimizer)
        if step == 5:
            (tmp_path / "0" / "__0_0.distcp").unlink()

    run.run(9, one)
    assert run.stale == [6]
    assert run.good == [1, 2, 3, 4, 5, 7, 8, 9]
