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
from supervisor.training.gradients import Gradients
from supervisor.training.items import Items
from supervisor.training.keeper import Keeper, Target
from supervisor.training.metrics import Metrics
from supervisor.training.state import TrainingState
from supervisor.training.supervised import Supervised, set_phase
from supervisor.training.world import World, say
from supervisor.training.writer import DcpWriter, SnapshotWriter, Written

_LONG: Final = 256  # steps that a save may be put off before that is said
LAST_TRIES: Final = 3  # more, for the save after the last step


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
        local = isinstance(keeper, Supervised)
        self._writer: SnapshotWriter = DcpWriter(
            world, cleans=(world.local_rank if local else world.rank) == 0
        )
        self._carried: ProposalFlag | None = None  # what an unclean save point was for
        self._put_off = 0
        self._failed = False

    def end_of_step(self, completed: int, *, is_last: bool) -> bool:
        """Save if this is a save point and all ranks are clean. Returns whether the job is to stop now. Collective."""
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
            stop = self._save_point(completed, flags, is_last=is_last)
            for _ in range(LAST_TRIES if is_last else 0):  # no later save point will make up for this one
                if self._failed:
                    stop = self._save_point(completed, flags, is_last=True)
            return stop
        finally:
            set_phase(self._keeper.words, before)

    def flush(self) -> None:
        """Wait for what is under way."""
        self._writer.flush()

    def _save_point(self, completed: int, flags: ProposalFlag, *, is_last: bool) -> bool:
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
        saved = code != 0 and self._save(self._keeper.target(code, completed), completed)
        self._keeper.agreed(completed, due)
        self.due = self._keeper.due
        return saved and bool(flags & ProposalFlag.STOP)

    def _is_unclean(self) -> bool:
        # both are asked: each keeps count of what it has put off
        settled = self._training.buckets.is_settled()
        return bool(self._gradients.pending()) or not settled

    def _save(self, target: Target, completed: int) -> bool:
        started = time.monotonic()
        metrics = {name: value for name, value in self._metrics.numbers().items() if math.isfinite(value)}
        self._failed = False

        def gather() -> Items:
            self._keeper.prepare(target)
            return self._training.gather(completed)

        def finished(outcome: Written | StorageError) -> None:
            if isinstance(outcome, Written):
                seconds = time.monotonic() - started
                own = metrics if self._world.rank == 0 else {}
                self._keeper.saved(target, completed, seconds, outcome.bytes, own)
            else:
                self._failed = True
                self._keeper.failed(target, completed, str(outcome))

        self._writer.write(target.directory, gather, finished)
        self._keeper.words[Word.HEARTBEAT_NS] = time.monotonic_ns()
        return not self._failed
