"""The engine's files are stock DCP's, bit for bit, snapshot after snapshot; and it lays out anew when it must."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from supervisor.checkpoint.slots import SlotRecord, read_slot, write_slot
from supervisor.errors import CheckpointError, StorageError
from supervisor.training import planning
from supervisor.training.engine import ArenaWriter, Way
from supervisor.training.items import Items, Owner
from supervisor.training.reader import read_metadata
from supervisor.training.world import World
from supervisor.training.writer import Written

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.int32,
    torch.int64, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64, torch.complex128,
    torch.complex32, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip
SHAPES = [(3, 5), (), (0,), (4, 0, 3), (70_000,), (7, 11, 13)]


class Engine:
    """An engine of one rank, and what it wrote."""

    def __init__(self) -> None:
        self.step = 0
        self.writer = ArenaWriter(World(), cleans=True, completed=lambda: self.step)
        self.outcomes: list[Written | StorageError | None] = []

    def write(self, directory: Path, values: dict[str, Any]) -> Written:
        def gather() -> Items:
            items = Items(0)
            for key, value in values.items():
                items.add((key,), value, Owner(0))
            return items

        self.writer.write(directory, gather, self.outcomes.append)
        outcome = self.outcomes[-1]
        if isinstance(outcome, StorageError):
            raise outcome
        assert outcome is not None
        return outcome

    @property
    def layout(self) -> object:
        return self.writer._layout


@pytest.fixture
def engine() -> Iterator[Engine]:
    torch.set_num_threads(1)
    engine = Engine()
    yield engine
    engine.writer.close()


def raw(tensor: torch.Tensor) -> bytes:
    tensor = tensor.resolve_conj().resolve_neg().contiguous()
    return bytes(tensor.reshape(-1).view(torch.uint8).tolist())


def read(directory: Path) -> dict[str, Any]:
    return _load_state_dict_from_keys(checkpoint_id=directory)


def filled(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    noise = torch.randint(
        0, 2 if dtype == torch.bool else 256, (count,), generator=generator, dtype=torch.uint8
    )
    return noise.view(dtype).view(shape)


def test_every_dtype_and_shape_bit_for_bit(engine: Engine, tmp_path: Path) -> None:
    for seed in range(3):  # the layout, a copy to a new slot, a copy over the old one
        values = {f"{d}-{s}": filled(s, d, seed) for d in DTYPES for s in SHAPES}
        layout = engine.layout
        engine.write(tmp_path / str(seed % 2), values)
        assert layout is None or engine.layout is layout
        found = read(tmp_path / str(seed % 2))
        assert found.keys() == values.keys()
        for key, value in values.items():
            assert found[key].dtype == value.dtype
            assert found[key].shape == value.shape
            assert raw(found[key]) == raw(value), key


def test_files_say_of_which_step_and_layout_they_are(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(step: int) -> SlotRecord:
        return SlotRecord(step=step, attempt=0, world_size=1, created=1.0)

    values = {"weight": torch.ones(300), "seen": 1}
    for engine.step, slot in ((3, "0"), (4, "1"), (5, "0")):  # laid out, laid out again, written over
        engine.write(tmp_path / slot, values)
        assert write_slot(tmp_path / slot, record(engine.step)).layout
        with pytest.raises(CheckpointError, match=f"is of step {engine.step}, not 9"):
            write_slot(tmp_path / slot, record(9))
    others = {"weighs": torch.ones(300), "seen": 1}  # of the same sizes
    engine.write(tmp_path / "2", others)
    assert read_slot(tmp_path / "1") is not None
    shutil.copy(tmp_path / "2" / ".metadata", tmp_path / "1")
    shutil.copy(tmp_path / "2" / "__0_0.distcp", tmp_path / "0")
    for slot in ("0", "1"):
        with pytest.raises(CheckpointError, match=r"__0_0\.distcp: is of another layout"):
            read_metadata(tmp_path / slot)

    def dies(*_: object) -> None:
        raise OSError("in the middle")

    monkeypatch.setattr("supervisor.training.moves.Moves.run", dies)
    with pytest.raises(OSError, match="in the middle"):
        engine.write(tmp_path / "2", others)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: was not written to its end"):
        write_slot(tmp_path / "2", record(engine.step))
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: was not written to its end"):
        read_metadata(tmp_path / "2")


def odd_tensors(seed: int) -> dict[str, torch.Tensor]:
    base = filled((64, 48), torch.float32, seed).nan_to_num(1.0)
    complex_base = torch.randn(6, 4, dtype=torch.complex64)
    shared = torch.randn(1000)
    return {
        "transposed": base.t(),
        "strided": base[::2, 1::3],
        "slice": base[3:5],
        "expanded": torch.randn(1, 4).expand(3, 4),
        "part of a storage": shared[10:20],
        "shared": shared,
        "conjugate": complex_base.conj(),
        "negative": complex_base.conj().imag,
        "float8 transposed": base.to(torch.float8_e4m3fn).t(),
        "uint16 strided": torch.arange(99).to(torch.uint16)[::2],
        "odd offset": torch.arange(99, dtype=torch.uint8)[3:],
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "with grad": torch.randn(3, requires_grad=True),
        "channels last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    }


def test_odd_tensors(engine: Engine, tmp_path: Path) -> None:
    for seed in range(3):
        values = odd_tensors(seed)
        engine.write(tmp_path / str(seed % 2), values)
        found = read(tmp_path / str(seed % 2))
        for key, value in values.items():
            assert raw(found[key]) == raw(value.detach()), key


def test_a_stock_load_in_place(engine: Engine, tmp_path: Path) -> None:
    for seed in range(2):
        values = {"a": torch.randn(300, 300), "b": {"x": [1, (2, "three")], "n": seed}}
        engine.write(tmp_path, values)
        target = {"a": torch.zeros(300, 300), "b": None}
        dcp.load(target, checkpoint_id=tmp_path)
        assert torch.equal(target["a"], values["a"])
        assert target["b"] == values["b"]


def test_blobs_of_any_length(engine: Engine, tmp_path: Path) -> None:
    blobs: list[Any] = [
        {"a": 1}, {}, list(range(100)), "x" * 5000, "", OrderedDict(a=torch.arange(3)), {"t": torch.randn(100), "u": torch.ones(1)},
        None, 1.5, -0.0, 0.0, True, 1, b"\0" * 900, ["x"] * 100_000, 3,
    ]  # fmt: skip
    for number, value in enumerate(blobs):
        engine.write(tmp_path / str(number % 3), {"blob": value, "tensor": torch.tensor([number])})
        found = read(tmp_path / str(number % 3))
        assert repr(found["blob"]) == repr(value)
        assert type(found["blob"]) is type(value)
        assert found["tensor"].item() == number


def test_a_blob_may_shrink_and_grow_without_a_new_layout(engine: Engine, tmp_path: Path) -> None:
    engine.write(tmp_path, {"blob": "x" * 400_000})
    layout = engine.layout
    for length in (1, 300_000, 500_000, 0):
        engine.write(tmp_path, {"blob": "y" * length})
        assert engine.layout is layout
        assert read(tmp_path)["blob"] == "y" * length
    engine.write(tmp_path, {"blob": "z" * 900_000})
    assert engine.layout is not layout
    assert read(tmp_path)["blob"] == "z" * 900_000


CHANGES: dict[str, dict[str, Any]] = {
    "another key": {"a": torch.ones(4), "c": torch.ones(4)},
    "one more": {"a": torch.ones(4), "b": torch.ones(4), "c": torch.ones(4)},
    "one less": {"a": torch.ones(4)},
    "another shape": {"a": torch.ones(2, 2), "b": torch.ones(4)},
    "another dtype": {"a": torch.ones(4, dtype=torch.int32), "b": torch.ones(4)},
    "no tensor any more": {"a": torch.ones(4), "b": 7},
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_lay_out_anew(name: str, engine: Engine, tmp_path: Path) -> None:
    values: dict[str, Any] = {"a": torch.zeros(4), "b": torch.zeros(4)}
    engine.write(tmp_path / "0", values)
    layout = engine.layout
    for slot, state in (
        ("1", values),
        ("0", CHANGES[name]),
        ("1", CHANGES[name]),
        ("1", values),
        ("0", values),
    ):
        engine.write(tmp_path / slot, state)
        assert (engine.layout is layout) == (slot == "1" and state is values and layout is engine.layout)
        found = read(tmp_path / slot)
        assert found.keys() == state.keys()
        assert all(torch.equal(torch.as_tensor(found[key]), torch.as_tensor(state[key])) for key in state)


def test_tensors_may_move(engine: Engine, tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(300, 300))
    values = {"p": parameter, "q": torch.ones(3)}
    engine.write(tmp_path, values)
    layout = engine.layout
    parameter.data = torch.full((300, 300), 2.0)
    values["q"] = torch.full((3,), 5.0)
    engine.write(tmp_path, values)
    assert engine.layout is layout
    assert torch.equal(read(tmp_path)["p"], parameter)
    assert read(tmp_path)["q"].tolist() == [5.0] * 3
    parameter.data = parameter.data.t()  # the same memory, in another order
    with torch.no_grad():
        parameter[0] = 3
    engine.write(tmp_path, values)
    assert torch.equal(read(tmp_path)["p"], parameter)
    parameter.data = torch.ones(7)
    engine.write(tmp_path, values)
    assert engine.layout is not layout
    assert torch.equal(read(tmp_path)["p"], parameter)


def test_files_are_written_in_place(engine: Engine, tmp_path: Path) -> None:
    values = {"a": torch.randn(1000), "b": 3}
    engine.write(tmp_path, values)
    before = (tmp_path / "__0_0.distcp").stat()
    engine.write(tmp_path, {"a": torch.randn(1000), "b": 4})
    after = (tmp_path / "__0_0.distcp").stat()
    assert (before.st_ino, before.st_size, before.st_blocks) == (after.st_ino, after.st_size, after.st_blocks)


def test_what_others_left_in_the_slot_goes(engine: Engine, tmp_path: Path) -> None:
    values = {"a": torch.randn(1000)}
    for slot in ("0", "1", "0"):
        (tmp_path / slot).mkdir(exist_ok=True)
        for name in ("__0_0.distcp", "__0_1.distcp", "__7_0.distcp", "slot.json"):
            if slot != "0" or not (tmp_path / slot / ".metadata").exists():
                (tmp_path / slot / name).write_bytes(b"x" * 100_000)
        engine.write(tmp_path / slot, values)
        assert sorted(path.name for path in (tmp_path / slot).iterdir()) == [".metadata", "__0_0.distcp"]
        assert torch.equal(read(tmp_path / slot)["a"], values["a"])


def test_a_slot_that_was_removed_is_laid_out_again(engine: Engine, tmp_path: Path) -> None:
    values = {"a": torch.randn(1000)}
    engine.write(tmp_path / "0", values)
    (tmp_path / "0" / "__0_0.distcp").unlink()
    engine.write(tmp_path / "0", values)
    assert torch.equal(read(tmp_path / "0")["a"], values["a"])


def test_a_failure_is_said_and_the_next_snapshot_is_whole(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="rank 0: NotADirectoryError"):
        engine.write(tmp_path / "file" / "0", {"a": torch.ones(3)})
    engine.write(tmp_path / "0", {"a": torch.ones(3)})
    with pytest.raises(StorageError, match="rank 0: .*Error"):
        engine.write(tmp_path / "file" / "0", {"a": torch.ones(3)})
    with pytest.raises(StorageError, match="pickle"):
        engine.write(tmp_path / "0", {"a": lambda: 0})
    engine.write(tmp_path / "0", {"a": torch.ones(3)})
    assert read(tmp_path / "0")["a"].tolist() == [1, 1, 1]


def test_a_torch_whose_archives_are_others(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "tensor_archive", lambda shape, dtype: None)
    for seed in range(3):
        values = {str(dtype): filled((300, 7), dtype, seed) for dtype in DTYPES}
        engine.write(tmp_path / str(seed % 2), values)
        found = read(tmp_path / str(seed % 2))
        assert all(raw(found[key]) == raw(value) for key, value in values.items())


def test_a_layout_that_others_could_not_take_over_is_not_half_used(engine: Engine, tmp_path: Path) -> None:
    values = {"a": torch.ones(3), "b": torch.ones(4)}
    engine.write(tmp_path, values)
    values = {"a": torch.full((3,), 2.0), "b": torch.ones(5)}
    largest = engine.writer._world.largest
    engine.writer._world.largest = lambda ways: [max(ways[0], Way.FAIL), 0]  # type: ignore[method-assign]
    engine.writer._world.gather = lambda value: [value, (False, "rank 1: no")]  # type: ignore[method-assign]
    with pytest.raises(StorageError, match="rank 1"):
        engine.write(tmp_path, values)
    engine.writer._world.largest = largest  # type: ignore[method-assign]
    engine.write(tmp_path, values)
    found = read(tmp_path)
    assert found["a"].tolist() == [2.0] * 3
    assert found["b"].tolist() == [1.0] * 5
