"""What goes into a checkpoint comes out of it: one process, library mode."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from supervisor.errors import ConfigError, StateMismatchError, UsageError
from supervisor.training import Session

ROOT = str(Path(__file__).parent.parent.parent)

Tensor = torch.Tensor


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class Anything:
    """A Stateful of any state."""

    def __init__(self, state: Any = None) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def save(root: Path, step: int = 1, **objects: Any) -> dict[str, Any]:
    """Save the objects as they are; the session's values."""
    with Session(dir=root, checkpoint_every="never", **objects) as session:
        session.state["answer"] = {"a": [1, (2, 3)], 4: torch.arange(3)}
        for _ in session.steps(step):
            pass
    return session.state


def load(root: Path, **objects: Any) -> dict[str, Any]:
    """Load into the objects; the session's values."""
    with Session(dir=root, **objects) as session:
        assert session.resumed
    return session.state


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return (
            type(left) is type(right)
            and left.keys() == right.keys()
            and all(same(left[k], right[k]) for k in left)
        )
    if isinstance(left, (list, tuple)):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def train(modules: list[nn.Module], optimizers: list[torch.optim.Optimizer], steps: int = 2) -> None:
    for _ in range(steps):
        loss = sum(
            module(torch.randn(3, 4, dtype=next(module.parameters()).dtype)).pow(2).mean()
            for module in modules
        )
        loss.backward()  # type: ignore[union-attr]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
        lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), foreach=False, capturable=False),
        lambda p: torch.optim.Adafactor(p, lr=0.1),
        lambda p: torch.optim.Adagrad(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        lambda p: torch.optim.ASGD(p, lr=0.1),
    ],
    ids=["sgd", "momentum", "amsgrad", "tensor-lr", "adafactor", "adagrad", "fused", "asgd"],
)  # fmt: skip
def test_optimizers(make: Any, tmp_path: Path) -> None:
    old, new = nn.Linear(4, 4), nn.Linear(4, 4)
    first, second = make(old.parameters()), make(new.parameters())
    train([old], [first])
    save(tmp_path, model=old, optimizer=first)
    load(tmp_path, model=new, optimizer=second)
    assert same(dict(first.state_dict()), dict(second.state_dict()))
    assert same(dict(old.state_dict()), dict(new.state_dict()))


def test_lbfgs_keeps_its_history(tmp_path: Path) -> None:
    old, new = nn.Linear(4, 4), nn.Linear(4, 4)
    first, second = torch.optim.LBFGS(old.parameters()), torch.optim.LBFGS(new.parameters())

    def closure() -> Tensor:
        first.zero_grad()
        loss = old(torch.ones(2, 4)).pow(2).mean()
        loss.backward()
        return loss

    first.step(closure)
    first.zero_grad()
    save(tmp_path, model=old, optimizer=first)
    load(tmp_path, model=new, optimizer=second)
    assert same(first.state_dict(), second.state_dict())


def test_an_optimizer_that_has_not_stepped_has_no_state_and_gets_none(tmp_path: Path) -> None:
    old, new = nn.Linear(4, 4), nn.Linear(4, 4)
    weights = old.weight.detach().clone()
    save(tmp_path, model=old, optimizer=torch.optim.AdamW(old.parameters()))
    assert torch.equal(old.weight, weights)
    optimizer = torch.optim.AdamW(new.parameters())
    load(tmp_path, model=new, optimizer=optimizer)
    assert not optimizer.state
    assert all(parameter.grad is None for parameter in new.parameters())


def test_float32_state_of_bfloat16_parameters_stays_float32(tmp_path: Path) -> None:
    def build() -> Any:
        model = nn.Linear(4, 4, dtype=torch.bfloat16)
        return model, torch.optim.AdamW(model.parameters())

    (old, first), (new, second) = build(), build()
    train([old], [first])
    for state in first.state.values():
        state["exp_avg"] = torch.randn(state["exp_avg"].shape)
    save(tmp_path, model=old, optimizer=first)
    load(tmp_path, model=new, optimizer=second)
    assert second.state[new.weight]["exp_avg"].dtype == torch.float32
    assert same(first.state_dict(), second.state_dict())


def test_every_way_to_share(tmp_path: Path) -> None:
    def build() -> dict[str, Any]:
        torch.manual_seed(0)
        body, head, tied = nn.Linear(4, 4), nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        tied[1].weight = tied[0].weight
        return {
            "body": body, "head": head, "tied": tied,
            "both": torch.optim.AdamW([{"params": body.parameters(), "lr": 0.3}, {"params": [head.weight]}]),
            "bias": torch.optim.SGD([head.bias], lr=0.1, momentum=0.5),
            "weight": torch.optim.SGD([tied[0].weight], lr=0.1, momentum=0.5),
        }  # fmt: skip

    old, new = build(), build()
    train([old["body"], old["head"], old["tied"]], [old["both"], old["bias"], old["weight"]])
    save(tmp_path, **old)
    load(tmp_path, **new)
    for name in old:
        assert same(dict(old[name].state_dict()), dict(new[name].state_dict())), name
    assert new["tied"][0].weight is new["tied"][1].weight


def test_trees_of_any_shape(tmp_path: Path) -> None:
    tree = {
        "ema": OrderedDict({"w": torch.randn(2, 3), "n": 7}), 3: {"1": torch.zeros(()), 1: torch.ones(0, 4)},
        "tuple": (torch.tensor([True]), [torch.randn(2, dtype=torch.complex64)], None), "none": None, "empty": {},
        "dots.in.keys": torch.arange(3, dtype=torch.uint8),
    }  # fmt: skip
    scheduler = torch.optim.lr_scheduler.StepLR(torch.optim.SGD([nn.Parameter(torch.ones(1))]), 2)
    generator = torch.Generator().manual_seed(9)
    values = save(
        tmp_path, thing=Anything(tree), nothing=Anything({}), generator=generator, scheduler=scheduler
    )
    expected = torch.rand(3, generator=generator)
    thing, nothing, other = Anything({"ema": 1}), Anything([1]), torch.Generator()
    assert same(load(tmp_path, thing=thing, nothing=nothing, generator=other, scheduler=scheduler), values)
    assert same(thing.state, tree)
    assert nothing.state == {}
    assert torch.equal(torch.rand(3, generator=other), expected)


class Extra(nn.Module):
    def __init__(self, value: int) -> None:
        super().__init__()
        self.value = value
        self.inner = nn.Linear(4, 4)

    def get_extra_state(self) -> Any:
        return {"value": self.value}

    def set_extra_state(self, state: Any) -> None:
        self.value = state["value"]


def test_extra_state_and_compiled_modules(tmp_path: Path) -> None:
    old, new = Extra(1), Extra(2)
    save(tmp_path, model=old)
    load(tmp_path, model=torch.compile(new))
    assert new.value == 1
    assert torch.equal(old.inner.weight, new.inner.weight)


class Sparse(nn.Module):
    """Buffers whose data do not lie in memory one beside the other."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        dense = torch.eye(4) * scale
        self.register_buffer("coo", dense.to_sparse())
        self.register_buffer("csr", dense.to_sparse_csr())
        self.register_buffer("quantized", torch.quantize_per_tensor(dense, 0.5, 0, torch.qint8))

    def dense(self) -> list[Tensor]:
        return [self.coo.to_dense(), self.csr.to_dense(), self.quantized.dequantize()]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_sparse_and_quantized_buffers(tmp_path: Path) -> None:
    old, new = Sparse(3), Sparse(1)
    save(tmp_path, model=old, thing=Anything(old.coo))
    assert not torch.equal(new.coo.to_dense(), old.coo.to_dense())
    thing = Anything()
    load(tmp_path, model=new, thing=thing)
    assert all(map(torch.equal, new.dense(), old.dense()))
    assert torch.equal(new.layer.weight, old.layer.weight)
    assert torch.equal(thing.state.to_dense(), old.coo.to_dense())


def test_a_sparse_buffer_is_no_dense_one(tmp_path: Path) -> None:
    old, new = nn.Module(), nn.Module()
    old.register_buffer("adjacency", torch.eye(2).to_sparse())
    new.register_buffer("adjacency", torch.eye(2))
    save(tmp_path / "a", model=old)
    with pytest.raises(StateMismatchError, match=r"model\.adjacency is not a tensor in the checkpoint only"):
        load(tmp_path / "a", model=new)
    save(tmp_path / "b", model=new)
    with pytest.raises(StateMismatchError, match=r"model\.adjacency is a tensor in the checkpoint only"):
        load(tmp_path / "b", model=old)


# --------------------------------------------------------------------------- what does not fit, what is refused


def test_every_mismatch_is_in_one_error_and_nothing_was_changed(tmp_path: Path) -> None:
    save(tmp_path, model=nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}), gone=Anything({}))
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "c": nn.Linear(2, 2, dtype=torch.float64)})
    weight = model["c"].weight.detach().clone()  # type: ignore[union-attr]
    with pytest.raises(StateMismatchError) as caught:
        load(tmp_path, model=model, scheduler=Anything({}))
    text = str(caught.value)
    assert "not in the checkpoint (3): model.c.weight, model.c.bias, scheduler" in text
    assert "only in the checkpoint (3)" in text
    assert "model.a.weight is [2, 2], here [3, 2]" in text
    assert torch.equal(model["c"].weight, weight)  # type: ignore[arg-type]


def test_another_dtype_and_other_param_groups_are_mismatches(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    save(tmp_path, model=model, optimizer=torch.optim.SGD(model.parameters()))
    with pytest.raises(StateMismatchError, match=r"model.weight is torch.float32, here torch.bfloat16"):
        load(
            tmp_path, model=(half := nn.Linear(2, 2).bfloat16()), optimizer=torch.optim.SGD(half.parameters())
        )
    with pytest.raises(StateMismatchError, match="optimizer has 1 param_groups, here 2"):
        load(
            tmp_path,
            model=model,
            optimizer=torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias]}]),
        )
    with pytest.raises(StateMismatchError, match="optimizer.param_groups.0: bias"):
        load(tmp_path, model=model, optimizer=torch.optim.SGD([model.weight]))


def test_refusals(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(UsageError, match="StatefulDataLoader"):
        Session(loader=DataLoader([1, 2]))
    with pytest.raises(UsageError, match="'model' and 'again' are the same object"):
        Session(model=model, again=model)
    with pytest.raises(UsageError, match="'session' cannot be the name"):
        Session(session=model)
    with pytest.raises(ConfigError, match="an interval of '10 parsecs'"):
        Session(checkpoint_every="10 parsecs")
    with pytest.raises(UsageError, match=r"parameter 0 \(shape \[7\]\) of 'optimizer' is in no module"):
        with Session(model=model, optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(7))])):
            pass
    session = Session(model=model)
    with pytest.raises(UsageError, match="inside of `with Session"):
        session.steps(3)
    with session:
        with pytest.raises(UsageError, match="one of setup, evaluate"):
            with session.phase("lunch"):
                pass
        for _ in session.steps(1):
            with pytest.raises(UsageError, match="is running already"):
                session.steps(3)
            with pytest.raises(UsageError, match="takes a number"):
                session.log(loss="low")
    with pytest.raises(UsageError, match="entered once"), session:
        pass


def test_nothing_is_yielded_when_the_checkpoint_is_there_already(tmp_path: Path) -> None:
    save(tmp_path, step=3, thing=Anything({}))
    with Session(dir=tmp_path, thing=Anything({})) as session:
        assert list(session.steps(3)) == []
        assert session.step == 3


# --------------------------------------------------------------------------- library mode


def test_retention_and_intervals(tmp_path: Path) -> None:
    def names() -> list[int]:
        return sorted(int(path.name[5:]) for path in (tmp_path / "checkpoints").iterdir())

    with Session(
        dir=tmp_path, checkpoint_every="2steps", keep_last=2, keep_every=6, keep_best="loss:min:1"
    ) as session:
        for step in session.steps(11):
            session.log(loss=abs(step - 3), other=float("nan"))
            if step == 6:
                session.save()
    assert names() == [4, 6, 10, 11]


def test_seconds_become_steps(tmp_path: Path) -> None:
    saved = 0
    with Session(dir=tmp_path, checkpoint_every="0.1s", keep_last=1000) as session:
        for _ in session.steps():
            saved = (
                len(list((tmp_path / "checkpoints").glob("*/everstep.json")))
                if session.step % 100 == 0
                else saved
            )
            if saved >= 3:
                break
    assert session.step > 100


def test_a_damaged_newest_checkpoint_is_passed_over(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with Session(dir=tmp_path, checkpoint_every="1step") as session:
        for step in session.steps(3):
            session.state["step"] = step
    newest = tmp_path / "checkpoints" / "step-000000003" / "__0_0.distcp"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    with Session(dir=tmp_path, checkpoint_every="1step") as session:
        assert session.step == 2
        assert session.state == {"step": 1}
        assert list(session.steps(3)) == [2]
    assert "step-000000003 is skipped: __0_0.distcp" in capfd.readouterr().err
    with Session(dir=tmp_path) as session:
        assert session.step == 3


def test_metadata_cannot_run_code(tmp_path: Path) -> None:
    from supervisor.errors import CheckpointError
    from supervisor.training.reader import read_metadata

    (tmp_path / ".metadata").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    with pytest.raises(CheckpointError, match="has no place in a checkpoint's metadata"):
        read_metadata(tmp_path)


def test_stock_dcp_reads_it_without_everstep(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    train([model], [optimizer])
    save(tmp_path, model=model, optimizer=optimizer, thing=Anything({"t": torch.ones(2), "n": 5}))
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "expected.pt")
    script = """
import sys
path, expected, ours = sys.argv[1:]
sys.path[:] = [p for p in sys.path if p != ours]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import importlib.util, torch, torch.distributed.checkpoint as dcp
assert importlib.util.find_spec("supervisor") is None
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys
assert not any(name.split(".")[0] == "supervisor" for name in sys.modules)
weights, optimizer = torch.load(expected)
state = {"model": {k: torch.zeros_like(v) for k, v in weights.items()},
         "optimizer": {"state": {"0.weight": {"exp_avg": torch.zeros(4, 4)}}}}
dcp.load(state, checkpoint_id=path)
assert all(torch.equal(state["model"][k], v) for k, v in weights.items())
assert torch.equal(state["optimizer"]["state"]["0.weight"]["exp_avg"], optimizer["state"][0]["exp_avg"])
everything = _load_state_dict_from_keys(checkpoint_id=path)
assert everything["optimizer"]["param_groups"][0]["params"] == ["0.weight", "0.bias", "1.weight", "1.bias"]
assert everything["thing"]["n"] == 5 and everything["session"]["step"] == 1
assert not any(name.split(".")[0] == "supervisor" for name in sys.modules)
"""
    checkpoint = tmp_path / "checkpoints" / "step-000000001"
    subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "-c", script, checkpoint, tmp_path / "expected.pt", ROOT],
        check=True,
        cwd="/",
    )


def test_a_url_needs_a_supervisor() -> None:
    with pytest.raises(ConfigError, match="everstep run --checkpoints URL"):
        with Session(dir="s3://bucket/run", model=torch.nn.Linear(2, 2)):
            raise AssertionError
