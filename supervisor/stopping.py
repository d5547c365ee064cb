"""A stop that was asked for: by whom, how long it may take, and what can be saved in that time."""

from __future__ import annotations

import asyncio
import math
import signal
from collections.abc import Callable, Collection
from typing import Protocol

from supervisor.deadlines import Deadlines
from supervisor.decide import notices
from supervisor.decide.deadline import Deadline
from supervisor.decide.notices import Notice, Plan
from supervisor.draining import Draining
from supervisor.edge import clock
from supervisor.edge.console import Console
from supervisor.engine import Engine
from supervisor.ledger import Ledger
from supervisor.model import StopCause, StopRequested, StopWithdrawn
from supervisor.noticing import Noticing, means
from supervisor.warden import Warden


class Fellows(Protocol):
    """The nodes of a job that has several, as far as one that must leave is no reason to stop it: ``Reshaping``."""

    @property
    def leaving(self) -> Collection[str]:
        """Those that the job is about to go on without."""
        ...

    def go_on_without(self, node: str, source: str, deadline: float | None) -> bool:
        """``source`` wants that node away: whether the job goes on without it."""
        ...

    def keep(self, node: str, source: str) -> bool | None:
        """``source`` does not, after all: whether the node stays; None: it never had to leave for that."""
        ...


class Stopping:
    """Of one run: at most one stop at a time.

    ``begun`` is called when there is one, ``end`` when its time is up, ``recalled`` to take it back (it returns whether that
    could be done), ``save`` to have a checkpoint made soon.
    """

    def __init__(
        self,
        engine: Engine,
        ledger: Ledger,
        console: Console,
        draining: Draining,
        grace: float,
        *,
        begun: Callable[[], None],
        end: Callable[[], None],
        recalled: Callable[[], bool],
        save: Callable[[], None],
        warden: Warden,
    ) -> None:
        self._ledger, self._console, self._draining, self._warden = ledger, console, draining, warden
        self._deadlines = Deadlines(engine, ledger, grace, self._on_deadline)
        self._begun, self._end, self._recalled, self.save = begun, end, recalled, save
        self._noticing = Noticing(self, ledger, console)
        self._standing: tuple[Notice, ...] = ()
        self._watch: asyncio.Task[None] | None = None
        self._has_engine = not math.isinf(engine.period)
        self._began = (0.0, 0.0)  # Unix, and monotonic
        self._patience = grace  # seconds that the stop may take
        self._time_up: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[object]] = set()
        #: where there are several nodes
        self.fellows: Fellows | None = None
        #: what was asked for, and by whom
        self.requested: StopRequested | None = None
        #: set once there is a stop
        self.seen = asyncio.Event()
        #: why it was not waited for: ``user``, ``grace``, or ``plan``: there is no time for a new snapshot
        self.cut_short: str | None = None

    def listen(self) -> None:
        """Hear signals and notices, and keep deadlines, from now on."""
        self._warden.listen()
        self._warden.attend(self)
        self._watch_deadlines()

    def _watch_deadlines(self) -> None:
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._deadlines.watch())
            self._background(self._watch)

    def time_left(self, at_most: float) -> float | None:
        """Seconds that whoever is told of the end may take; None: as long as it may at any time."""
        if self.cut_short == "user":
            return 0.0
        deadline = self._draining.deadline
        return None if deadline is None else min(at_most, max(1.0, deadline - clock.monotonic()))

    # ------------------------------------------------------------------ who asks for it

    def on_signal(self, signum: signal.Signals) -> None:
        """A signal to this node: where there are more, it leaves; a scheduler's is for all of them."""
        if self.requested is None:
            cause = StopCause.USER if signum is signal.SIGINT else StopCause.PREEMPTION
            node = self._warden.node
            if (
                cause is StopCause.PREEMPTION
                and node is not None
                and not self._has_engine
                and self._can_spare(node, f"{signum.name} on {node}")
            ):
                return
            again = "; Ctrl-C again stops at once" if cause is StopCause.USER else ""
            self._begin(StopRequested(time=clock.now(), cause=cause, source=signum.name), again)
        elif signum is signal.SIGINT:
            self._console.say("stopping at once")
            self._end_now("user")
            return
        self._background(asyncio.create_task(self._learn_deadline()))

    def on_notices(self, standing: tuple[Notice, ...]) -> None:
        """These notices of this machine stand."""
        self._noticing.standing(standing, self._warden.node)

    def on_nodes_notices(self, node: str, standing: tuple[Notice, ...]) -> None:
        """These notices of another node's machine stand."""
        self._noticing.standing(standing, node)

    def left(self, node: str) -> None:
        """Another node is gone."""
        self._noticing.left(node)

    def _on_deadline(self, deadline: Deadline) -> bool:
        if deadline.node is not None and self._can_spare(deadline.node, deadline.source, deadline.end):
            return False
        if self.requested is None:
            now, cause = clock.now(), StopCause.PREEMPTION
            left = f" (in {max(0.0, deadline.end - now):.0f} s)"
            self._begin(
                StopRequested(time=now, cause=cause, source=deadline.source, deadline=deadline.end), left
            )
        return True

    def hear(self, standing: tuple[Notice, ...]) -> None:
        """These notices stand."""
        self._standing = standing
        self._hear_deadline()
        if self.requested is not None:
            self._limit()

    def heed(self, notice: Notice) -> None:
        """A notice that asks for a stop now."""
        if notice.node is None:
            self.ask(StopCause.PREEMPTION, notice.source, notice.deadline)
        else:
            self.depart(notice.node, notice.source, notice.deadline)

    def depart(self, node: str, source: str, deadline: float | None = None) -> None:
        """That node of several must leave: the job goes on without it where it can, and stops where not."""
        if not self._can_spare(node, source, deadline):
            self.ask(StopCause.PREEMPTION, source, deadline)

    def _can_spare(self, node: str, source: str, deadline: float | None = None) -> bool:
        if self.requested is not None or self.fellows is None:
            return False
        spared = self.fellows.go_on_without(node, source, deadline)
        self._hear_deadline()
        return spared

    def _hear_deadline(self) -> None:
        """Who leaves anyway needs no other deadline, unless all of the job stops."""
        leaving = self.fellows.leaving if self.fellows is not None and self.requested is None else ()
        self._deadlines.hear(
            notices.deadline([notice for notice in self._standing if notice.node not in leaving])
        )

    def ask(self, cause: StopCause, source: str, deadline: float | None = None) -> None:
        """Somebody else than a signal, the engine or a cloud asks for a stop."""
        if self.requested is None:
            self._begin(StopRequested(time=clock.now(), cause=cause, source=source, deadline=deadline), "")

    def recall(self, notice: Notice, *, needless: bool) -> bool | None:
        """What it asked for is needless: whether it was taken back; None: it asked for nothing, or others still do."""
        source = notice.source
        if self.fellows is not None and notice.node is not None:
            kept = self.fellows.keep(notice.node, source)
            self._hear_deadline()
            if self.requested is None:
                return kept
        if self.requested is None or self.requested.source != source:
            return None
        if not needless or self._warden.signal is not None:
            return None
        if self.cut_short or not self._recalled():
            return False
        if self._time_up is not None:
            self._time_up.cancel()
        self._ledger.add(StopWithdrawn(time=clock.now(), source=source))
        self.requested = self._draining.deadline = None
        self.seen.clear()
        self._watch_deadlines()
        return True

    # ------------------------------------------------------------------ the time it has

    def afford(self, deadline: float | None) -> tuple[float, Plan]:
        """How long a save may take that is wanted by ``deadline`` (Unix seconds; None: nobody says), and what can be saved in it."""
        end = None if deadline is None else Deadline(source="", end=deadline, kill=deadline)
        patience = self._deadlines.patience_for(end, clock.now())
        return patience, notices.plan(None if end is None else patience, means(self._ledger, self._draining))

    def _begin(self, stop: StopRequested, remark: str) -> None:
        self.requested, self._began = stop, (clock.now(), clock.monotonic())
        self._ledger.add(stop)
        self._hear_deadline()
        self._limit()
        timed = stop.cause is StopCause.PREEMPTION and self._deadlines.nearest is not None
        plan = notices.plan(self._patience if timed else None, means(self._ledger, self._draining))
        self._console.say(
            f"{stop.source}: {plan.value} and stop; they have {self._patience:.3g} s{remark}"
            if plan is Plan.SAVE
            else f"{stop.source}: {self._patience:.3g} s are too short for a new snapshot; {plan.value}"
        )
        self.seen.set()
        self._begun()
        if plan is not Plan.SAVE:
            self._end_now("plan")

    async def _learn_deadline(self) -> None:
        """A signal says nothing of the time that is left; the engine may."""
        deadline, before = await self._deadlines.look(), self._patience
        if deadline is not None:
            self._limit()
            if self._patience < before - 1:
                self._console.say(f"{deadline.source}: they have {self._patience:.3g} s only")

    def _limit(self) -> None:
        """The stop may take as long as the deadline allows that is known now, counted from its beginning."""
        unix, monotonic = self._began
        self._patience = self._deadlines.patience(unix)
        self._draining.deadline = monotonic + self._patience
        if self._time_up is not None:
            self._time_up.cancel()
        left = self._draining.deadline - clock.monotonic()
        self._time_up = asyncio.get_running_loop().call_later(left, self._end_now, "grace")

    def _end_now(self, why: str) -> None:
        self.cut_short = self.cut_short or why
        if why == "user":
            self._draining.cancel()
        self._end()

    def _background(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)  # the loop itself would forget it
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # a bug of ours must not end the training; but deadlines and notices may not be seen any more
            self._console.say(
                f"unexpected {type(error).__name__} in what watches for the end of the job: {error}"
            )
