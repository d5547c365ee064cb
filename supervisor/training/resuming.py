"""Resuming: the ranks load the same state, or none of them goes on."""

from __future__ import annotations

from supervisor.errors import CheckpointError, EverstepError, StateMismatchError, StorageError
from supervisor.training.keeper import Candidate, Keeper
from supervisor.training.state import TrainingState
from supervisor.training.world import World

_FAULTS = (CheckpointError, StateMismatchError, StorageError)


def resume(keeper: Keeper, training: TrainingState, world: World) -> int | None:
    """Load what the keeper offers; the step, or None where there is nothing to resume from. Collective.

    After a failure on any rank all ranks try the next candidate or raise, each its own error or the first rank's: state
    that was loaded on some ranks, or by half, is never trained on.
    """
    tried: Candidate | None = None
    while (candidate := keeper.candidate()) is not None:
        tried = candidate
        step, failure = _load(candidate, training)
        told = None if failure is None else (_fault_of(failure), str(failure) or type(failure).__name__)
        failures = {rank: what for rank, what in enumerate(world.gather(told)) if what is not None}
        if not failures:
            return step
        # what does not fit on one rank is no damage on another
        rank = next((r for r, (fault, _) in failures.items() if fault is StateMismatchError), min(failures))
        fault, reason = failures[rank]
        faults = {found for found, _ in failures.values()}
        if candidate.need is not None:  # a store that does not answer is none either
            faults.discard(StorageError)
        damaged = StateMismatchError not in faults and bool(faults)
        if not keeper.rejected(candidate, reason, damaged=damaged):
            if failure is not None:
                raise failure
            raise fault(f"rank {rank}: {reason}")
    if tried is not None:
        raise CheckpointError(f"{tried.path} could not be loaded, and there is no other state to resume from")
    return None


def _load(candidate: Candidate, training: TrainingState) -> tuple[int, Exception | None]:
    try:
        step = training.load(candidate.path, candidate.need)
    except Exception as error:  # noqa: BLE001 (an object's load_state_dict may raise anything, and all ranks must hear)
        return 0, error
    if step != candidate.step:
        return 0, CheckpointError(
            f"{candidate.path} holds step {step}, not {candidate.step}: it was written over"
        )
    return step, None


def _fault_of(failure: Exception) -> type[EverstepError]:
    """What ranks raise where another one failed."""
    return next((fault for fault in _FAULTS if isinstance(failure, fault)), CheckpointError)
