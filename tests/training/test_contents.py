"""Looking into checkpoints: what is read is what was saved, compared and exported bit for bit, in bounded memory."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp

from supervisor.checkpoint.commit import seal
from supervisor.checkpoint.manifest import Key
from supervisor.errors import CheckpointError, UsageError
from supervisor.training import Session
from supervisor.training.contents.compare import Change, compare
from supervisor.training.contents.export import export, parse_size
from supervisor.training.contents.opened import Contents, UnsafeError
from supervisor.training.contents.selection import weights
from tests.checkpoint.tools import flip_bit, origin
from tests.training.harness import launch
from tests.training.programs import shards

ROOT = Path(__file__).parents[2]
DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
    torch.bool, torch.complex64,
]  # fmt: skip


def stock(directory: Path, state: dict[str, Any]) -> Path:
    """A checkpoint that torch has written without us."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=directory, no_dist=True)
    return directory


def every_kind() -> dict[str, Tensor]:
    bits = torch.arange(240, dtype=torch.uint8)
    tensors = {
        str(dtype).removeprefix("torch."): bits.view(dtype).clone() for dtype in DTYPES if dtype != torch.bool
    }
    return tensors | {
        "bool": bits % 3 == 0,
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "transposed": torch.arange(12.0).reshape(3, 4).t(),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "view": torch.arange(1000.0)[100:200:7],
        "one row": torch.randn(1, 1, 4_500_000),  # several blocks
        "nan": torch.tensor([math.nan, math.inf, -0.0]),
    }


def same(a: Tensor, b: Tensor) -> bool:
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
    )


def changes(a: Path, b: Path) -> dict[str, Change]:
    with Contents(a) as left, Contents(b) as right:
        found = compare(left, right, list(left.items.values()), list(right.items.values()))
        return {change.key: change for change in found}


def test_every_kind_of_tensor_is_read_as_it_was_saved(tmp_path: Path) -> None:
    state = every_kind()
    with Contents(stock(tmp_path / "c", state)) as contents:
        assert contents.manifest is None
        assert contents.items.keys() == state.keys()
        for name, tensor in state.items():
            assert contents.items[name].shape == tensor.shape
            assert same(contents.tensor(contents.items[name]), tensor), name
            assert sum(len(block) for block in contents.blocks(contents.items[name])) == tensor.numel()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seeds 0 and 1, by two ranks."""
    root = tmp_path_factory.mktemp("sharded")
    for seed in (0, 1):
        launch(shards.save, 2, root / str(seed), seed)
    return root


def test_shards_are_put_together(sharded: Path) -> None:
    with Contents(sharded / "0") as contents:
        for name, tensor in shards.whole(0).items():
            item = contents.items[f"model.{name}"]
            assert item.parts == (1 if name == "copies" else 2), name
            assert same(contents.tensor(item), tensor), name


def test_what_is_replicated_is_stored_once(tmp_path: Path) -> None:
    state = launch(shards.train_replicated, 3, tmp_path)[0]
    checkpoint = tmp_path / "checkpoints" / "step-000000001"
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    assert state < size < 1.1 * state, "three ranks, one copy, and a few small values of each rank"
    with Contents(checkpoint) as contents:
        assert {item.parts for item in contents.items.values()} == {1}


def test_differently_sharded_ones_are_compared(sharded: Path, tmp_path: Path) -> None:
    one, other = shards.whole(0), shards.whole(1)
    stock(tmp_path / "a", {"model": one})
    assert {change.kind for change in changes(sharded / "0", tmp_path / "a").values()} == {"same"}
    for key, change in changes(tmp_path / "a", sharded / "1").items():
        a, b = one[key[6:]].double(), other[key[6:]].double()
        assert change.kind == "changed"
        assert change.norm_a == pytest.approx(a.norm().item())
        assert change.norm_b == pytest.approx(b.norm().item())
        assert change.relative == pytest.approx(((b - a).norm() / a.norm()).item())
        assert change.largest == pytest.approx((b - a).abs().max().item())
        assert change.elements == a.numel()


def test_every_kind_of_change_is_told(tmp_path: Path) -> None:
    a = {"same": torch.ones(3), "nan": torch.tensor(math.nan), "gone": torch.ones(4), "moved": torch.zeros(5),
         "shape": torch.ones(2, 3), "dtype": torch.ones(2), "kind": torch.ones(1), "lr": 0.1, "text": "x", "c": torch.ones(2) * 1j}  # fmt: skip
    b = {**a, "moved": torch.tensor([0.0, 0, 0, 0, 2]), "shape": torch.ones(3, 2), "dtype": torch.ones(2).double(),
         "kind": "text", "lr": 0.2, "new": torch.full((4,), 3.0), "c": torch.ones(2)}  # fmt: skip
    del b["gone"]
    found = changes(stock(tmp_path / "a", a), stock(tmp_path / "b", b))
    assert {key: str(change.kind) for key, change in found.items()} == {
        "c": "retyped", "dtype": "retyped", "gone": "missing", "kind": "retyped", "lr": "changed", "moved": "changed",
        "nan": "same", "same": "same", "shape": "reshaped", "text": "same", "new": "new",
    }  # fmt: skip
    assert (found["moved"].relative, found["moved"].largest, found["moved"].elements) == (None, 2.0, 1)
    assert (found["lr"].value_a, found["lr"].value_b) == ("0.1", "0.2")
    assert (found["dtype"].relative, found["dtype"].elements) == (0.0, 0)
    assert (found["new"].norm_b, found["gone"].norm_a) == (6.0, 2.0)
    assert found["c"].difference == pytest.approx(2.0)  # |1 - i| twice


# --------------------------------------------------------------------------- export


def exported(checkpoint: Path, target: Path, **options: Any) -> Any:
    with Contents(checkpoint) as contents:
        return export(contents, target, **{"weights_only": False, **options})


def test_safetensors_holds_every_kind_bit_for_bit(tmp_path: Path) -> None:
    state = every_kind()
    done = exported(stock(tmp_path / "c", {**state, "n": 5}), tmp_path / "x.safetensors")
    loaded = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == state.keys()
    assert all(same(loaded[name], tensor) for name, tensor in state.items())
    assert (done.tensors, done.objects, done.bytes) == (
        len(state),
        ["n"],
        sum(t.nbytes for t in state.values()),
    )
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_safetensors_cannot_hold_is_named(tmp_path: Path) -> None:
    stock(tmp_path / "c", {"z": torch.ones(2, dtype=torch.complex128)})
    with pytest.raises(CheckpointError, match=r"no torch.complex128, which 'z' is: export to .pt"):
        exported(tmp_path / "c", tmp_path / "x.safetensors")
    exported(tmp_path / "c", tmp_path / "x.pt")
    assert same(torch.load(tmp_path / "x.pt")["z"], torch.ones(2, dtype=torch.complex128))
    assert sorted(os.listdir(tmp_path)) == ["c", "x.pt"]


def test_shards_and_their_index(sharded: Path, tmp_path: Path) -> None:
    done = exported(sharded / "0", tmp_path / "model", weights_only=True, max_shard_size=1000)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    loaded: dict[str, Tensor] = {}
    for name in set(index["weight_map"].values()):
        shard = safetensors.torch.load_file(tmp_path / "model" / name)
        assert all(index["weight_map"][key] == name for key in shard)
        assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= 1000
        loaded |= shard
    expected = shards.whole(0)
    assert loaded.keys() == expected.keys() == index["weight_map"].keys()
    assert all(same(loaded[name], tensor) for name, tensor in expected.items())
    assert index["metadata"]["total_size"] == done.bytes == sum(tensor.nbytes for tensor in expected.values())
    assert {file.name for file in done.files} == set(os.listdir(tmp_path / "model"))
    exported(sharded / "0", tmp_path / "small", weights_only=True)
    assert os.listdir(tmp_path / "small") == ["model.safetensors"]


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, dict[str, nn.Module], torch.optim.Optimizer]:
    """A Session's checkpoint of two modules, an optimizer and plain values."""
    model, ema = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    with Session(dir=tmp_path / "job", model=model, ema=ema, optimizer=optimizer) as session:
        for _ in session.steps(1):
            session.state["seen"] = torch.arange(3)
            model(torch.randn(5, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return tmp_path / "job" / "checkpoints" / "step-000000001", {"model": model, "ema": ema}, optimizer


def test_sparse_buffers_are_exported_where_the_format_has_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.Linear(4, 3)
    model.register_buffer("adjacency", torch.eye(3).to_sparse())
    with Session(dir=tmp_path / "job", model=model) as session:
        for _ in session.steps(1):
            pass
    checkpoint = tmp_path / "job" / "checkpoints" / "step-000000001"
    exported(checkpoint, tmp_path / "model.pt", weights_only=True)
    loaded = torch.load(tmp_path / "model.pt")
    assert loaded.keys() == model.state_dict().keys()
    assert torch.equal(loaded["adjacency"].to_dense(), torch.eye(3))
    done = exported(checkpoint, tmp_path / "model.safetensors", weights_only=True)
    assert done.objects == ["model.adjacency"]


def test_weights_load_into_the_module(
    trained: tuple[Path, dict[str, nn.Module], torch.optim.Optimizer], tmp_path: Path
) -> None:
    checkpoint, modules, optimizer = trained
    exported(checkpoint, tmp_path / "model.pt", weights_only=True, only="model")
    fresh = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    fresh.load_state_dict(torch.load(tmp_path / "model.pt"))
    for key, value in modules["model"].state_dict().items():
        assert same(fresh.state_dict()[key], value)
    exported(checkpoint, tmp_path / "both.safetensors", weights_only=True)
    both = {f"{name}.{key}" for name, module in modules.items() for key in module.state_dict()}
    assert safetensors.torch.load_file(tmp_path / "both.safetensors").keys() == both
    exported(checkpoint, tmp_path / "all.pt")
    state = torch.load(tmp_path / "all.pt")
    assert state.keys() == {"model", "ema", "optimizer", "session.state", "session.state.seen"}
    assert same(
        state["optimizer"]["state"]["0.weight"]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"]
    )
    assert state["optimizer"]["param_groups"][0]["lr"] == 1e-3
    with Contents(checkpoint) as contents:
        assert contents.is_ours
        assert {item.path[0] for item in weights(contents)} == {"model", "ema"}


def test_the_only_module_s_prefix_goes(tmp_path: Path) -> None:
    state = {"app": {"net": {"a.w": torch.ones(2)}, "optim": {"state": {"a.w": {"exp_avg": torch.ones(2)}}}}}
    exported(stock(tmp_path / "c", state), tmp_path / "x.safetensors", weights_only=True)
    assert list(safetensors.torch.load_file(tmp_path / "x.safetensors")) == ["a.w"]
    exported(stock(tmp_path / "flat", {"a.w": torch.ones(2)}), tmp_path / "y.safetensors", weights_only=True)
    assert list(safetensors.torch.load_file(tmp_path / "y.safetensors")) == ["a.w"]


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "x"])
def test_a_target_is_complete_or_not_there(name: str, sharded: Path, tmp_path: Path) -> None:
    target = tmp_path / name
    if target.suffix:
        target.write_text("the former")
    with Contents(sharded / "0") as contents:
        next(iter(contents._metadata.storage_data.values())).offset += 1
        with pytest.raises(CheckpointError, match="cannot be read safely"):
            export(contents, target, weights_only=True)
    assert os.listdir(tmp_path) == ([name] if target.suffix else [])
    assert not target.suffix or target.read_text() == "the former"


def test_a_full_disk_leaves_nothing(sharded: Path, tmp_path: Path) -> None:
    script = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from supervisor.errors import StorageError\n"
        "from supervisor.training.contents.export import export\n"
        "from supervisor.training.contents.opened import Contents\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "with Contents(Path(sys.argv[1])) as contents:\n"
        "    try: export(contents, Path(sys.argv[2]), weights_only=True)\n"
        "    except StorageError as error: print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, sharded / "0", tmp_path / "x.safetensors"],
        capture_output=True, text=True, check=True, cwd=ROOT, timeout=60,
    )  # fmt: skip
    assert "x.safetensors failed: File too large; nothing of it is left" in run.stdout
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("2GiB", 2 << 30), ("300 kb", 300_000), ("7", 7), ("1.5M", 1_500_000)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1GB", "GB", "5XB", "5GBs"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)


# --------------------------------------------------------------------------- memory

PEAK = """
import resource, sys
from pathlib import Path
from supervisor.training.contents.compare import compare
from supervisor.training.contents.export import export
from supervisor.training.contents.opened import Contents
a, b, target = map(Path, sys.argv[1:])
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
with Contents(a) as left, Contents(b) as right:
    list(compare(left, right, list(left.items.values())[1:], list(right.items.values())[1:]))  # the small one: warm up
    before = peak()
    assert [change.elements for change in compare(left, right, *([c.items["big"]] for c in (left, right)))] == [1]
    export(left, target, weights_only=True)
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    size = 256 << 20
    big = torch.zeros(size // 4 // 4096, 4096)
    stock(tmp_path / "a", {"big": big, "small": torch.ones(4 << 20)})
    big[-1, -1] = 1
    stock(tmp_path / "b", {"big": big, "small": torch.zeros(4 << 20)})
    del big
    run = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "a", tmp_path / "b", tmp_path / "x.safetensors"],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < size / 4
    assert (tmp_path / "x.safetensors").stat().st_size > size


# --------------------------------------------------------------------------- what is refused


class Evil:
    """Makes a directory when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_nothing_from_a_checkpoint_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "owned"
    checkpoint = stock(tmp_path / "c", {"weight": torch.ones(2), "thing": Evil(mark)})
    with Contents(checkpoint) as contents:
        assert same(contents.tensor(contents.items["weight"]), torch.ones(2))
        with pytest.raises(UnsafeError, match=r"'thing' in .* cannot be read safely: it needs posix\.mkdir"):
            contents.object(contents.items["thing"])
        with pytest.raises(UnsafeError, match="--weights-only leaves it out"):
            export(contents, tmp_path / "x.pt", weights_only=False)
        export(contents, tmp_path / "x.pt", weights_only=True)
    assert changes(checkpoint, checkpoint)["thing"].kind == "same"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(CheckpointError, match="has no place in a checkpoint's metadata"):
        Contents(checkpoint)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "..", ".", "", "a/b", "\0", 7])
def test_a_path_that_leads_out_is_refused(name: object, tmp_path: Path) -> None:
    checkpoint = stock(tmp_path / "c", {"weight": torch.ones(2)})
    (tmp_path / "outside").write_bytes((checkpoint / "__0_0.distcp").read_bytes())
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = name
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    seal(checkpoint, origin(1))  # the manifest vouches for it, and yet
    with pytest.raises(CheckpointError, match="leads out of the checkpoint"):
        Contents(checkpoint)


def test_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    checkpoint = stock(tmp_path / "c", {"weight": torch.ones(2)})
    (checkpoint / "__0_0.distcp").rename(tmp_path / "elsewhere")
    (checkpoint / "__0_0.distcp").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError):
        Contents(checkpoint).tensor(Contents(checkpoint).items["weight"])


def test_an_index_that_does_not_add_up_is_refused(tmp_path: Path) -> None:
    checkpoint = stock(tmp_path / "c", {"weight": torch.ones(4)})
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    metadata.state_dict_metadata["weight"].size = torch.Size([8])
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="parts of 'weight' in the index do not make up the whole"):
        Contents(checkpoint)


def test_digests_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    checkpoint = stock(tmp_path / "step-000000001", {"weight": torch.ones(4)})
    seal(checkpoint, origin(1))
    exported(checkpoint, tmp_path / "x.pt")
    flip_bit(checkpoint / "__0_0.distcp", 900)
    with pytest.raises(CheckpointError, match="is damaged: __0_0.distcp: digest does not match"):
        exported(checkpoint, tmp_path / "y.pt")
    flip_bit(checkpoint / ".metadata", 9)
    with pytest.raises(CheckpointError, match=r"is damaged: \.metadata: digest does not match"):
        Contents(checkpoint)
    assert not (tmp_path / "y.pt").exists()


def test_with_a_key_what_has_no_manifest_of_it_is_refused(tmp_path: Path) -> None:
    checkpoint = stock(tmp_path / "step-000000001", {"weight": torch.ones(4)})
    key = Key.derive("ours")
    with pytest.raises(CheckpointError, match="cannot be authenticated: refused because EVERSTEP_KEY is set"):
        Contents(checkpoint, key)
    for other in (None, Key.derive("theirs")):
        seal(checkpoint, origin(1), key=other)
        with pytest.raises(CheckpointError, match="without a key|another key"):
            Contents(checkpoint, key)
    seal(checkpoint, origin(1), key=key)
    with pytest.raises(CheckpointError, match="set EVERSTEP_KEY to read it"):
        Contents(checkpoint)
    with Contents(checkpoint, key) as contents:
        export(contents, tmp_path / "x.safetensors", weights_only=True)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "step": "1", "run_id": "run-1"}
