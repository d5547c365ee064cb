"""The save point: is it one, are all ranks clean, where to, and then the save.

One small collective per save point settles all of it: the ranks take the maximum of (unclean, target, next due), where only
rank 0 has a target and a due step to offer.
"""

from __future__ import annotations

import math
import time
from typing import Final

from supervisor.edge.control import Phase, Word
from supervisor.errors import StorageError
from supervisor.model import ProposalFlag
from supervisor.training.engine import ArenaWriter
from supervisor.training.gradients import Gradients
from supervisor.training.items import Items
from supervisor.training.keeper import Keeper, Target
from supervisor.training.metrics import Metrics
from supervisor.training.state import TrainingState
from supervisor.training.supervised import Supervised, set_phase
from supervisor.training.world import World, say
from supervisor.training.writer import DcpWriter, SnapshotWriter, TornError, Written

_LONG: Final = 256  # steps that a save may be put off before that is said


class Saver:
    """Carries out what the keeper wants. ``due`` is the next step to look at."""

    def __init__(
        self, keeper: Keeper, training: TrainingState, gradients: Gradients, world: World, metrics: Metrics
    ) -> None:
        self.due = 0
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
                stepped=lambda: all(gradients.stepped),
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
        if self._writer.is_busy:
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
        before = set_phase(self._keeper.words, Phase.SAVE)
        try:
            return self._save_point(completed, flags, is_last=is_last)
        finally:
            set_phase(self._keeper.words, before)

    def flush(self) -> None:
        """Wait for what is under way."""
        self._writer.flush()

    def close(self) -> None:
        """Wait for what is under way; nothing is saved any more."""
        self._writer.close()

    def _save_point(self, completed: int, flags: ProposalFlag, *, is_last: bool) -> bool:
        self._writer.flush()  # before rank 0 looks for a free slot
        unclean = False if is_last else self._is_unclean()
        code, due = self._keeper.offer(completed, flags) if self._world.rank == 0 else (0, 0)
        agreed_unclean, code, due = self._world.largest([int(unclean), code, due])
        if agreed_unclean:
            self._carried = flags
            self._put_off += 1
            self.due = completed + 1
            if self._put_off % _LONG == 0 and self._world.rank == 0:
                names = ", ".join(self._gradients.pending()) or "another rank's optimizers"
                say(f"no save for {self._put_off} steps: gradients of {names} are pending at the end of each")
            return False
        self._carried = None
        self._put_off = 0
        asked = is_last or bool(flags)
        saved = code != 0 and self._save(self._keeper.target(code, completed), completed, behind=not asked)
        self._keeper.agreed(completed, due)
        self.due = self._keeper.due
        return saved and bool(flags & ProposalFlag.STOP)

    def _is_unclean(self) -> bool:
        # both are asked: each keeps count of what it has put off
        settled = self._training.buckets.is_settled()
        return bool(self._gradients.pending()) or not settled

    def _save(self, target: Target, completed: int, *, behind: bool) -> bool:
        metrics = {name: value for name, value in self._metrics.numbers().items() if math.isfinite(value)}
        self._failed = False

        def gather() -> Items:
            self._keeper.prepare(target)
            return self._training.gather(completed)

        def finished(outcome: Written | StorageError) -> None:
            if isinstance(outcome, Written):
                own = metrics if self._world.rank == 0 else {}
                self._keeper.saved(target, completed, outcome.seconds, outcome.bytes, own)
            else:
                self._failed = True
                torn = isinstance(outcome, TornError)
                self._keeper.failed(target, completed, str(outcome), torn=torn)

        self._writer.write(target.directory, gather, finished, behind=behind)
        self._keeper.words[Word.HEARTBEAT_NS] = time.monotonic_ns()
        return not self._failed
