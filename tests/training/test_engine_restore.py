"""Restoring by copying out of the file: the same bits as the stock way, for whatever is stored."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from supervisor.errors import CheckpointError
from supervisor.training import direct
from supervisor.training.direct import DirectReader
from supervisor.training.reader import Stored, read_metadata
from tests.training.test_engine import DTYPES, SHAPES, Engine, engine, filled, odd_tensors, raw

__all__ = ["engine"]


def restore(directory: Path, targets: dict[str, Any]) -> int:
    """Load into the targets; how many tensors were not unpickled."""
    reader = DirectReader(directory, read_metadata(directory))
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    dcp_load(targets, storage_reader=reader, planner=planner, no_dist=True)
    return reader.copied


def test_every_dtype_and_shape(engine: Engine, tmp_path: Path) -> None:
    values = {f"{d}-{s}": filled(s, d, 1) for d in DTYPES for s in SHAPES}
    engine.write(tmp_path, values)
    targets = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in values.items()}
    copied = restore(tmp_path, targets)
    assert copied == sum(value.numel() > 0 for value in values.values())
    for key, value in values.items():
        assert raw(targets[key]) == raw(value), key


def test_odd_tensors_and_odd_targets(engine: Engine, tmp_path: Path) -> None:
    values = odd_tensors(1)
    engine.write(tmp_path, values)
    targets = {key: torch.zeros_like(value.detach()) for key, value in values.items()}
    targets["transposed"] = torch.zeros(64, 48).t()
    targets["slice"] = torch.zeros(4, 96)[::2, ::2]
    restore(tmp_path, targets)
    for key, value in values.items():
        assert raw(targets[key]) == raw(value.detach()), key


def test_a_checkpoint_of_stock_dcp(tmp_path: Path) -> None:
    values = {"a": torch.randn(300, 7), "t": torch.randn(5, 4).t(), "n": {"b": torch.ones(3)}, "x": 4}
    dcp.save(values, checkpoint_id=tmp_path)
    targets = {"a": torch.zeros(300, 7), "t": torch.zeros(4, 5), "n.b": torch.zeros(3), "x": 0}
    restore(tmp_path, targets)
    assert torch.equal(targets["a"], values["a"])
    assert torch.equal(targets["t"], values["t"])
    assert torch.equal(targets["n.b"], torch.ones(3))
    assert targets["x"] == 4


@pytest.mark.parametrize("where", ["head", "payload"])
def test_other_bytes_before_the_data_go_the_stock_way(where: str, engine: Engine, tmp_path: Path) -> None:
    engine.write(tmp_path, {"a": torch.ones(1000)})
    info = next(iter(read_metadata(tmp_path).storage_data.values()))
    data = bytearray((tmp_path / "__0_0.distcp").read_bytes())
    archive = direct.tensor_archive((1000,), torch.float32)
    position = info.offset + (len(archive.head) - 20 if where == "head" else len(archive.head))
    data[position] ^= 1
    (tmp_path / "__0_0.distcp").write_bytes(data)
    target = torch.zeros(1000)
    try:
        copied = restore(tmp_path, {"a": target})
    except Exception:
        copied = 0
    assert copied == (where == "payload")  # digests are for the payload


def test_large_ones_in_pieces(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_PIECE", 10_000)
    values = {str(size): torch.randn(size) for size in (1, 2499, 2500, 2501, 70_000)}
    engine.write(tmp_path, values)
    targets = {key: torch.zeros_like(value) for key, value in values.items()}
    assert restore(tmp_path, targets) == 5
    assert all(torch.equal(targets[key], value) for key, value in values.items())


def test_parts_and_other_dtypes(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_AT_ONCE", 30_000)
    values = {str(number): torch.randn(100, 40) for number in range(5)}
    engine.write(tmp_path, values)
    targets: dict[str, Any] = {key: torch.zeros(40, 100).t() for key in values}
    targets["3"] = torch.zeros(100, 40, dtype=torch.float64)
    targets["4"] = torch.zeros(100, 40)
    assert restore(tmp_path, targets) == 5
    assert all(torch.equal(targets[key].float(), value) for key, value in values.items())


def test_planned_only_where_it_must_be(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: dict[str, Any] = {str(number): torch.randn(50, 30) for number in range(4)}
    values |= {"large": torch.randn(3_000_000), "empty": torch.empty(0, 3), "object": {"a": 1}}
    engine.write(tmp_path, values)
    planned: list[str] = []
    plan = Stored._read_planned

    def noted(self: Stored, wanted: dict[str, Any], reader: DirectReader) -> None:
        planned.extend(wanted)
        plan(self, wanted, reader)

    monkeypatch.setattr(Stored, "_read_planned", noted)
    targets = {key: torch.zeros_like(value) for key, value in values.items() if key != "object"}
    targets["1"] = torch.zeros(30, 50).t()
    targets["2"] = torch.zeros(50, 30, dtype=torch.float64)
    stored = Stored(tmp_path, 0)
    stored.load(targets)
    assert sorted(planned) == ["1", "2", "empty"]
    assert all(torch.equal(target.float(), values[key]) for key, target in targets.items())
    assert stored.objects(["object"]) == {"object": {"a": 1}}


def test_a_file_that_is_too_short_is_damaged(engine: Engine, tmp_path: Path) -> None:
    engine.write(tmp_path, {"a": torch.ones(1000)})
    stored = Stored(tmp_path, 0)
    os.truncate(tmp_path / "__0_0.distcp", 3000)
    with pytest.raises(CheckpointError, match="shorter"):
        stored.load({"a": torch.zeros(1000)})
