"""This rank among the others: its number, and the Session's own group for what the ranks must agree on.

The group is a gloo one apart from the training's: its collectives cannot interleave with those of the training, and they
work on the CPU whatever the training runs on. It is used at save points and on resume, never in an ordinary step. It is
patient: whoever seals or verifies a large checkpoint on slow storage keeps the others waiting for that long, and a rank that
has died ends the wait by its closed connection. What is agreed on at every save point goes through memory within a host
(``huddle``), and between hosts through a group of the first rank of each.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist

from supervisor.errors import UsageError
from supervisor.training import huddle
from supervisor.training.copies import Node
from supervisor.training.huddle import Huddle

T = TypeVar("T")
_torch_dist: Any = dist  # its private names
_LEAVING: Final = timedelta(minutes=5)  # that one rank may leave the Session after another
_PATIENCE: Final = timedelta(hours=24)


class World:
    """``rank`` of ``size``. Opening it is collective over all ranks.

    ``apart``: the nodes that torchrun has started ranks on do not see each other's snapshots. ``node`` is this one, if there are
    several of that kind.

    Raises UsageError when torchrun started several ranks and ``torch.distributed`` is not initialised yet.
    """

    def __init__(self, *, apart: bool = False) -> None:
        self.rank = 0
        self.size = 1
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.group: dist.ProcessGroup | None = None
        self._apart: dist.ProcessGroup | None = None
        self._huddle: Huddle | None = None
        self.node: Node | None = None
        if dist.is_available() and dist.is_initialized():
            self.rank = dist.get_rank()
            self.size = dist.get_world_size()
            if self.size > 1:
                self.group = dist.new_group(backend="gloo", timeout=_PATIENCE)
                self._store: Any = _torch_dist.distributed_c10d._get_default_store()
                self._meet()
        elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but torch.distributed is not initialised: "
                "call init_process_group before entering the Session"
            )
        if apart and int(os.environ.get("GROUP_WORLD_SIZE") or 1) > 1:
            first = self.rank - self.local_rank
            self.node = Node(
                int(os.environ["GROUP_RANK"]), range(first, first + int(os.environ["LOCAL_WORLD_SIZE"]))
            )

    def _meet(self) -> None:
        """Find out who is on this host, and share memory with them, if all ranks can with theirs. Collective."""
        mark = secrets.randbits(62)
        with huddle.lent(self.size, mark) as fd:
            own = torch.tensor([mark, huddle.whereabouts(), os.getpid(), fd], device="cpu")
            each = [torch.empty_like(own) for _ in range(self.size)]
            dist.all_gather(each, own, group=self.group)
            table = [[int(number) for number in row.tolist()] for row in each]
            self._name = f"everstep/{table[0][0]}"
            hosts: dict[int, list[int]] = {}
            for rank, (_, where, _, _) in enumerate(table):
                hosts.setdefault(where, []).append(rank)
            if 0 in hosts or len(hosts) == self.size:  # unknown, or nobody shares a host
                return
            across = None
            if len(hosts) > 1:
                firsts = [ranks[0] for ranks in hosts.values()]
                group = dist.new_group(firsts, backend="gloo", timeout=_PATIENCE)
                across = functools.partial(_largest, group=group)
            ranks = hosts[table[self.rank][1]]
            members = [table[rank][2] for rank in ranks]
            mark, _, _, fd = table[ranks[0]]
            found = huddle.join(members, ranks.index(self.rank), fd, mark, across)
            if not _largest([found is None], self.group)[0]:
                self._huddle = found

    @property
    def neighbours(self) -> range:
        """The ranks whose snapshots lie in the same place as this one's, itself included."""
        return range(self.size) if self.node is None else self.node.ranks

    def may_lack(self, name: str) -> bool:
        """Whether this file of a snapshot may be missing here: ranks of another node have written it."""
        return self.node is not None and self.node.may_lack(name)

    def apart(self) -> dist.ProcessGroup | None:
        """A group of all ranks that nothing else uses, for a thread; None for one rank. Collective."""
        if self.group is not None and self._apart is None:
            self._apart = dist.new_group(backend="gloo", timeout=_PATIENCE)
        return self._apart

    def largest(self, values: Sequence[int]) -> list[int]:
        """The element-wise maximum over all ranks, on every rank; each gives as many values. Collective."""
        if self.group is None:
            return list(values)
        if self._huddle is not None:
            return self._huddle.largest(values)
        return _largest(values, self.group)

    def agreed(self, step: int, values: Sequence[int]) -> list[int]:
        """``largest`` of the values, at a point where all ranks are at the same step. Collective.

        Raises UsageError, on every rank, when they are not.
        """
        last, negated_first, *largest = self.largest([step, -step, *values])
        if last != -negated_first:
            raise UsageError(
                f"the ranks are not at the same step: one has completed {-negated_first}, another {last}; "
                "every rank must run the same steps"
            )
        return largest

    def leave(self, *, in_order: bool) -> None:
        """Tell the others that this rank leaves the Session. Not collective."""
        if self.group is not None:
            with contextlib.suppress(RuntimeError):  # the store's host is gone: nobody asks
                self._store.set(f"{self._name}/{self.rank}", "in order" if in_order else "by an error")

    def all_left_in_order(self, patience: timedelta = _LEAVING) -> bool:
        """Whether every rank has left in order, so that they can still do something together; waits for them."""
        if self.group is None:
            return True
        keys = [f"{self._name}/{rank}" for rank in range(self.size)]
        try:
            self._store.wait(keys, patience)
            return all(self._store.get(key) == b"in order" for key in keys)
        except RuntimeError:  # in vain, or the store's host is gone
            return False

    def gather(self, value: T, group: dist.ProcessGroup | None = None) -> list[T]:
        """Every rank's value, by rank, on every rank. Collective, over ``group`` if one is given; the value must pickle."""
        if self.group is None:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value, group=group or self.group)
        return values  # type: ignore[return-value]

    def from_first(self, value: T) -> T:
        """Rank 0's value, on every rank. Collective; the value must pickle."""
        if self.group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]


def _largest(values: Sequence[int], group: dist.ProcessGroup | None) -> list[int]:
    tensor = torch.tensor(values, dtype=torch.int64, device="cpu")
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return [int(value) for value in tensor.tolist()]


def say(text: str) -> None:
    """One line to the user, on stderr."""
    sys.stderr.write(f"everstep: {text}\n")
    sys.stderr.flush()
