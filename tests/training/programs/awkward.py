"""Trainings whose gradients, loops or objects are unlike the others'."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from supervisor.training import Session
from supervisor.training.gradients import Gradients


class Two(nn.Module):
    """Two modules, one of them at a time."""

    def __init__(self, first: nn.Module, late: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.late = late

    def forward(self, inputs: torch.Tensor, part: str) -> torch.Tensor:
        module: nn.Module = getattr(self, part)
        outputs: torch.Tensor = module(inputs)
        return outputs


class Wrapper:
    """An optimizer that nobody recognises."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.inner = optimizer

    def state_dict(self) -> Any:
        return self.inner.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.inner.load_state_dict(state)


class Sealed(Wrapper):
    """One that does not even show what it wraps."""

    __slots__ = ("_hidden",)

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._hidden = optimizer

    @property
    def inner(self) -> Any:  # type: ignore[override]
        return self._hidden


class Momentum(torch.optim.Optimizer):
    """Keeps a plain tensor for each shard."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                local, state = parameter.to_local(), self.state[parameter]
                if not state:
                    state["m"] = torch.zeros_like(local)
                state["m"].mul_(0.9).add_(parameter.grad.to_local())
                local.sub_(0.1 * state["m"])


def accumulate(dir: str, kind: str, steps: int, stop: int | None = None) -> Any:  # noqa: A002
    """One process; the weights. ``kind``: how gradients last beyond a step."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    given: Any = {"wrapped": Wrapper, "sealed": Sealed}.get(kind, lambda it: it)(optimizer)
    first = 0
    with Session(dir=dir, checkpoint_every="1step", keep_last=99, model=model, optimizer=given) as session:
        first = session.step
        for step in session.steps(steps):
            if step == stop:
                raise KeyboardInterrupt
            if kind == "delayed":
                optimizer.step()
                optimizer.zero_grad()
            model(torch.randn(2, 4)).pow(2).mean().backward()
            if kind != "delayed" and step % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
    return first, model.weight.detach().clone()


def fsdp_without_sync(dir: str, steps: int = 9, stop: int | None = None) -> Any:  # noqa: A002
    """FSDP2 that reduces at every third step only."""
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model: Any = fully_shard(nn.Linear(4, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Session(
        dir=dir, checkpoint_every="2steps", keep_last=99, model=model, optimizer=optimizer
    ) as session:
        first = session.step
        for step in session.steps(steps):
            if step == stop:
                return None
            model.set_requires_gradient_sync(step % 3 == 2)
            model(torch.randn(2, 4)).pow(2).mean().backward()
            if step % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
    return first, model.weight.to_local().tolist()


def fsdp_pending() -> list[list[str]]:
    """What is pending in FSDP2 that reduces in another dtype, and uses a part of itself from the second step on only."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dist.init_process_group("gloo")
    wide = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model: Any = Two(fully_shard(nn.Linear(4, 4), mp_policy=wide), fully_shard(nn.Linear(4, 4)))
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradients = Gradients({"optimizer": optimizer}, {"model": model})
    found = []
    for parts, reduces in (
        (["first"], False),
        (["first"], True),
        (["first", "late"], True),
        (["late"], False),
        (["late"], True),
    ):
        model.set_requires_gradient_sync(reduces)
        for part in parts:
            model(torch.randn(2, 4), part).float().pow(2).mean().backward()
        if reduces:
            optimizer.step()
            optimizer.zero_grad()
        found.append(gradients.pending())
    gradients.close()
    return found


def momentum(dir: str, steps: int) -> Any:  # noqa: A002
    """FSDP2 with an optimizer whose state does not reshard."""
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    model: Any = fully_shard(nn.Linear(4, 8, bias=False))
    optimizer = Momentum(model.parameters())
    with Session(dir=dir, checkpoint_every="never", model=model, optimizer=optimizer) as session:
        for _ in session.steps(steps):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return session.step


class Grumpy:
    """Does not load on rank 1."""

    def state_dict(self) -> Any:
        return {"n": 1}

    def load_state_dict(self, state: Any) -> None:
        if dist.get_rank() == 1:
            raise KeyError("on purpose")


def grumpy(dir: str, steps: int) -> Any:  # noqa: A002
    """What each rank raises."""
    dist.init_process_group("gloo")
    try:
        with Session(dir=dir, checkpoint_every="1step", thing=Grumpy()) as session:
            for _ in session.steps(steps):
                pass
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return session.step


def uneven(dir: str) -> Any:  # noqa: A002
    """Rank 1 has skipped a step when both come to a save point."""
    dist.init_process_group("gloo")
    try:
        with Session(dir=dir, checkpoint_every="never") as session:
            for _ in session.steps(4 + dist.get_rank()):
                pass
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def left(dir: str, how: str) -> Any:  # noqa: A002
    """``save()``, then ``break`` on every rank; or an exception on one of them."""
    dist.init_process_group("gloo")
    try:
        with Session(dir=dir, checkpoint_every="never") as session:
            for step in session.steps():
                session.state["step"] = step
                if step == 3:
                    session.save()
                    if how == "error" and dist.get_rank() == 1:
                        raise ArithmeticError
                    break
    except ArithmeticError:
        pass
    return session.step


def many_epochs(size: int) -> Any:
    """Loops without end, ``size`` steps each."""
    dist.init_process_group("gloo")
    with Session() as session:
        for epoch in range(10**9):
            for _ in session.steps((epoch + 1) * size):
                pass
    return None
