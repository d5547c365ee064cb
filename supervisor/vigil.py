"""Watches over the ranks of one attempt and ends it when it hangs (the theory is in ``decide/health.py``).

The pulse has it look some times a second: a few words of each control page. Only when all ranks have been quiet for a while
does it read ``/proc`` too. When a hang is found, every rank is asked for its stacks, within two seconds; then it looks once more, since a rank
may just have come back; then the attempt is ended, and what follows is what follows any failure.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from typing import Final

from supervisor.attempt import Attempt
from supervisor.config import Options
from supervisor.decide import health as healths
from supervisor.decide.health import Health, Limits, Reading, Stage
from supervisor.edge import clock, processes, stacks
from supervisor.edge.console import Console
from supervisor.edge.control import Phase, SessionFlag, Word
from supervisor.ledger import Ledger
from supervisor.model import Hang, HangKind
from supervisor.seat import Seat

PERIOD: Final = 0.25  # seconds between two looks, at least
SUSPICION: Final = 0.25  # of its limit: from there on, processes are looked at too
STACKS: Final = 2.0  # seconds for the ranks to write their stacks
NATIVE: Final = 3.0  # seconds more where py-spy is installed
STARTUP: Final = 1800.0
FLOOR, FLOOR_WITHOUT_SESSION = 60.0, 600.0


class Vigil:
    """``look`` is called by the clock."""

    def __init__(self, attempt: Attempt, options: Options, ledger: Ledger, console: Console) -> None:
        self._attempt, self._options, self._ledger, self._console = attempt, options, ledger, console
        self._health = Health()
        self._processes_at = 0.0
        self._written = (0, 0.0)  # bytes of output, and when (of Health.clock) they became so many
        self._debugger_said = False
        self._catching: asyncio.Task[None] | None = None

    def look(self) -> None:
        """Look once, if it is time to; a hang is dealt with in the background."""
        now, attempt = clock.monotonic(), self._attempt
        if self._options.hang == "off" and self._options.hang_silence is None:
            return
        if attempt.ended.is_set() or (self._health.looked is not None and now - self._health.looked < PERIOD):
            return
        health = self._health = healths.observe(self._health, self._readings(), now)
        if self._catching is not None:
            return  # py-spy looks like a debugger
        if health.paused and attempt.is_full:
            self._console.say(
                f"nothing could be watched for {health.paused:.0f} s (was this machine asleep, or stopped?): "
                "the limits of hangs start again"
            )
        if attempt.stopping or self._awaits_us() or self._is_debugged(now):
            self._start_again()
        elif (hang := self._hang()) is not None:
            self._catching = asyncio.get_running_loop().create_task(self._catch(hang))

    def _start_again(self) -> None:
        self._health = healths.start_again(self._health)
        self._written = (self._written[0], self._health.clock)

    # ------------------------------------------------------------------ what there is to see

    def _readings(self) -> list[Reading]:
        seats = [seat for seat in self._attempt.seats.values() if seat.end is None]
        some_left = len(seats) < len(self._attempt.seats)
        known = self._is_known()
        return [_reading(seat, known=known, some_left=some_left) for seat in seats]

    def _is_known(self) -> bool:
        """Whether the job is known to make steps, or the user has said how long it may go without."""
        attempt = self._attempt
        return (
            self._options.hang_startup is not None
            or attempt.has_session
            or self._ledger.record.step > 0
            or any(attempt.steps)
        )

    def _limits(self) -> Limits:
        options = self._options
        floor = options.hang_floor
        if floor is None:
            floor = FLOOR if self._attempt.has_session else FLOOR_WITHOUT_SESSION
        return Limits(
            startup=options.hang_startup or STARTUP,
            floor=min(floor, options.hang_ceiling),
            ceiling=options.hang_ceiling,
            fixed=None if isinstance(options.hang, str) else options.hang,
        )

    def _awaits_us(self) -> bool:
        """Whether the ranks wait for the supervisor, which may have terabytes to fetch and verify."""
        restoring = any(seat.page[Word.PHASE] == Phase.RESTORE for seat in self._attempt.seats.values())
        return restoring and (self._ledger.record.resumed_step is None or self._attempt.fetching > 0)

    def _is_debugged(self, now: float) -> bool:
        """Whether a debugger is attached to a rank; asked only when nobody has moved for a while."""
        near = max(healths.nearness(self._health, self._limits()), self._silence())
        if near < SUSPICION or now - self._processes_at < min(1.0, PERIOD / near):
            return False
        self._processes_at = now
        seats = [seat for seat in self._attempt.seats.values() if seat.end is None]
        debugged = [s.rank for s in seats if s.page[Word.DEBUGGED] or processes.state_of(s.pid)[1]]
        if debugged and not self._debugger_said:
            self._debugger_said = True
            self._console.say(f"a debugger is attached to rank {debugged[0]}: no hang, however long it takes")
        return bool(debugged)

    def _silence(self) -> float:
        """How much of the time without output that is allowed has passed."""
        allowed = self._options.hang_silence
        if allowed is None or not self._attempt.is_full:
            return 0.0
        with os.scandir(self._attempt.logs) as entries:
            size = sum(entry.stat().st_size for entry in entries if entry.is_file())
        if size != self._written[0]:
            self._written = (size, self._health.clock)
        return (self._health.clock - self._written[1]) / allowed

    # ------------------------------------------------------------------ the hang

    def _hang(self) -> Hang | None:
        if not self._attempt.is_full:
            return None
        seated = len(self._health.traces)
        hang = None
        if self._options.hang != "off":
            hang = healths.judge(self._health, self._limits(), seated)
        if hang is None and self._silence() > 1:
            allowed = self._options.hang_silence or 0.0
            hang = Hang(kind=HangKind.SILENT, monotonic=self._health.looked or 0.0, limit=allowed)
        return hang

    async def _catch(self, hang: Hang) -> None:
        """Ask every rank where it is, look once more, and end the attempt."""
        attempt = self._attempt
        seats = [seat for seat in attempt.seats.values() if seat.end is None]
        asked = [
            stacks.Asked(seat.rank, seat.pid, seat.page[Word.STACKS], attempt.stacks_of(seat))
            for seat in seats
            if processes.state_of(seat.pid)[0] != "T"
        ]
        texts = await stacks.collect(asked, STACKS)
        await asyncio.sleep(2 * PERIOD)  # a signal can wake who slept: it must not go on now
        if attempt.ended.is_set() or attempt.stopping:
            return  # somebody died
        self._health = healths.observe(self._health, self._readings(), clock.monotonic())
        if self._hang() is None:
            self._catching = None
            return
        states = {seat.rank: processes.state_of(seat.pid)[0] for seat in seats}
        if hang.kind is not HangKind.SILENT:
            hang = healths.accuse(hang, states, texts)
        running = {seat.rank: seat.pid for seat in seats if states[seat.rank] != "T"}
        native = await stacks.collect_native(running, NATIVE)
        for rank, text in native.items():
            texts[rank] = f"{texts.get(rank, '')}\nwith native frames:\n{text}"
        attempt.hangs(replace(hang, monotonic=min(hang.monotonic, clock.monotonic())), texts)


def _reading(seat: Seat, *, known: bool, some_left: bool) -> Reading:
    page = seat.page
    return Reading(
        rank=seat.rank,
        stage=_stage(seat, some_left=some_left),
        step=seat.step,
        progress=hash((page[Word.HEARTBEAT_NS], page[Word.PHASE], seat.step)),
        movement=page[Word.MOVED_NS],
        beat=page[Word.BEAT_NS],
        known=known,
        longest_save=page[Word.SAVE_NS] / 1e9,
    )


def _stage(seat: Seat, *, some_left: bool) -> Stage:
    page = seat.page
    phase = page[Word.PHASE]
    if seat.told_code is not None:
        return Stage.LEAVING
    if page[Word.SESSION] & SessionFlag.CLOSED or phase == Phase.CLOSED or some_left:
        return Stage.OVER
    if phase == Phase.SAVE:
        return Stage.SAVE
    if phase == Phase.EVALUATE:
        return Stage.ASIDE
    if not page[Word.FIRST_STEP_NS]:
        return Stage.STARTUP
    return Stage.STEP if phase == Phase.STEP else Stage.ASIDE


def describe(options: Options) -> str:
    """The limits in one line, said once at the start."""
    silence = "" if options.hang_silence is None else f"; no output for {options.hang_silence:g} s is a hang"
    if options.hang == "off":
        return f"hangs are not looked for{silence}"
    floor = (
        f"{FLOOR:g} s ({FLOOR_WITHOUT_SESSION:g} s without a Session)"
        if options.hang_floor is None
        else f"{options.hang_floor:g} s"
    )
    step = (
        f"{options.hang:g} s for a step"
        if not isinstance(options.hang, str)
        else f"{healths.FACTOR:g} times the longest step, at least {floor}, at most {options.hang_ceiling:g} s"
    )
    return (
        f"limits of hangs: {step}; {options.hang_startup or STARTUP:g} s up to the first step, "
        f"{options.hang_ceiling:g} s for an evaluation{silence}"
    )
