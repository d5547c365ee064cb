"""The standby: the next attempt, launched ahead, so that a failure costs neither launch nor imports.

While attempt *k* trains, attempt *k+1* is started as it would be after a failure: a fresh torchrun with a port of its own.
Its workers boot, import what the script imported before (``launch/warmup.py``), and wait at a *gate* before the script's
first line; or, with ``--standby init``, runs the script ahead and waits in front of the first thing that would be noticed outside (``launch/ahead.py``).
What makes that safe:

- It is no attempt yet. It has the next attempt's number, because that is part of its environment, but nothing is
  journaled as that attempt before the gate opens; until then its end is not a failure and its messages count for nothing.
- It shares nothing with the attempt beside it: other processes, another port, other control pages. The two are told apart
  by their launchers and by the attempt number in their environments, so either is killed without touching the other.
- One standby of a number can follow another. Each launch has a serial number, which its workers say in their
  greeting, so that the last words of one that was killed are not taken for the next one's.
- It is used only when every rank stands at the gate, for a restart without delay. A failure that repeats without progress is
  answered by a cold start: should the standby have a part in it, that ends it.
- It yields: SCHED_BATCH until the gate opens. No CPU affinity, because libraries choose their numbers of threads by it
  while they are imported, and no niceness, because an unprivileged user could not take that back.
- It is started only after the first step, when the imports are known and start-up is over, and only with memory to spare. When that
  gets short it is dropped, and made again when there is enough. Should the kernel have to kill something, it takes the standby first.
- One that has run ahead is used only if no file that it has read, or looked for in vain, has changed since. Those that
  have, the next one does not read ahead. One that ends before it gets to its gate is followed by ones that do not run ahead.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from supervisor.attempt import Attempt
from supervisor.config import Options
from supervisor.edge import clock, marks, memory
from supervisor.edge.channel import Message, Peer
from supervisor.edge.console import Console
from supervisor.edge.ports import ReservedPort
from supervisor.errors import EverstepError, UsageError
from supervisor.launching import Launcher
from supervisor.ledger import Ledger
from supervisor.model import StandbyReady
from supervisor.program import Rendezvous
from supervisor.seat import Seat

DELAY = 2.0  # seconds after the first step
PATIENCE = 300.0  # seconds that its workers may take to the gate
LOOK = 1.0  # seconds between two looks at the memory that is left
AGAIN = 30.0  # seconds until memory that was short is looked at again
CHECK = 0.5  # seconds to look at the files that it has read
TRIES = 3  # for each attempt beside which it waits
LATER = 60.0  # seconds until there is one again after the last try, if that had got to its gate: not its start is at fault
ROOM = 2  # times what the workers hold now must be available


@dataclass(eq=False)
class Waiting:
    """A launched standby."""

    attempt: Attempt
    port: ReservedPort | None  # None: another node's, or held elsewhere
    launched: float
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    ahead: bool = False  # it runs the script ahead
    read: dict[str, marks.Mark] = field(default_factory=dict)  # what the script has read meanwhile
    standing: set[int] = field(default_factory=set)  # ranks at the gate
    was_ready: bool = False  # all of them stood there
    dropped: bool = False

    @property
    def is_ready(self) -> bool:
        """Whether every rank stands at the gate, alive."""
        seats = self.attempt.seats.values()
        return (
            self.attempt.is_full
            and len(self.standing) == len(seats)
            and not self.attempt.ended.is_set()
            and all(seat.end is None for seat in seats)
        )


class Standby:
    """At most one standby at a time: ``arm``, then ``take`` or ``drop``; ``end`` for good."""

    def __init__(
        self,
        *,
        enabled: bool,
        ahead: bool,
        keep_free: int,
        launcher: Launcher,
        folder_of: Callable[[int], Path],
        welcome: Message,
        ledger: Ledger,
        console: Console,
    ) -> None:
        self._enabled, self._launcher, self._folder_of = enabled, launcher, folder_of
        self._wished = enabled
        self._welcome, self._ledger, self._console = welcome, ledger, console
        self._ahead, self._keep_free = ahead, keep_free
        self._hold: set[str] = set()  # what changes between one attempt and the next
        self._where = ""
        self._imports: Message = {}
        self._waiting: Waiting | None = None
        self._beside: Attempt | None = None
        self._serial = 0
        self._tries = 0
        self._failed = False  # one of this number died by itself: its logs say why
        self._timer: asyncio.TimerHandle | None = None
        self._watch: asyncio.Task[None] | None = None
        self._dropping = asyncio.Lock()
        self._memory_said = self._imports_said = False
        self._meeting: Rendezvous | None = None  # of several nodes
        self.on_ready: Callable[[int], None] = lambda _serial: None
        self.on_lost: Callable[[int], None] = lambda _serial: None

    @classmethod
    def asked_for(
        cls,
        options: Options,
        launcher: Launcher,
        folder_of: Callable[[int], Path],
        welcome: Message,
        ledger: Ledger,
        console: Console,
    ) -> Standby:
        """As the options have it."""
        return cls(
            enabled=options.standby != "off",
            ahead=options.standby == "init",
            keep_free=memory.total() // 20 if options.standby_memory is None else options.standby_memory,
            launcher=launcher,
            folder_of=folder_of,
            welcome=welcome,
            ledger=ledger,
            console=console,
        )

    @property
    def attempt(self) -> Attempt | None:
        """What a teardown must spare."""
        return self._waiting.attempt if self._waiting else None

    # ------------------------------------------------------------------ its life

    def arm_for(self, beside: Attempt, serial: int, meeting: Rendezvous) -> None:
        """Launch this node's part of a standby on several nodes now; it is not launched again. Raises UsageError."""
        if not self._enabled or self._waiting is not None or not self._has_room(beside):
            raise UsageError("no standby here")
        self._beside, self._tries, self._failed = beside, 1, False
        self._serial, self._meeting = serial - 1, meeting
        self._launch()

    def arm(self, beside: Attempt) -> None:
        """Attempt ``beside`` has made its first step: launch a standby for it soon."""
        if self._enabled and self._waiting is None and self._timer is None:
            self._beside, self._tries, self._failed = beside, TRIES, False
            self._launch_soon()

    async def take(self, number: int, world_size: int | None) -> Waiting | None:
        """Hand over a standby that can begin as attempt ``number``, or None."""
        waiting = self._waiting
        if waiting is None or not waiting.is_ready:
            return None
        if (waiting.attempt.number, waiting.attempt.world_size) != (number, world_size):
            return None
        if waiting.read and not await self._is_up_to_date(waiting.read):
            return None
        if self._waiting is not waiting or not waiting.is_ready:
            return None
        self._waiting = None
        self._forget()
        return waiting

    async def _is_up_to_date(self, read: Mapping[str, marks.Mark]) -> bool:
        """Whether all that it has read is as it was. Storage that does not answer is not waited for."""
        try:
            changed = await asyncio.wait_for(asyncio.to_thread(marks.changed, read), CHECK)
        except TimeoutError:
            self._console.say(
                "the standby is not used: the files that it has read could not be looked at in time"
            )
            return False
        if changed:
            self._hold |= {name for name in changed if not name.endswith((".py", ".pyc"))}
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            self._console.say(f"the standby is not used: it has read {changed[0]}{more}, which changed since")
        return not changed

    async def drop(self) -> None:
        """Kill and forget what there is; whether anything was launched is no matter."""
        self._forget()
        async with self._dropping:
            if self._waiting is not None:
                await self._discard(self._waiting)

    async def end(self) -> None:
        """``drop``, and no standby any more."""
        self._enabled = False
        await self.drop()

    def allow(self) -> None:
        """After an ``end`` that was for nothing: there is a standby again from the next first step on."""
        self._enabled = self._wished

    def _forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    def _launch_soon(self, delay: float = DELAY) -> None:
        self._timer = asyncio.get_running_loop().call_later(delay, self._launch)

    def _launch(self) -> None:
        self._timer = None
        beside = self._beside
        if not self._enabled or beside is None or beside.ended.is_set():
            return
        if not self._has_room(beside):
            self._launch_soon(AGAIN)
            return
        self._serial += 1
        self._tries -= 1
        number = beside.number + 1
        launcher = self._launcher
        meeting = self._meeting
        attempt = Attempt(
            number, self._folder_of(number), launcher.runtime, launcher.run_id, standby=self._serial,
            nodes=meeting.nodes if meeting else 1, node_rank=meeting.node_rank if meeting else 0,
        )  # fmt: skip
        try:
            port = self._launcher.launch(attempt, meeting)
        except (
            EverstepError
        ) as error:  # the program has gone since it was started; a cold start will say so too
            self._console.say(f"no standby: {error}")
            return
        self._waiting = Waiting(attempt, port, clock.monotonic(), ahead=self._ahead)
        self._watch = asyncio.get_running_loop().create_task(self._watch_over(self._waiting))

    def _has_room(self, beside: Attempt) -> bool:
        needed = self._keep_free + ROOM * memory.resident(seat.pid for seat in beside.seats.values())
        there = memory.available()
        if there is None or there >= needed:
            return True
        if not self._memory_said:
            self._memory_said = True
            self._console.say(
                f"no standby: {there / 1e9:.1f} GB of memory are available, {needed / 1e9:.1f} GB would be needed"
            )
        return False

    async def _watch_over(self, waiting: Waiting) -> None:
        """Until it is taken or dropped (cancelled): a standby that ends, or never gets ready, is replaced."""
        ended, late = waiting.attempt.ended, clock.monotonic() + PATIENCE
        short = False
        while not ended.is_set() and not short and (waiting.is_ready or clock.monotonic() < late):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), LOOK)
            short = self._is_short_of_memory()
        if short:
            self._tries += 1  # no fault of its own
        elif not self._failed:
            self._failed = True
            self._console.say(f"the standby has ended ({waiting.attempt.logs}); training goes on")
            if waiting.ahead and not waiting.is_ready:
                self._ahead = False
                self._console.say(
                    "it had not come to init_process_group: the next ones wait before the script begins"
                )
        async with self._dropping:
            if self._waiting is waiting:
                await self._discard(waiting)
        self._watch = None
        pause = AGAIN if short else DELAY
        if self._tries == 0 and waiting.was_ready:
            self._tries, pause = 1, LATER
        if self._tries > 0 and self._enabled and self._meeting is None:
            self._launch_soon(pause)

    def _is_short_of_memory(self) -> bool:
        there = memory.available()
        if there is None or there >= self._keep_free:
            return False
        self._console.say(
            f"the standby makes way: {there / 1e9:.1f} GB of memory are available, {self._keep_free / 1e9:.1f} GB are to stay free"
        )
        return True

    async def _discard(self, waiting: Waiting) -> None:
        waiting.dropped = True
        waiting.gate.set()
        await waiting.attempt.withdraw()
        waiting.attempt.close()
        if waiting.port is not None:
            waiting.port.release()
        self.on_lost(waiting.attempt.standby)
        if not self._failed and waiting.attempt.nodes == 1:  # else the folder is others', too
            shutil.rmtree(waiting.attempt.folder, ignore_errors=True)  # an attempt that never was
        self._waiting = None

    # ------------------------------------------------------------------ what its workers say

    def imported(self, what: Message) -> None:
        """What the script has imported (``launch/warmup.py``): the next standby imports it ahead."""
        self._imports = {"names": list(what["names"]), "beyond": dict(what["beyond"])}
        stopped_by = ", ".join(map(str, what["stopped_by"]))
        if stopped_by and self._enabled and not self._imports_said:
            self._imports_said = True
            self._console.say(
                f"the script changes {stopped_by} in the environment before it imports torch, so a standby can import nothing ahead: "
                "set that in front of everstep run instead, and a failure costs seconds less"
            )

    def is_for_us(self, peer: Peer, message: Message) -> bool:
        """Whether a message comes from a worker of the standby."""
        if self._waiting is None:
            return False
        attempt, seat = self._waiting.attempt, peer.seat
        if message["kind"] == "hello":
            return int(message.get("standby", 0)) == attempt.standby
        return isinstance(seat, Seat) and attempt.seats.get(seat.rank) is seat

    async def handle(self, peer: Peer, message: Message) -> Message | None:
        """Seat those who greet, hold those at the gate, and let all else pass."""
        waiting = self._waiting
        assert waiting is not None
        if message["kind"] == "hello":
            peer.seat = waiting.attempt.welcome(peer.pid, message)
            return {
                **self._welcome,
                "preimport": self._imports,
                "ahead": waiting.ahead,
                "hold": sorted(self._hold),
            }
        if message["kind"] != "gate":
            return None
        if message["cuda"]:
            self._console.say("no standby: the script's imports alone take hold of the GPU")
            self._enabled, self._failed = False, True
            waiting.attempt.ended.set()
        waiting.standing.add(peer.seat.rank)
        waiting.read |= {str(name): mark for name, mark in dict(message.get("read", {})).items()}
        self._say_where(peer.seat.rank, str(message.get("where", "")))
        if waiting.is_ready:
            waiting.was_ready = True
            now = clock.now()
            seconds = clock.monotonic() - waiting.launched
            self._ledger.add(StandbyReady(time=now, attempt=waiting.attempt.number, seconds=seconds))
            self.on_ready(waiting.attempt.standby)
        await waiting.gate.wait()
        return {"refused": "this standby is not needed"} if waiting.dropped else {}

    def _say_where(self, rank: int, where: str) -> None:
        if where and where != self._where and rank == 0:
            self._where = where
            self._console.say(f"the standby has run ahead and waits in front of {where}")
