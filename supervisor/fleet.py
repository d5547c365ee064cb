"""The vocabulary of a job on several nodes: what each node reports, and what the leader orders.

Both are whole states, not events: a node writes its report anew when something has changed, the leader its order. Whoever missed
some of them, or sees them late, knows after the next one what it would have known anyway. Only two things need care, and
``decide/agreement.py`` is about both. Nothing mutable.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from supervisor.decide import notices
from supervisor.model import Failure, ProposalFlag, ProposalState, Skip, StopCause, Tier

NODES = "node/"  # the directory of reports, by the node's name
JOB = "job/"
ORDER = "job/order"
LEADER = "job/leader"
#: what of an order is seldom new, and as long as there are nodes: each in a key of its own
PARTS = ("run", "standby", "origin")


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A save that the leader proposes to all ranks of an attempt. Serials grow for ever; 0: none was made yet."""

    serial: int = 0
    attempt: int = -1
    step: int = 0
    flags: int = 0  # ProposalFlag
    state: ProposalState = ProposalState.NONE

    @property
    def purpose(self) -> ProposalFlag:
        """What it is for."""
        return ProposalFlag(self.flags)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a node says to a proposal."""

    serial: int = 0
    confirmed: bool = False


@dataclass(frozen=True, kw_only=True)
class Held:
    """A snapshot's part in a node's RAM: the files of its ranks, whole. ``slot`` -1: it is a copy of another node's part."""

    attempt: int
    step: int
    slot: int
    node_rank: int
    nodes: int
    world_size: int


@dataclass(frozen=True, kw_only=True)
class Saved:
    """How the newest save of an attempt went on one node, for all its ranks. ``reason`` None: it is whole there."""

    attempt: int
    step: int
    slot: int
    seconds: float = 0.0
    bytes: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The end of an attempt on one node; no process of it is left there."""

    step: int | None = None
    finished: bool = False  # every rank there exited with code 0 by itself
    completed: bool = False  # … after the last step of a Session
    failure: Failure | None = None
    noticed: float | None = None  # Unix seconds
    unloadable: tuple[str, ...] = ()  # states that a rank could not load, though they are whole


@dataclass(frozen=True, kw_only=True)
class Course:
    """How an attempt goes on one node."""

    attempt: int
    world_size: int | None = None  # None until every rank there has greeted
    in_session: bool = False  # every rank there can take part in an agreed save
    has_session: bool = False
    first: int = 0  # completed steps of the rank that is behind
    last: int = 0  # … and of the furthest
    total_steps: int | None = None
    first_step_time: float | None = None  # Unix seconds at which the last rank there made its first step
    restore_seconds: float = 0.0
    request: int | None = None  # a rank asks for a checkpoint of this step
    saved: Saved | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    shares: tuple[int, ...] = ()  # by rank, percent of own time (decide/straggler.py); -1: not known yet
    ending: bool = False  # it has failed there, and is being cleared away
    ended: Ended | None = None


@dataclass(frozen=True, kw_only=True)
class Notice:
    """Word that the job must stop, as it reached a node."""

    cause: StopCause
    source: str
    deadline: float | None = None  # Unix seconds
    at_once: bool = False  # what can be saved in RAM is enough


@dataclass(frozen=True, kw_only=True)
class Part:
    """A node's part of a checkpoint: durable, or (``reason``) why not."""

    serial: int
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a node tells. ``life`` differs for each supervisor that ever ran there."""

    name: str
    life: str
    host: str
    pid: int
    address: str  # where other nodes reach it
    port: int  # reserved for the next rendezvous that it hosts
    shown: int = 0  # the port at which it shows its snapshots; 0: it does not
    copied: int = 0  # serial of the newest copy that it has made of its buddy's; negative: it could not
    rank: int | None = None  # what its user asked for
    seen: int = 0  # serial of the newest order that it has acted on
    course: Course | None = None  # of the newest attempt that it was part of
    ready: int = 0  # serial of the standby whose ranks all stand at the gate; 0: none
    answer: Answer = field(default_factory=Answer)
    prepared: int = 0  # serial of the newest slot made ready to be written; negative: it cannot be
    held: tuple[Held, ...] = ()
    part: Part | None = None
    probed: int = 0  # serial of the newest order to connect to other nodes that it has carried out
    unreached: tuple[str, ...] = ()  # … and who did not answer
    notice: Notice | None = None  # by a signal
    standing: tuple[notices.Notice, ...] = ()  # … and those of its machine
    leaving: bool = False  # it has carried out the last order, or was told to leave at once


@dataclass(frozen=True, kw_only=True)
class Member:
    """One node of an attempt."""

    name: str
    life: str


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """An attempt to launch: its nodes in the order of their ranks, and where they meet. ``standby`` > 0: made ahead."""

    attempt: int
    members: tuple[Member, ...]
    address: str
    port: int
    peers: tuple[str, ...] = ()  # HOST:PORT at which each shows its snapshots, by rank
    standby: int = 0

    def rank_of(self, name: str, life: str) -> int | None:
        """The node's rank, None where it has no part."""
        for rank, member in enumerate(self.members):
            if (member.name, member.life) == (name, life):
                return rank
        return None

    @property
    def names(self) -> tuple[str, ...]:
        """The nodes' names, by rank."""
        return tuple(member.name for member in self.members)

    def holder(self, rank: int) -> Holder:
        """The node of that rank, as who has its part of a snapshot."""
        address, _, port = self.peers[rank].rpartition(":")
        name, nodes = self.members[rank].name, len(self.members)
        return Holder(name=name, address=address, port=int(port), rank=rank, nodes=nodes)


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A node that has one node's part of a snapshot: the ``rank``-th of ``nodes``."""

    name: str
    address: str
    port: int
    rank: int
    nodes: int


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the ranks of an attempt resume: ``source`` is the snapshot in RAM, ``path`` a checkpoint; neither: from scratch."""

    attempt: int
    step: int = 0
    tier: Tier | None = None
    path: str | None = None
    emergency: bool = False  # it is an emergency copy, in the job directory
    fingerprint: str = ""  # of the checkpoint (``checkpoint/manifest.py``)
    source: int = -1  # the attempt that wrote the state
    slot: int = -1  # where the leader has the snapshot; so has every node before its ranks are told
    skips: tuple[Skip, ...] = ()  # steps that are left out
    holders: tuple[Holder, ...] = ()  # of every part of the snapshot, by rank; empty: each node has its own


@dataclass(frozen=True, kw_only=True)
class SlotOrder:
    """The slot that is written next: to be made ready by every node; ``offered`` once all have."""

    serial: int
    index: int
    offered: bool = False


@dataclass(frozen=True, kw_only=True)
class DrainOrder:
    """A snapshot that every node of the attempt that runs makes durable, each its own files."""

    serial: int
    attempt: int
    step: int
    bandwidth: float | None = None  # bytes a second, of each node
    world_size: int = 0
    created: float = 0.0  # Unix seconds
    metrics: dict[str, float] = field(default_factory=dict)
    emergency: bool = False  # into the job directory, as the checkpoints' place does not take it


@dataclass(frozen=True, kw_only=True)
class CopyOrder:
    """A snapshot of which every node is to keep a copy of its buddy's part: that of the node before it in the attempt that runs."""

    serial: int
    attempt: int
    step: int


@dataclass(frozen=True, kw_only=True)
class Final:
    """The end of the run."""

    exit_code: int
    reason: str
    saved: bool = True  # nothing is in RAM that is not durable


@dataclass(frozen=True, kw_only=True)
class Release:
    """A node that may leave, as it must. ``saved``: nothing is in its RAM that is wanted and not durable."""

    member: Member
    saved: bool = True


@dataclass(frozen=True, kw_only=True)
class Order:
    """What the leader wants of every node. ``serial`` grows with each; an older one is ignored."""

    serial: int
    leader: str
    epoch: int
    run_id: str
    save_every: tuple[int, ...] = ()  # numbers of steps whose multiples are save points
    run: Assignment | None = None
    standby: Assignment | None = None
    origin: Origin | None = None
    over: int = -1  # attempts up to this one are to be ended
    proposal: Proposal = field(default_factory=Proposal)
    slot: SlotOrder | None = None
    drain: DrainOrder | None = None
    copy: CopyOrder | None = None
    probe: int = 0  # a serial: each node of the attempt is to try whether it reaches the others
    stop: Notice | None = None
    released: tuple[Release, ...] = ()
    final: Final | None = None
