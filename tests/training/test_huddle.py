"""Agreeing through shared memory: right among any ranks, patient, and with an end when a rank dies or memory cannot be had."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from supervisor.decide import stacks
from supervisor.edge import futex
from supervisor.training import huddle, world
from supervisor.training.world import World
from tests.training.harness import launch

ROUNDS = 2000
FEW = 200


def agree(rounds: int, hosts: int = 0) -> tuple[bool, int]:
    """Whether there was a huddle, and how many of its rounds were right; now and then a rank is late."""
    rank = int(os.environ["RANK"])
    if hosts:
        huddle.whereabouts = lambda: 1 + rank % hosts
    dist.init_process_group("gloo")
    one = World()
    size, late, right = one.size, random.Random(rank), 0
    for number in range(rounds):
        if late.random() < 0.01:
            time.sleep(late.uniform(0, 0.003))
        own = [hash((number, of)) >> 1 for of in range(size)]
        expected = [number, max(own), -number, 1 << 62]
        right += one.largest([number, own[rank], -number, 1 << 62]) == expected
        right -= one.agreed(number, [rank]) != [size - 1]
    return one._huddle is not None, right


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_all_ranks_of_a_host_agree_in_every_round(ranks: int) -> None:
    assert launch(agree, ranks, ROUNDS) == [(True, ROUNDS)] * ranks


@pytest.mark.parametrize(("ranks", "hosts"), [(4, 2), (5, 2), (3, 2)])
def test_several_hosts_agree_by_the_first_rank_of_each(ranks: int, hosts: int) -> None:
    assert launch(agree, ranks, FEW, hosts) == [(True, FEW)] * ranks


def test_hosts_with_a_rank_each_have_no_huddle() -> None:
    assert launch(agree, 2, FEW, 2) == [(False, FEW)] * 2


def without(how: str) -> tuple[bool, int]:
    """One rank cannot have it."""
    if os.environ["RANK"] == "1":
        if how == "proc":
            huddle.whereabouts = lambda: 0
        elif how == "open":
            huddle.join = lambda *_: None
    elif how == "memory":
        os.memfd_create = fail  # type: ignore[assignment]
    return agree(FEW)


def fail(*_: object) -> int:
    raise OSError(23, "Too many open files in system")


@pytest.mark.parametrize("how", ["proc", "open", "memory"])
def test_what_one_rank_cannot_have_none_has(how: str) -> None:
    assert launch(without, 2, how) == [(False, FEW)] * 2


def test_no_futex_no_huddle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(futex, "IS_AVAILABLE", False)
    assert huddle.whereabouts() == 0


def test_whoever_cannot_open_it_joins_nothing(tmp_path: Path) -> None:
    with huddle.lent(2) as fd:
        assert huddle.join([os.getpid(), os.getpid()], 0, fd, None) is not None
        assert huddle.join([os.getpid()] * 9, 0, fd, None) is None  # it is too small for those
    assert huddle.join([os.getpid(), os.getpid()], 0, fd, None) is None
    with (tmp_path / "another").open("wb+") as file:
        file.truncate(4096)
        assert huddle.join([os.getpid(), os.getpid()], 0, file.fileno(), None) is None


def dies(victim: int) -> str:
    """What the others are told."""
    dist.init_process_group("gloo")
    one = World()
    one.largest([0])
    if one.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        one.largest([0])
    except ConnectionError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_rank_that_dies_ends_the_wait_of_the_others(victim: int) -> None:
    results = launch(dies, 3, victim)
    assert results.pop(victim) == -signal.SIGKILL
    assert all("connection closed by peer" in result for result in results), results


def test_who_waits_is_seen_to_wait() -> None:
    frames = stacks.main_thread(
        "Current thread 0x00007f (most recent call first):\n"
        f'  File "{futex.__file__}", line 52 in wait\n'
        f'  File "{huddle.__file__}", line 130 in _await\n'
        f'  File "{world.__file__}", line 85 in largest\n'
    )
    assert stacks.is_wait(frames)
