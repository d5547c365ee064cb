"""Agreeing through shared memory: right among any ranks, patient, and with an end when a rank dies or memory cannot be had."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from supervisor.decide import stacks
from supervisor.edge import futex, kernel
from supervisor.training import huddle, world
from supervisor.training.world import World
from tests.training.harness import launch

ROUNDS = 2000
FEW = 200
MARK = 123


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
        kernel.memfd = fail
    elif how == "watch" and os.environ["RANK"] == "2":
        kernel.pidfd_open = fail
    return agree(FEW)


def fail(*_: object) -> int:
    raise OSError(23, "Too many open files in system")


@pytest.mark.parametrize("how", ["proc", "open", "memory", "watch"])
def test_what_one_rank_cannot_have_none_has(how: str) -> None:
    assert launch(without, 3, how) == [(False, FEW)] * 3


def test_no_futex_no_huddle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(futex, "IS_AVAILABLE", False)
    assert huddle.whereabouts() == 0


def test_whoever_cannot_open_it_joins_nothing(tmp_path: Path) -> None:
    two = [os.getpid()] * 2
    with huddle.lent(2, MARK) as fd:
        assert huddle.join(two, 0, fd, MARK, None) is not None
        assert huddle.join(two, 0, fd, MARK + 1, None) is None  # another host's, that has the same numbers
        assert huddle.join([os.getpid()] * 9, 0, fd, MARK, None) is None  # it is too small for those
    assert huddle.join(two, 0, fd, MARK, None) is None
    with (tmp_path / "another").open("wb+") as file:
        file.truncate(4096)
        assert huddle.join(two, 0, file.fileno(), MARK, None) is None


def test_what_it_holds_goes_with_it() -> None:
    before = os.listdir("/proc/self/fd")
    with huddle.lent(3, MARK) as fd:
        one = huddle.join([os.getpid()] * 3, 0, fd, MARK, None)
    assert one is not None
    assert len(os.listdir("/proc/self/fd")) > len(before)
    del one
    assert os.listdir("/proc/self/fd") == before


def test_more_numbers_than_have_room_are_refused() -> None:
    with huddle.lent(1, MARK) as fd:
        one = huddle.join([os.getpid()], 0, fd, MARK, None)
    assert one is not None
    assert one.largest(range(huddle.MOST)) == list(range(huddle.MOST))
    with pytest.raises(ValueError, match="have room"):
        one.largest(range(huddle.MOST + 1))


def is_crowded() -> bool:
    """Whether a late rank is taken for dead by one that can open no file any more."""
    dist.init_process_group("gloo")
    one = World()
    one.largest([0])
    if one.rank == 0:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    else:
        time.sleep(1)
    return one.largest([one.rank]) == [1]


def test_who_has_no_descriptors_left_still_tells_the_late_from_the_dead() -> None:
    assert launch(is_crowded, 2) == [True, True]


def interrupted() -> str:
    """What the first rank is told when it asks again after a signal's handler broke off an agreement."""
    dist.init_process_group("gloo")
    one, told = World(), ""
    if one.rank == 0:
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with contextlib.suppress(KeyboardInterrupt):
            one.largest([0])
        try:
            one.largest([0])
        except RuntimeError as error:
            told = str(error)
    dist.barrier()
    return told


def test_an_agreement_that_was_broken_off_is_not_gone_on_with() -> None:
    told, _ = launch(interrupted, 2)
    assert "cannot agree any more" in told


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


def agree_elsewhere(hosts: int) -> tuple[bool, int]:
    """Where tensors are made on another device unless it is said."""
    torch.set_default_device("meta")
    return agree(FEW, hosts)


@pytest.mark.parametrize(("hosts", "has_huddle"), [(1, True), (2, False)])
def test_another_default_device(hosts: int, has_huddle: bool) -> None:
    assert launch(agree_elsewhere, 2, hosts) == [(has_huddle, FEW)] * 2


def test_who_waits_is_seen_to_wait() -> None:
    frames = stacks.main_thread(
        "Current thread 0x00007f (most recent call first):\n"
        f'  File "{futex.__file__}", line 52 in wait\n'
        f'  File "{huddle.__file__}", line 130 in _await\n'
        f'  File "{world.__file__}", line 85 in largest\n'
    )
    assert stacks.is_wait(frames)
