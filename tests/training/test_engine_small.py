"""Thousands of small tensors, weights that never change, tensors that always move: cheap, and still to the bit."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from supervisor.training import moves
from supervisor.training.layout import OutgrownError, PlainBlobs, blob, is_plain, new_blob, pickled
from supervisor.training.memory import Places
from tests.training.overlapping import AdamW, Run, net, one_thread, train
from tests.training.test_engine import Engine, engine

__all__ = ["engine", "one_thread"]

FROZEN = "__0_1.distcp"


def many() -> nn.Module:
    torch.manual_seed(1)
    layers: list[nn.Module] = [nn.Linear(8, 24)]
    for width in (
        24,
        40,
        130,
        24,
    ) * 20:  # matrices of 4 to 70 kB: tiny, small and large ones, with buffers between
        layers += [nn.Linear(layers[-1].out_features, width), nn.BatchNorm1d(width), nn.Linear(width, 24)]
    return nn.Sequential(*layers, nn.Linear(24, 130), nn.Linear(130, 140), nn.Linear(140, 1))


@pytest.mark.parametrize("refused", [False, True], ids=["gathered", "refused"])
def test_many_small_ones(refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    gather = moves._pwritev

    def counted(fd: int, address: int, count: int, offset: int) -> int:
        rows.append(count)
        return -1 if refused else int(gather(fd, address, count, offset))

    monkeypatch.setattr(moves, "_pwritev", counted)
    model = many()
    optimizer = AdamW(model.parameters())
    run = Run(tmp_path, model=model, optimizer=optimizer)
    run.run(6, lambda _: train(model, optimizer))
    assert run.good == list(range(1, 7))
    assert run.behind == 4
    assert max(rows) > 1000


def test_an_archive_is_laid_out_without_its_data() -> None:
    """Also where torch fills memory that nobody has written yet: it would be touched for each shape."""
    code = (
        "import resource, torch; from supervisor.training.layout import tensor_archive\n"
        "torch.use_deterministic_algorithms(True)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "archive = tensor_archive((1 << 28,), torch.float32)\n"
        "print(archive.payload, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    payload, touched = map(int, told.stdout.split())
    assert payload == 1 << 30
    assert touched < 100  # MB


def test_all_of_them_tiny(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(20)), nn.Linear(8, 1))
    optimizer = AdamW(model.parameters())
    run = Run(tmp_path, model=model, optimizer=optimizer)
    run.run(5, lambda _: train(model, optimizer))
    assert run.good == list(range(1, 6))
    assert run.behind == 3
    assert run.hasty == 2  # once all slots are laid out


def test_tensors_that_always_move_cost_the_others_nothing(engine: Engine, tmp_path: Path) -> None:
    values: dict[str, Any] = {"a": torch.ones(3), "b": torch.ones(20_000)}
    engine.write(tmp_path / "0", values)
    for number in range(9):
        values["a"] = torch.full((3,), float(number))
        values["b"].fill_(number)
        engine.write(tmp_path / "0", values)
        found = _load_state_dict_from_keys(checkpoint_id=tmp_path / "0")
        assert found["a"].tolist() == [float(number)] * 3
        assert torch.equal(found["b"], values["b"])
    assert engine.writer._bindings is not None
    assert engine.writer._bindings.generation == 3


def test_a_parameter_that_moves_at_every_step(tmp_path: Path) -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    run = Run(tmp_path, model=model, optimizer=optimizer)

    def one(_: int) -> None:
        train(model, optimizer)
        model[3].weight.data = model[3].weight.data.clone()

    run.run(9, one)
    assert run.stale == [4]  # from then on every look is taken at once
    assert run.good == [step for step in range(1, 10) if step != 4]


def test_tensors_put_elsewhere_are_seen() -> None:
    for change in (
        lambda t: setattr(t, "data", t.data.clone()),
        lambda t: setattr(t, "data", t.data.view(3, 4)),
        lambda t: setattr(t, "data", t.data.t()),
        lambda t: t.resize_(2, 6),
    ):
        tensors = [torch.zeros(4, 3) for _ in range(1500)]
        places = Places(tensors)
        assert places.are_same()
        change(tensors[1400])
        assert not places.are_same()


def test_a_parameter_in_anothers_place_is_seen(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = Run(tmp_path, model=model, optimizer=optimizer)

    def one(step: int) -> None:
        train(model, optimizer)
        if step == 3:
            model[3].bias = nn.Parameter(torch.full((300,), 7.0))
            optimizer.param_groups[0]["params"] = list(model.parameters())
        if step == 5:
            model[1].register_buffer("late", torch.ones(3))

    run.run(8, one)
    assert run.good == list(range(1, 9))


# ---------------------------------------------------------------- what does not change


def frozen(trained: bool) -> nn.Module:
    model = net()
    for parameter in model[3].parameters():
        parameter.requires_grad_(trained)
    return model


def test_frozen_weights_have_a_file_that_stays_the_same(tmp_path: Path) -> None:
    model = frozen(False)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad])
    run = Run(tmp_path, model=model, optimizer=optimizer)
    contents = []
    for _ in range(4):
        run.run(1, lambda _: train(model, optimizer))
        contents.append((tmp_path / str(run.step % 3) / FROZEN).read_bytes())
    assert run.good == [1, 2, 3, 4]
    assert len(set(contents)) == 1
    assert len(contents[0]) > 300 * 300 * 4
    with torch.no_grad():
        model[3].weight[5] = 7.0  # after all
    run.run(1, lambda _: train(model, optimizer))
    assert run.good == [1, 2, 3, 4, 5]
    assert (tmp_path / str(run.step % 3) / FROZEN).read_bytes() != contents[0]


def test_averages_are_not_frozen(tmp_path: Path) -> None:
    model = net()
    average = torch.optim.swa_utils.AveragedModel(model)
    average.requires_grad_(False)
    optimizer = AdamW(model.parameters())
    run = Run(tmp_path, model=model, average=average, optimizer=optimizer)
    run.run(4, lambda _: (train(model, optimizer), average.update_parameters(model)))
    assert run.good == [1, 2, 3, 4]
    assert not (tmp_path / "1" / FROZEN).exists()


def test_a_file_for_what_is_frozen_goes_with_it(tmp_path: Path) -> None:
    def fill_slots(model: nn.Module) -> None:
        optimizer = AdamW([p for p in model.parameters() if p.requires_grad])
        run = Run(tmp_path, model=model, optimizer=optimizer)
        run.run(3, lambda _: train(model, optimizer))
        run.writer.close()
        assert run.good == [1, 2, 3]

    for trained in (False, True):
        fill_slots(frozen(trained))
        assert all((tmp_path / slot / FROZEN).exists() == (not trained) for slot in "012")


# ---------------------------------------------------------------- plain values


def test_plain_values_are_archived_as_torch_does() -> None:
    first: Any = {"step": 1, "state": b"\0\xff" * 2000, "names": ["x", ("y", 2.5, None)]}
    data, room = new_blob(first)
    plain = PlainBlobs(room, data, pickled(first))
    for value in (first, {**first, "step": 10**12}, {}, "é" * 100, [True, -0.0, 1j]):
        assert is_plain(value)
        archive = plain.archive(pickled(value))
        assert len(archive) == len(blob(value, room)) == room.length
        assert repr(torch.load(io.BytesIO(archive))) == repr(value)
        assert zipfile.ZipFile(io.BytesIO(archive)).testzip() is None
    with pytest.raises(OutgrownError):
        plain.archive(pickled("x" * room.pickle))
    for value in (torch.ones(1), [torch.ones(1)], {"a": object()}, type("Sub", (int,), {})(3)):
        assert not is_plain(value)
