"""One of several nodes whose part in the job changes while it is asked to leave."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from supervisor.config import Options
from supervisor.decide.membership import Size
from supervisor.edge.jobdir import JobDirectory
from supervisor.edge.store import address
from supervisor.engine import Alone
from supervisor.several import Several


def run(folder: Path, *heard: signal.Signals | None) -> tuple[int, int]:
    """A node that leads as often as it may, and is deposed each time but for the last; what it hears each time. Its code, and how often it led."""
    options = Options(
        nnodes=Size(least=2, most=2), store=address.parse("tcp://h1:7077"), node_name="h1", quiet=True
    )
    node = Several(options, SimpleNamespace(), JobDirectory(folder), Alone(), None)  # type: ignore[arg-type]
    led: list[signal.Signals | None] = []

    async def lead(_team: object) -> int | None:
        led.append(heard[len(led)])
        if (signum := led[-1]) is not None:
            node._warden._on_signal(signum)
        return 0 if len(led) == len(heard) else None

    node._lead = lead  # type: ignore[method-assign]
    joining: Any = SimpleNamespace(
        changed=asyncio.Event(), has_joined=True, leader="h1 1", leads=True, order=None
    )
    team: Any = SimpleNamespace(joining=joining, is_embedded=True)
    code = asyncio.run(asyncio.wait_for(node._take_part(team, serves=True), 30))
    return code, len(led)


@pytest.mark.parametrize(
    ("heard", "expected"),
    [
        ((None, None), (0, 2)),  # deposed, it takes part on
        ((signal.SIGTERM, None), (75, 1)),  # it leaves: who leads now does without it
        ((signal.SIGINT, None), (0, 2)),  # the job is to stop: the next leader is to hear of it
    ],
)
def test_a_deposed_leader_does_not_forget_what_it_was_asked_for(
    tmp_path: Path, heard: tuple[signal.Signals | None, ...], expected: tuple[int, int]
) -> None:
    assert run(tmp_path / "job", *heard) == expected


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_node_that_has_no_part_yet_leaves_at_once(
    tmp_path: Path, signum: signal.Signals, code: int
) -> None:
    options = Options(nnodes=Size(least=2, most=2), store=address.parse("tcp://h1:7077"), quiet=True)
    node = Several(options, SimpleNamespace(), JobDirectory(tmp_path / "job"), Alone(), None)  # type: ignore[arg-type]
    node._warden._on_signal(signum)
    team: Any = SimpleNamespace(joining=SimpleNamespace(changed=asyncio.Event()), is_embedded=True)
    assert asyncio.run(asyncio.wait_for(node._take_part(team, serves=True), 30)) == code


def test_a_node_does_not_follow_its_own_earlier_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off while it led, it has not heard yet that another one does."""
    options = Options(
        nnodes=Size(least=2, most=2), store=address.parse("etcd://h9:2379"), node_name="h1", quiet=True
    )
    node = Several(options, SimpleNamespace(), JobDirectory(tmp_path / "job"), Alone(), None)  # type: ignore[arg-type]
    followed: list[str] = []

    class Follower:
        def __init__(self, *given: Any) -> None:
            followed.append(given[4].leader)

        async def run(self) -> int:
            return 0

    monkeypatch.setattr("supervisor.several.Follower", Follower)
    joining: Any = SimpleNamespace(changed=asyncio.Event(), has_joined=True, leads=False, problem=None)

    def leads(leader: str) -> None:
        joining.leader, joining.order = leader, SimpleNamespace(leader=leader, run_id="run")
        joining.changed.set()

    async def main() -> int:
        leads("h1 0")
        asyncio.get_running_loop().call_later(0.05, leads, "h2 1")
        return await node._take_part(SimpleNamespace(joining=joining, is_embedded=False), serves=False)  # type: ignore[arg-type]

    assert asyncio.run(asyncio.wait_for(main(), 30)) == 0
    assert followed == ["h2 1"]
