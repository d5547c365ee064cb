"""Whether a fault may be rehearsed on a job, and what the job will answer."""

from __future__ import annotations

from collections.abc import Collection

from supervisor.decide import lifecycle, restart
from supervisor.decide.rehearsal import ABOUT, Kind
from supervisor.model import Action, AttemptEnded, Failure, State, Verdict
from supervisor.record import JobRecord


def refusal(
    kind: Kind,
    record: JobRecord,
    *,
    alive: bool,
    host: str,
    rank: int | None,
    now: float,
    here: Collection[int] | None = None,
) -> str | None:
    """Why it cannot be rehearsed on this job now, from ``host``, on ``rank`` (None: any); None: it can.

    ``here``: the ranks that run on ``host``, of a job on several nodes.
    """
    if not alive:
        return f"no job is running there (it is {record.state.value}): a rehearsal needs a live one"
    if here is None and record.host != host:
        return f"the job runs on {record.host}, this is {host}: rehearse it there"
    if record.state is not State.RUNNING or record.attempt_first_time is None:
        return f"the job is {record.state.value}: wait until it makes steps"
    world = record.world_size or 0
    if rank is not None and not ABOUT[kind].of_rank:
        return f"{kind.value} strikes no single rank: leave --rank out"
    if rank is not None and not 0 <= rank < world:
        return f"there is no rank {rank}: the job has ranks 0 to {world - 1}"
    if here is not None and (why_not := _refusal_of_several(kind, record, host, rank, here)) is not None:
        return why_not
    verdict = foreseen(kind, record, now)
    if verdict is None:
        return None
    if record.resumed_step is not None and record.snapshot is None and record.checkpoint is None:
        return "nothing was saved yet, so everything would be done again: wait for the first snapshot"
    if verdict.action is Action.GIVE_UP:
        return f"the job would not survive it ({verdict.reason}): wait for its next snapshot"
    return None


def _refusal_of_several(
    kind: Kind, record: JobRecord, host: str, rank: int | None, here: Collection[int]
) -> str | None:
    if kind is Kind.CORRUPT_CHECKPOINT:
        return f"{kind.value} is for jobs on one node: of several, each has snapshots in memory that it would come back from"
    if not ABOUT[kind].of_rank and record.host != host:
        return f"{kind.value} strikes the supervisor that leads the job, which is on {record.host}, this is {host}: rehearse it there"
    if not here:
        return f"no rank of the job runs on {host}: rehearse it on a host that has some"
    if rank is not None and rank not in here:
        ranks = ", ".join(map(str, sorted(here)))
        return f"rank {rank} is not on {host}, which has {ranks}: rehearse it on its own host"
    return None


def foreseen(kind: Kind, record: JobRecord, now: float) -> Verdict | None:
    """The verdict that the fault will have, by the rules that will decide; None: it ends no attempt."""
    taken_for = ABOUT[kind].taken_for
    if taken_for is None or record.attempt is None:
        return None
    failure = Failure(
        kind=taken_for,
        reason="the rehearsed fault",
        attempt=record.attempt,
        time=now,
        step=record.step,
        exception="each says when it was raised, so no two are alike" if ABOUT[kind].inside else None,
    )
    ended = AttemptEnded(time=now, attempt=record.attempt, step=record.step, failure=failure, noticed=now)
    return restart.decide(lifecycle.apply(record, ended), failure)
