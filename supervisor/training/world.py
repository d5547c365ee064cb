"""This rank among the others: its number, and the Session's own group for what the ranks must agree on.

The group is a gloo one apart from the training's: its collectives cannot interleave with those of the training, and they
work on the CPU whatever the training runs on. It is used at save points and on resume, never in an ordinary step.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from supervisor.errors import UsageError

T = TypeVar("T")


class World:
    """``rank`` of ``size``. Opening it is collective over all ranks.

    Raises UsageError when torchrun started several ranks and ``torch.distributed`` is not initialised yet.
    """

    def __init__(self) -> None:
        self.rank = 0
        self.size = 1
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.group: dist.ProcessGroup | None = None
        if dist.is_available() and dist.is_initialized():
            self.rank = dist.get_rank()
            self.size = dist.get_world_size()
            if self.size > 1:
                self.group = dist.new_group(backend="gloo")
        elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but torch.distributed is not initialised: "
                "call init_process_group before entering the Session"
            )

    def largest(self, values: Sequence[int]) -> list[int]:
        """The element-wise maximum over all ranks, on every rank; each gives as many values. Collective."""
        if self.group is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return [int(value) for value in tensor.tolist()]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank, on every rank. Collective; the value must pickle."""
        if self.group is None:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values  # type: ignore[return-value]

    def from_first(self, value: T) -> T:
        """Rank 0's value, on every rank. Collective; the value must pickle."""
        if self.group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]


def say(text: str) -> None:
    """One line to the user, on stderr."""
    sys.stderr.write(f"everstep: {text}\n")
    sys.stderr.flush()
