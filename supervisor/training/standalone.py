"""The keeper of a Session without a supervisor: ``dir=`` and a plain library.

Checkpoints go to ``dir/checkpoints``, in the same format as a supervisor's. All ranks write, rank 0 seals (syncs, hashes,
writes the manifest) and prunes, and the others wait for the verdict on the Session's own group, which is patient, rather than
in the training's next collective, which is not. What happens to the files is in ``shelf``. An interval in seconds becomes a number of steps that rank 0 estimates from the time they
take and hands to all ranks whenever they come together; until the first estimate they do so after 1, 2, 4, 8 … steps.
"""

from __future__ import annotations

import platform
import re
import time
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import torch

from supervisor.about import version
from supervisor.checkpoint import catalog
from supervisor.checkpoint.manifest import Origin
from supervisor.decide.guard import GuardPolicy, Known
from supervisor.decide.retention import RetentionPolicy
from supervisor.edge.control import SIZE
from supervisor.errors import ConfigError, EverstepError
from supervisor.model import ProposalFlag, Skip
from supervisor.training.keeper import NEVER, Candidate, Target
from supervisor.training.shelf import Shelf
from supervisor.training.world import World, say

T = TypeVar("T")

_INTERVAL: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)(steps?|s|m|h)")
_SECONDS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Every:
    """How often to save: ``steps``, or ``seconds``, or neither (never)."""

    steps: int | None = None
    seconds: float | None = None

    @classmethod
    def parse(cls, text: str) -> Every:
        """From ``1step``, ``50steps``, ``10s``, ``5m``, ``1h`` or ``never``. Raises ConfigError."""
        if text == "never":
            return cls()
        match = _INTERVAL.fullmatch(text)
        if match is None or float(match[1]) <= 0 or (match[2].startswith("step") and "." in match[1]):
            raise ConfigError(f"an interval of {text!r}: 50steps, 10s, 5m, 1h or never is required")
        if match[2].startswith("step"):
            return cls(steps=int(match[1]))
        return cls(seconds=float(match[1]) * _SECONDS[match[2]])


class Standalone:
    """Saves to ``root/checkpoints`` and resumes from it. Raises JobError, on all ranks, when another run holds it."""

    def __init__(self, root: Path, every: Every, policy: RetentionPolicy, world: World) -> None:
        self.words = memoryview(bytearray(SIZE)).cast("Q")
        self.attempt = 0
        self.due = NEVER
        self.settled = 0
        self.guard: GuardPolicy | None = None  # this is the supervisor's
        self.skips: tuple[Skip, ...] = ()
        self.known = Known()
        self._checkpoints = root / "checkpoints"
        self._every = every
        self._world = world
        self._run_id = uuid.uuid4().hex[:12]
        self._rejected: list[Path] = []
        self._requested = False
        self._started: tuple[int, float] | None = None  # step and time where the measuring began
        self._last_save = 0.0
        self._shelf: Shelf | None = None  # rank 0's

        def open_shelf() -> None:
            self._shelf = Shelf(root, policy)

        self._on_first(open_shelf)

    # ------------------------------------------------------------------ resuming

    def candidate(self) -> Candidate | None:
        """The newest checkpoint that verifies; rank 0 looks, all ranks hear. Raises CheckpointError if all are refused."""

        def find() -> tuple[str, int, int, str] | None:
            record = self._of_first().newest(self._rejected)
            if record is None or record.manifest is None:
                return None
            origin = record.manifest.origin
            return str(record.path), record.step, origin.attempt + 1, origin.run_id

        found = self._on_first(find)
        if found is None:
            return None
        path, step, self.attempt, self._run_id = found
        return Candidate(Path(path), step)

    def rejected(self, candidate: Candidate, reason: str, *, damaged: bool) -> bool:
        """One that has been damaged meanwhile is passed over for an older one; a good one never is."""
        if not damaged or self._on_first(lambda: self._of_first().is_good(candidate.path)):
            return False
        if self._world.rank == 0:
            say(f"{candidate.path} is skipped: {reason}")
        self._rejected.append(candidate.path)
        return True

    # ------------------------------------------------------------------ when

    def wants(self, completed: int) -> ProposalFlag | None:
        """Whether the ranks come together at this step."""
        if self._started is None:
            self._started = (completed, time.monotonic())
            self._last_save = time.monotonic()
            self.due = completed + 1 if self._every.seconds is not None else self._next_multiple(completed)
        elif completed >= self.due and not self._requested:
            return ProposalFlag(0)
        if self._requested:
            return ProposalFlag.CHECKPOINT
        return (
            ProposalFlag(0) if self._every.steps is not None and completed % self._every.steps == 0 else None
        )

    def offer(self, completed: int, flags: ProposalFlag) -> tuple[int, int]:
        """Save now, or (an interval in seconds that is not over) come together again later."""
        seconds = self._every.seconds
        if seconds is None:
            return 1, self._next_multiple(completed)
        now = time.monotonic()
        left = self._last_save + seconds - now
        begun, since = self._started or (completed, now)
        steps = completed - begun
        a_step = (now - since) / steps if steps > 0 and now > since else seconds
        if flags or left <= a_step / 2:
            return 1, completed + max(1, round(seconds / a_step))
        # half of what is left: steps may become faster
        return 0, completed + max(
            1, min(steps + 1, round(left / a_step / 2) if left > 4 * a_step else round(left / a_step))
        )

    def target(self, code: int, completed: int) -> Target:
        """The step's directory."""
        return Target(code, catalog.step_directory(self._checkpoints, completed))

    def prepare(self, target: Target) -> None:
        """Rank 0 makes room; what lies there is set aside unless it is a leftover."""
        if self._world.rank == 0:
            self._of_first().begin(target.directory)

    def agreed(self, completed: int, due: int) -> None:
        """The next step to come together at is known to all."""
        self._requested = False
        self.due = due

    def request(self, step: int) -> None:
        """To be called on all ranks: without a supervisor nobody else would tell them."""
        self._requested = True
        self.due = min(self.due, step)

    def _next_multiple(self, completed: int) -> int:
        steps = self._every.steps
        return NEVER if steps is None else (completed // steps + 1) * steps

    # ------------------------------------------------------------------ what was saved

    def saved(
        self,
        target: Target,
        completed: int,
        seconds: float,
        size: int,
        metrics: dict[str, float],
        names: Collection[str],
    ) -> str | None:
        """Rank 0 makes it a checkpoint, and removes those that are no longer wanted."""
        origin = Origin(
            step=completed, attempt=self.attempt, epoch=0, run_id=self._run_id, world_size=self._world.size,
            created=time.time(), metrics=metrics,
            versions={"torch": torch.__version__, "everstep": version(), "python": platform.python_version()},
        )  # fmt: skip

        def commit() -> str | None:
            try:
                self._of_first().commit(target.directory, origin, names)
            except EverstepError as error:
                say(f"the checkpoint of step {completed} failed: {error}; training goes on")
                return str(error)
            try:
                self._of_first().prune(completed)
            except EverstepError as error:
                say(f"an old checkpoint stays: {error}")
            return None

        problem = self._on_first(commit)
        self._last_save = time.monotonic()
        return problem

    def failed(self, target: Target, completed: int, reason: str, *, torn: bool) -> None:
        """Nothing older was touched; what was written of it goes, once no rank is at work on it any more."""
        self._world.largest([0])
        if self._world.rank == 0:
            say(f"the checkpoint of step {completed} failed: {reason}; training goes on")
            self._of_first().abandon(target.directory)

    def tell(self, kind: str, **values: object) -> None:
        """Nobody listens."""

    def close(self) -> None:
        """Let another run have the directory."""
        if self._shelf is not None:
            self._shelf.close()

    # ------------------------------------------------------------------ rank 0's work

    def _of_first(self) -> Shelf:
        assert self._shelf is not None
        return self._shelf

    def _on_first(self, work: Callable[[], T]) -> T:
        """Have rank 0 do it; its result, or its error, on all ranks. Collective."""
        outcome: tuple[T | None, EverstepError | None] = (None, None)
        if self._world.rank == 0:
            try:
                outcome = (work(), None)
            except EverstepError as error:
                outcome = (None, error)
        value, failure = self._world.from_first(outcome)
        if failure is not None:
            raise failure
        return value  # type: ignore[return-value]
