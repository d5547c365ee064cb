"""What a notice asks for, and what can still be saved before its deadline. Pure; all times in seconds.

Whoever may end the machine (a cloud, a scheduler) is watched by a *source*. A source says which notices stand, again and
again; what is new and what was taken back is the difference. The same event keeps its ``key`` as long as it stands.

Every notice is answered at once by saving, since it may be wrong about the time that is left. The rest depends on what it
says. A *warning* asks for no more than that. One with a time (*leave*) also stops the job, in time for it, and until then it
can be withdrawn. One that is *urgent* stops the job now: clouds promise two minutes or half a minute, and not even that.

``plan`` compares the time that is left with what saving was measured to take. A save is the rest of the step, the copy into
memory, the drain that is under way, and its own drain. If all that fits, the newest state is saved. If not, a snapshot
that is in memory already and whose drain fits is better than a newer one whose drain would be cut off, and a drain that is
under way and will end in time is better than either. If nothing fits, what needs least is tried: a drain that is cut off
leaves what was durable before.
"""

from __future__ import annotations

import enum
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Final

from supervisor.decide.deadline import Deadline
from supervisor.model import Effect, NoticeReceived, Scope

SAFETY: Final = 1.25  # on what is measured
TEARDOWN: Final = 1.0  # seconds: the way to the save point, and the end of the workers
SAME: Final = 2.0  # seconds by which the deadline of a notice may wander


@dataclass(frozen=True, kw_only=True)
class Notice:
    """Word that this machine, or the job, may be taken away. ``deadline``: Unix seconds of this host's clock."""

    source: str  # who says what, for people: "AWS spot: stop"
    key: str  # tells it from any other notice
    effect: Effect
    deadline: float | None = None  # None: it says no time
    scope: Scope = Scope.NODE
    revocable: bool = False  # whether the source ever takes one back
    node: str | None = None  # of several, the one that it is for; None: this one, which is alone

    def fact(self, now: float) -> NoticeReceived:
        """For the journal."""
        return NoticeReceived(
            time=now, source=self.source, key=self.key, effect=self.effect, deadline=self.deadline,
            scope=self.scope, revocable=self.revocable, node=self.node,
        )  # fmt: skip


@dataclass(frozen=True)
class Change:
    """Between two looks at a source: what is ``news`` (or says another time or effect), and what was ``withdrawn``."""

    news: tuple[Notice, ...]
    withdrawn: tuple[Notice, ...]


def compare(known: Collection[Notice], standing: Collection[Notice]) -> Change:
    """What has changed from the ``known`` notices to those that are ``standing`` now."""
    before = {notice.key: notice for notice in known}
    now = {notice.key for notice in standing}
    return Change(
        news=tuple(notice for notice in standing if _is_news(notice, before.get(notice.key))),
        withdrawn=tuple(notice for notice in known if notice.key not in now),
    )


def _is_news(notice: Notice, before: Notice | None) -> bool:
    if before is None or notice.effect is not before.effect:
        return True
    if notice.deadline is None or before.deadline is None:
        return notice.deadline is not before.deadline
    return abs(notice.deadline - before.deadline) > SAME


def deadline(standing: Collection[Notice]) -> Deadline | None:
    """The nearest end among those that ask for a stop; None: no such notice, or none with a time."""
    ends = [
        (n.deadline, n.source, n.node)
        for n in standing
        if n.effect is not Effect.WARN and n.deadline is not None
    ]
    if not ends:
        return None
    end, source, node = min(ends, key=lambda end: end[:2])
    return Deadline(source=source, end=end, kill=end, node=node)


def urgent(standing: Collection[Notice]) -> Notice | None:
    """The notice for which the job must stop now."""
    return next((notice for notice in standing if notice.effect is Effect.STOP), None)


def as_of(notice: Notice, began: float) -> Notice:
    """The notice as a run takes it that ``began`` then.

    One whose time was over by then has stopped the run before this one, or has come to nothing: to stop again would only
    idle until the machine does go.
    """
    if notice.effect is Effect.WARN or notice.deadline is None or notice.deadline > began:
        return notice
    return replace(notice, effect=Effect.WARN)


def of_node(notice: Notice, node: str | None) -> Notice:
    """The notice as the leader of several nodes knows it, of that one: told from the same notice of another."""
    if node is None:
        return notice
    return replace(notice, source=f"{notice.source} on {node}", key=f"{node}/{notice.key}", node=node)


class Plan(enum.Enum):
    """What a stop saves."""

    SAVE = "all ranks save the same step"
    DRAIN = "the snapshot in memory is made durable"
    FINISH = "the checkpoint that is being written is finished"


@dataclass(frozen=True, kw_only=True)
class Means:
    """What there is to save, and what saving took; times in seconds, None: not measured, or not there."""

    step: float | None = None  # one step
    copy: float | None = None  # one snapshot
    drain: float | None = None  # one checkpoint, from a snapshot in memory
    under_way: float | None = None  # how long the drain that is running has been running; None: none is
    unsaved: bool = False  # whether a snapshot in memory is newer than what is durable or being drained


def plan(left: float | None, means: Means) -> Plan:
    """What to save in the ``left`` seconds; None: no deadline is known."""
    if left is None or means.drain is None:
        return Plan.SAVE  # nothing is known that speaks against it
    rest = 0.0 if means.under_way is None else max(0.0, means.drain - means.under_way)
    needs = {Plan.SAVE: (means.step or 0.0) + (means.copy or 0.0) + rest + means.drain}
    if means.unsaved:
        needs[Plan.DRAIN] = rest + means.drain
    if means.under_way is not None:
        needs[Plan.FINISH] = rest
    for what in Plan:  # the newest state first
        if what in needs and TEARDOWN + SAFETY * needs[what] <= left:
            return what
    return min(needs, key=lambda what: needs[what])
