"""Who decides when and where a Session saves: one Protocol, and the keeper of a Session that nobody keeps."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from supervisor.decide.guard import GuardPolicy, Known
from supervisor.edge.control import SIZE
from supervisor.model import ProposalFlag, Skip
from supervisor.training.supply import Need

NEVER: Final = 1 << 62  # a step that does not come


class Stopped(SystemExit):
    """Raised out of ``steps`` when the job was asked to stop, after its state was saved: the worker exits with code 0."""

    def __init__(self) -> None:
        super().__init__(0)


@dataclass(frozen=True)
class Candidate:
    """A state to resume from: verified, or (``need``) as far as what is read of it was asked for before."""

    path: Path
    step: int
    need: Need | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Target:
    """Where a snapshot goes: ``code`` is what the ranks agree on, never 0."""

    code: int
    directory: Path


class Keeper(Protocol):
    """One rank's view of the authority over saves.

    ``words`` is the control page (or a stand-in of the same layout). In an ordinary step the Session only writes STEP and
    HEARTBEAT_NS and compares PROPOSAL with ``settled``; it asks ``wants`` when that differs or when step ``due`` has come.
    """

    words: memoryview
    attempt: int
    due: int
    settled: int
    #: what to watch the logged numbers for, if that was asked for
    guard: GuardPolicy | None
    #: steps that are left out; known once a candidate was asked for
    skips: tuple[Skip, ...]
    #: what earlier attempts have met; likewise
    known: Known

    def candidate(self) -> Candidate | None:
        """Where to resume, alike on all ranks; asked again after a rejection. Collective."""
        ...

    def rejected(self, candidate: Candidate, reason: str, *, damaged: bool) -> bool:
        """This or another rank could not load it; whether there may be another candidate."""
        ...

    def wants(self, completed: int) -> ProposalFlag | None:
        """Whether ``completed`` may be a save point, and what for. The same answer on all ranks."""
        ...

    def offer(self, completed: int, flags: ProposalFlag) -> tuple[int, int]:
        """Asked of rank 0 at a save point: the code of the target (0: skip it), and the next step to come together."""
        ...

    def target(self, code: int, completed: int) -> Target:
        """The target that rank 0 chose."""
        ...

    def prepare(self, target: Target) -> None:
        """Make the target ready to be written, where the writer's own clearing is not enough. May raise OSError."""
        ...

    def agreed(self, completed: int, due: int) -> None:
        """The save point at ``completed`` is over; ``due`` is what rank 0 said comes next."""
        ...

    def saved(
        self,
        target: Target,
        completed: int,
        seconds: float,
        size: int,
        metrics: dict[str, float],
        names: Collection[str],
    ) -> str | None:
        """This rank's part is whole, and so is every other's; ``names`` (rank 0's) are the files of all. Collective.

        Returns what went wrong nevertheless, alike on all ranks; None when nothing did.
        """
        ...

    def failed(self, target: Target, completed: int, reason: str, *, torn: bool) -> None:
        """The save failed: on all ranks alike, and then this is collective; or ``torn`` on this rank alone."""
        ...

    def request(self, step: int) -> None:
        """``session.save()``: save when ``step`` steps are complete."""
        ...

    def tell(self, kind: str, **values: object) -> None:
        """News for the supervisor, if there is one."""
        ...

    def close(self) -> None:
        """The Session is left, or was not entered: let go of what is held."""
        ...


class Unkept:
    """Nobody keeps the state: nothing is resumed, nothing saved."""

    def __init__(self) -> None:
        self.words = memoryview(bytearray(SIZE)).cast("Q")
        self.attempt = 0
        self.due = NEVER
        self.settled = 0
        self.guard: GuardPolicy | None = None
        self.skips: tuple[Skip, ...] = ()
        self.known = Known()

    def candidate(self) -> Candidate | None:
        """None."""
        return None

    def rejected(self, candidate: Candidate, reason: str, *, damaged: bool) -> bool:
        """Never asked."""
        raise AssertionError("there was no candidate")

    def wants(self, completed: int) -> ProposalFlag | None:
        """Nothing, ever."""
        self.due = NEVER
        return None

    def offer(self, completed: int, flags: ProposalFlag) -> tuple[int, int]:
        """No place to save to."""
        return 0, NEVER

    def target(self, code: int, completed: int) -> Target:
        """Never asked."""
        raise AssertionError("there was no offer")

    def prepare(self, target: Target) -> None:
        """Never called."""

    def agreed(self, completed: int, due: int) -> None:
        """Nothing comes next."""
        self.due = NEVER

    def saved(
        self,
        target: Target,
        completed: int,
        seconds: float,
        size: int,
        metrics: dict[str, float],
        names: Collection[str],
    ) -> str | None:
        """Never called."""
        raise AssertionError("there was no target")

    def failed(self, target: Target, completed: int, reason: str, *, torn: bool) -> None:
        """Never called."""

    def request(self, step: int) -> None:
        """Ignored."""

    def tell(self, kind: str, **values: object) -> None:
        """Ignored."""

    def close(self) -> None:
        """Nothing is held."""
