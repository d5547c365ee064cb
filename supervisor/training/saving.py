"""The save point: is it one, are all ranks clean, where to, and then the save.

One small agreement per save point (``World.agreed``) settles all of it: the ranks take the maximum of (unclean, target, next due), where only
rank 0 has a target and a due step to offer. It also tells whether all of them are at the same step.

The last step of a loop is a save point like any other: another loop may follow (an epoch's), so a save that is unclean
there is carried to that loop's first step. What is still carried when the Session is left is saved then, as it is, with a
note of what was pending.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Final

from supervisor.edge.control import Phase, Word
from supervisor.errors import StorageError, UsageError
from supervisor.model import ProposalFlag
from supervisor.training.engine import ArenaWriter
from supervisor.training.gradients import Gradients
from supervisor.training.items import Items
from supervisor.training.keeper import Keeper, Target, Unkept
from supervisor.training.metrics import Metrics
from supervisor.training.state import TrainingState
from supervisor.training.supervised import Supervised, set_phase
from supervisor.training.world import World, say
from supervisor.training.writer import (
    ASK,
    DcpWriter,
    Gather,
    SnapshotWriter,
    TornError,
    UnsavableError,
    Written,
)

PATIENCE: Final = (
    256  # steps that a save is put off for pending gradients; rather a save without them than none
)
LAST_TRIES: Final = 3  # more, for the save after the last step


class Saver:
    """Carries out what the keeper wants. ``due`` is the next step to look at, ``saved`` the last that was saved."""

    def __init__(
        self, keeper: Keeper, training: TrainingState, gradients: Gradients, world: World, metrics: Metrics
    ) -> None:
        self.due = 0
        self.saved = -1
        self._keeper = keeper
        self._training = training
        self._gradients = gradients
        self._world = world
        self._metrics = metrics
        self._writer: SnapshotWriter = (
            ArenaWriter(
                world,
                cleans=world.local_rank == 0,
                slots=keeper.slots,
                optimizers=training.optimizers,
                completed=lambda: keeper.words[Word.STEP],
            )
            if isinstance(keeper, Supervised)
            else DcpWriter(world, cleans=world.rank == 0)
        )
        self._carried: ProposalFlag | None = None  # what an unclean save point was for
        self._put_off = 0
        self._failed = False

    def end_of_step(self, completed: int, *, is_last: bool) -> bool:
        """Save if this is a save point and all ranks are clean. Returns whether the job is to stop now. Collective."""
        self._writer.poll()
        stop = self._end_of_step(completed, is_last=is_last)
        if self._writer.is_busy or self._carried is not None:
            self.due = completed + 1
        return stop

    def _end_of_step(self, completed: int, *, is_last: bool) -> bool:
        flags = self._keeper.wants(completed)
        if self._carried is not None:
            flags = (flags or ProposalFlag(0)) | self._carried
        if is_last:
            flags = (flags or ProposalFlag(0)) | ProposalFlag.CHECKPOINT
        self.due = self._keeper.due
        if flags is None:
            return False
        return self._save_points(completed, flags, is_last=is_last, forced=False)

    def leave(self, step: int, *, broken_out: bool, asked: bool) -> int:
        """The Session is left in order, ``step`` steps complete: save what is still to be saved, clean or not.

        ``broken_out``: the loop was left in a step, which counts as complete if a save was ``asked`` for at its end.
        Returns the steps complete. Collective, if there is something to save and all ranks leave in order.
        """
        self.flush()
        if broken_out and not asked:  # part of the step may have been done: its start can no longer be saved
            kept = not isinstance(self._keeper, Unkept)
            if kept and self._world.rank == 0 and self.saved != step:
                say(f"step {step} was broken out of: it is not counted, and what it did is not saved")
            return step
        if not broken_out and self._carried is None:
            return step
        if not self._world.all_left_in_order():
            say("the save at the end is lost: another rank did not leave the Session in order")
            return step
        if broken_out:
            step += 1
            self._keeper.words[Word.STEP] = step
            self.end_of_step(step, is_last=False)
        if self.saved != step:
            flags = ProposalFlag.CHECKPOINT | (self._carried or ProposalFlag(0))
            self._save_points(step, flags, is_last=True, forced=True)
        return step

    def flush(self) -> None:
        """Wait for what is under way."""
        self._writer.flush()

    def close(self) -> None:
        """Wait for what is under way; nothing is saved any more."""
        self._writer.close()

    def _save_points(self, completed: int, flags: ProposalFlag, *, is_last: bool, forced: bool) -> bool:
        # a save that was asked for may have to wait for its slot; of any other, agreeing on it is part of the step
        with self._saving() if flags or is_last else contextlib.nullcontext():
            stop = self._save_point(completed, flags, forced=forced)
            for _ in range(LAST_TRIES if is_last else 0):  # no later save point will make up for this one
                if self._failed:
                    stop = self._save_point(completed, flags, forced=forced)
            return stop

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """A phase of its own, with limits of its own: those of hangs."""
        words = self._keeper.words
        before = set_phase(words, Phase.SAVE)
        began = words[Word.HEARTBEAT_NS]
        try:
            yield
        finally:
            set_phase(words, before)
            if words[Word.SAVED_STEP]:  # those before the first snapshot may only have put it off
                words[Word.SAVE_NS] = max(words[Word.SAVE_NS], words[Word.HEARTBEAT_NS] - began)

    def _save_point(self, completed: int, flags: ProposalFlag, *, forced: bool) -> bool:
        self._writer.flush()  # before rank 0 looks for a free slot
        pending = self._gradients.pending()
        # both are asked: each keeps count of what it has put off
        unclean = (not self._training.buckets.is_settled() or bool(pending)) and not forced
        code, due = self._keeper.offer(completed, flags) if self._world.rank == 0 else (0, 0)

        def gather() -> Items:
            return self._training.gather_hastily(completed, pending)

        asked = ASK if unclean else self._writer.ask(gather, behind=not flags)
        agreed_unclean, code, due, asked = self._world.agreed(completed, [int(unclean), code, due, asked])
        self._failed = False
        if agreed_unclean and self._put_off < PATIENCE:
            self._carried = flags
            self._put_off += 1
            self.due = completed + 1
            return False
        if agreed_unclean and self._world.rank == 0:
            names = ", ".join(pending) or "another rank's optimizers"
            say(
                f"gradients of {names} were pending at the end of {PATIENCE} steps: step {completed} is saved without them, "
                "and a run that resumes there differs by them"
            )
        self._carried = None
        self._put_off = 0
        target = self._keeper.target(code, completed) if code else None
        saved = False
        if target is not None:
            with self._saving():
                saved = self._save(target, completed, gather, behind=not flags, agreed=asked)
        self._keeper.agreed(completed, due)
        self.due = self._keeper.due
        return saved and bool(flags & ProposalFlag.STOP)

    def _save(self, target: Target, completed: int, gather: Gather, *, behind: bool, agreed: int) -> bool:
        metrics = self._metrics.reading()

        def prepared() -> Items:
            self._keeper.prepare(target)
            return gather()

        def finished(outcome: Written | StorageError | None) -> None:
            problem: str | None
            if outcome is None:
                self._carried = ProposalFlag(0)
                return
            if isinstance(outcome, Written):
                told = metrics() if self._world.rank == 0 else {}
                finite = {name: value for name, value in told.items() if math.isfinite(value)}
                problem = self._keeper.saved(
                    target, completed, outcome.seconds, outcome.bytes, finite, outcome.names
                )
            else:
                problem = str(outcome)
                self._keeper.failed(target, completed, problem, torn=isinstance(outcome, TornError))
            self._failed = problem is not None
            if problem is None:
                self.saved = completed
            if isinstance(outcome, UnsavableError):
                raise UsageError(f"the state cannot be saved, now or later: {outcome}")

        self._writer.write(target.directory, prepared, finished, behind=behind, agreed=agreed)
        self._keeper.words[Word.HEARTBEAT_NS] = time.monotonic_ns()
        return not self._failed
