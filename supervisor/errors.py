"""Every error that everstep raises on purpose, split by whose fault it is.

Each carries the exit code of ``everstep run``; its text is one line that says what is wrong, where,
and what is allowed or to do next.
"""

from __future__ import annotations


class EverstepError(Exception):
    """The root: an error with a one-line message meant for the user."""

    exit_code = 70


class UsageError(EverstepError):
    """The command line is wrong (EX_USAGE)."""

    exit_code = 64


class ConfigError(EverstepError):
    """The configuration is wrong or contradicts itself (EX_CONFIG)."""

    exit_code = 78


class JobError(EverstepError):
    """The job directory cannot be used: another job's, held by another supervisor, not writable."""

    exit_code = 78


class StorageError(EverstepError):
    """Storage refused or lost a write; the training's own state is untouched."""

    exit_code = 1


class CancelledError(StorageError):
    """It was told to stop, and did."""


class CheckpointError(EverstepError):
    """A checkpoint is missing, damaged, or does not authenticate."""

    exit_code = 1


class StateMismatchError(EverstepError):
    """A checkpoint is whole, but its keys, shapes or dtypes are not those of the training."""

    exit_code = 1


class ProtocolError(EverstepError):
    """Worker and supervisor disagree: a bug of ours."""

    exit_code = 70


class StoreError(EverstepError):
    """The store through which the nodes agree does not answer, or refuses us; the training's own state is untouched."""

    exit_code = 75


class LeaseLostError(StoreError):
    """The lease that something was to be put under has run out."""


class PeerError(EverstepError):
    """Another node does not hand over its snapshot: dead, cut off, hung, or not of this job."""

    exit_code = 1


class SnapshotGoneError(PeerError):
    """The other node is well, and does not hold that snapshot, or not any more: a newer one has taken its place."""


class LeadershipLostError(EverstepError):
    """Another node leads the job now: this one decides nothing any more."""

    exit_code = 75


class LeadGivenUpError(LeadershipLostError):
    """… because it must leave, and the job goes on without it. ``saved``: nothing is in its RAM that is not durable."""

    def __init__(self, reason: str, *, saved: bool) -> None:
        super().__init__(reason)
        self.saved = saved
