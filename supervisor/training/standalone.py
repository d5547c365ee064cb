"""The keeper of a Session without a supervisor: ``dir=`` and a plain library.

Checkpoints go to ``dir/checkpoints``, in the same format as a supervisor's. All ranks write, rank 0 seals (syncs, hashes,
writes the manifest) and prunes. An interval in seconds becomes a number of steps that rank 0 estimates from the time they
take and hands to all ranks whenever they come together; until the first estimate they do so after 1, 2, 4, 8 … steps.
"""

from __future__ import annotations

import platform
import re
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from supervisor.about import version
from supervisor.checkpoint import catalog, directory
from supervisor.checkpoint.commit import seal
from supervisor.checkpoint.manifest import Key, Origin
from supervisor.decide.retention import RetentionPolicy, to_remove
from supervisor.edge.control import SIZE
from supervisor.errors import ConfigError, EverstepError
from supervisor.model import ProposalFlag
from supervisor.training.keeper import NEVER, Candidate, Target
from supervisor.training.world import World, say

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
    """Saves to ``root/checkpoints`` and resumes from it."""

    def __init__(self, root: Path, every: Every, policy: RetentionPolicy, world: World) -> None:
        self.words = memoryview(bytearray(SIZE)).cast("Q")
        self.attempt = 0
        self.due = NEVER
        self.settled = 0
        self._checkpoints = root / "checkpoints"
        self._every = every
        self._policy = policy
        self._world = world
        self._key = Key.from_environment()
        self._run_id = uuid.uuid4().hex[:12]
        self._rejected: list[Path] = []
        self._requested = False
        self._started: tuple[int, float] | None = None  # step and time where the measuring began
        self._last_save = 0.0
        self._good: int | None = None

    # ------------------------------------------------------------------ resuming

    def candidate(self) -> Candidate | None:
        """The newest checkpoint that verifies; rank 0 looks, all ranks hear."""
        found: tuple[str, int, int, str] | EverstepError | None = None
        if self._world.rank == 0:
            try:
                found = self._find()
            except EverstepError as error:
                found = error
        found = self._world.from_first(found)
        if isinstance(found, EverstepError):
            raise found
        if found is None:
            return None
        path, step, self.attempt, self._run_id = found
        self._good = step
        return Candidate(Path(path), step)

    def _find(self) -> tuple[str, int, int, str] | None:
        record, bad = catalog.newest_good(self._checkpoints, self._key, self._rejected)
        for rejected in bad:
            say(f"{rejected.path} is skipped: {rejected.problem}")
        if record is None or record.manifest is None:
            return None
        origin = record.manifest.origin
        return str(record.path), record.step, origin.attempt + 1, origin.run_id

    def rejected(self, candidate: Candidate, reason: str, *, damaged: bool) -> bool:
        """A damaged one is passed over for an older one; one that does not fit is not."""
        if damaged and self._world.rank == 0:
            say(f"{candidate.path} is skipped: {reason}")
        self._rejected.append(candidate.path)
        self._good = None
        return damaged

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
        """Rank 0 clears away what lies there (it was rejected, or we would have resumed from it)."""
        if self._world.rank == 0:
            if target.directory.exists():
                directory.discard(target.directory)
            directory.begin(target.directory)

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
        self, target: Target, completed: int, seconds: float, size: int, metrics: dict[str, float]
    ) -> None:
        """Rank 0 makes it a checkpoint, and removes those that are no longer wanted."""
        self._last_save = time.monotonic()
        if self._world.rank != 0:
            return
        origin = Origin(
            step=completed, attempt=self.attempt, epoch=0, run_id=self._run_id, world_size=self._world.size,
            created=time.time(), metrics=metrics,
            versions={"torch": torch.__version__, "everstep": version(), "python": platform.python_version()},
        )  # fmt: skip
        try:
            seal(target.directory, origin, key=self._key)
            self._good = completed
            records = catalog.list_checkpoints(self._checkpoints, self._key)
            doomed = to_remove(records, self._policy, protected={completed})
            for record in records:
                if record.step in doomed and record.problem is None:
                    catalog.remove(record)
        except EverstepError as error:
            say(f"the checkpoint of step {completed} failed: {error}; training goes on")

    def failed(self, target: Target, completed: int, reason: str, *, torn: bool) -> None:
        """Nothing older was touched; what was written of it goes."""
        if self._world.rank == 0:
            say(f"the checkpoint of step {completed} failed: {reason}; training goes on")
            if directory.is_leftover(target.directory):
                directory.discard(target.directory)

    def tell(self, kind: str, **values: object) -> None:
        """Nobody listens."""
