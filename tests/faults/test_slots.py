"""The rule by which slots are used again: whatever the order of things, all ranks hold one complete step together.

Two ranks, a supervisor and a drain are interleaved at random, step by step, over the real slots: ranks are up to a save apart,
messages arrive late, a drain takes as long as it likes, saves fail or tear, workers or everybody die at any point.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest

from supervisor.checkpoint import slots
from supervisor.edge.control import offered_slot
from supervisor.snapshots import Ranks, Snapshots

RANKS = (0, 1)
Message = tuple[str, int, int]  # kind, step, slot


class Rank:
    """Goes through its saves in order; what it tells is on its way until the supervisor hears it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.plan: deque[Callable[[], None]] = deque()
        self.told: deque[Message] = deque()


class Job:
    """The state of everything, and what may happen next."""

    def __init__(self, root: Path, chance: random.Random) -> None:
        self.root, self.chance = root, chance
        self.step = self.attempt = 0
        self.newest = 0  # step that the supervisor has declared whole
        self.drained: tuple[Path, dict[str, str]] | None = None
        self.skipped = self.saves = 0
        self.start()

    def start(self) -> None:
        """A supervisor begins, with what is on disk."""
        self.snapshots = Snapshots(self.root, run_id="run", key=None, fact=lambda fact: None)
        self.drained = None
        self.launch()

    def launch(self) -> None:
        """An attempt begins, where the newest snapshot is."""
        self.check()
        found = self.snapshots.newest()
        self.step = found[1].step if found else 0
        self.ranks = [Rank(number) for number in RANKS]
        self.page = 0
        self.last = 0  # slot that rank 0 used, plus one
        self.offer()

    def check(self) -> None:
        """What counts as whole is the same step on every rank, and nothing was lost."""
        again = Snapshots(self.root, run_id="run", key=None, fact=lambda fact: None).newest()
        assert (again[1].step if again else 0) >= self.newest, "the newest complete step is lost"
        for index in range(3):
            record = slots.read_slot(self.root / "slots" / str(index))
            if record is not None:
                held = {self.file(rank, index).read_text() for rank in RANKS}
                assert held == {f"step {record.step:09d}"}, f"slot {index} of step {record.step} holds {held}"

    def file(self, rank: int, slot: int) -> Path:
        return self.root / "slots" / str(slot) / f"__{rank}_0.distcp"

    # ------------------------------------------------------------------ the workers

    def save_point(self) -> None:
        """All ranks have come to it, each with its own last save behind it: rank 0 looks at the page."""
        self.step += 1
        if self.page in (0, self.last):
            self.skipped += 1
            return
        self.saves += 1
        slot = offered_slot(self.page)
        assert slot is not None
        self.last = self.page
        outcome = self.chance.choices(["saved", "failed", "torn"], [10, 1, 1])[0]
        torn = self.chance.choice(RANKS)
        for rank in self.ranks:
            kind = "saved" if outcome == "torn" and rank.number != torn else outcome
            rank.plan += [
                lambda rank=rank, slot=slot: self.write(rank, slot, "half"),  # type: ignore[misc]
                lambda rank=rank, slot=slot, step=self.step: self.write(rank, slot, f"step {step:09d}"),  # type: ignore[misc]
                lambda rank=rank, told=(kind, self.step, slot): rank.told.append(told),  # type: ignore[misc]
            ]

    def write(self, rank: Rank, slot: int, text: str) -> None:
        path = self.file(rank.number, slot)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.parent.joinpath(".metadata").touch()
        path.write_text(f"{text:<14}")

    # ------------------------------------------------------------------ the supervisor

    def offer(self) -> None:
        self.page = self.snapshots.offer_word

    def hear(self, rank: Rank) -> None:
        """As ``Reception`` does."""
        kind, step, slot = rank.told.popleft()
        if kind == "saved":
            whole = self.snapshots.part(
                rank.number,
                Ranks(self.attempt, len(RANKS), len(RANKS)),
                step=step,
                slot=slot,
                seconds=0,
                size=1,
                metrics={},
            )
            if whole:
                self.newest = step
                self.offer()
        elif kind == "torn":
            if self.snapshots.tear(step, slot):
                self.offer()
        elif rank.number == 0:
            self.snapshots.abandon(step, "no room")
            self.offer()

    def drain(self) -> None:
        """Begin one, or end the one that runs: its slot is as it was."""
        if self.drained is None:
            found = self.snapshots.newest()
            if found is not None:
                self.snapshots.hold(found[0])
                self.drained = found[0], self.content(found[0])
        else:
            folder, before = self.drained
            assert self.content(folder) == before, "written over while it was drained"
            self.snapshots.hold(None)
            self.drained = None

    def content(self, folder: Path) -> dict[str, str]:
        return {path.name: path.read_text() for path in folder.iterdir()}

    # ------------------------------------------------------------------ what happens

    def go_on(self) -> None:
        """One thing of all that may happen now."""
        possible: list[tuple[float, Callable[[], None]]] = [(0.5, self.drain), (1, self.offer)]
        possible += [(4, lambda r=r: r.plan.popleft()()) for r in self.ranks if r.plan]  # type: ignore[misc]
        possible += [(3, lambda r=r: self.hear(r)) for r in self.ranks if r.told]  # type: ignore[misc]
        if not any(rank.plan for rank in self.ranks):
            possible.append((3, self.save_point))
        possible += [(0.05, self.workers_die), (0.05, self.all_die)]
        weights, actions = zip(*possible, strict=True)
        self.chance.choices(actions, weights)[0]()

    def workers_die(self) -> None:
        self.snapshots.reset()
        self.attempt += 1
        self.launch()

    def all_die(self) -> None:
        self.attempt += 1
        self.start()


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_things(seed: int, tmp_path: Path) -> None:
    job = Job(tmp_path, random.Random(seed))
    for _ in range(1000):
        job.go_on()
        job.check()
    assert job.saves > 50
    assert job.newest > 20
