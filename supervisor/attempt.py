"""One attempt: one launch of the workers, watched until it ends, then cleared away to the last process.

How its end is noticed: a pidfd per worker and one for the launcher (torchrun, or the program itself) wake the loop at
the moment of death; a worker that raises says so itself before it dies. The first failure decides, except that a
death which may only be the echo of another one (an exception: a peer's lost connection also looks like that) is given
``ECHO_GRACE`` for the other one to show. Then everything is killed at once: torchrun's own grace is never waited for.
"""

from __future__ import annotations

import asyncio
import os
import select
import shutil
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from supervisor import clearing, ends
from supervisor.decide import symptoms
from supervisor.edge import clock, forensics, processes
from supervisor.edge.control import ControlPage, Phase, SessionFlag, Word
from supervisor.edge.link import control_folder, page_path, stacks_path
from supervisor.errors import StorageError
from supervisor.model import AttemptEvidence, Hang, Raised, Trouble
from supervisor.others import Others
from supervisor.seat import Seat
from supervisor.snapshots import Ranks

ECHO_GRACE = 0.3  # seconds for the root cause of what may be a consequence
RAISED_GRACE = 10.0  # seconds for a worker that raised to run its exit handlers
UNKNOWN_GRACE = 1.0  # seconds for torchrun to report an exit status that we could not read
FAREWELL = 5.0  # seconds for torchrun to leave after all of its workers did


class Attempt:
    """Launched by ``launch``; ``ended`` is set when it has finished or failed; ``teardown`` leaves nothing of it.

    ``standby`` tells apart the launches of one number made ahead (``supervisor/standby.py``); 0: launched to begin at once.
    """

    def __init__(
        self,
        number: int,
        folder: Path,
        runtime: Path,
        run_id: str,
        standby: int = 0,
        nodes: int = 1,
        node_rank: int = 0,
    ) -> None:
        self.number = number
        self.standby = standby
        self.nodes, self.node_rank = nodes, node_rank
        self.folder = folder
        self.logs = folder / "logs"
        #: torchrun's own output
        self.launcher_log = self.logs / (f"torchrun-{node_rank}.log" if node_rank else "torchrun.log")
        self.runtime = runtime
        self.world_size: int | None = None
        self.local_size: int | None = None  # ranks on this node
        self.others: Others | None = None  # the rest of it, on other nodes
        self.seats: dict[int, Seat] = {}
        self.metrics: dict[str, float] = {}  # the newest logged values
        self.restore_seconds = 0.0  # of the rank that took longest
        self.fetching = 0  # ranks that wait for what they read of a checkpoint
        self.ended = asyncio.Event()
        self.finished = False  # every rank left with code 0
        self.called_off = False  # it was ended for what happened on another node
        self.stopping = False  # a stop was asked for: leaving early is what we want
        self._hang: Hang | None = None
        self._trouble: Trouble | None = None
        self._stacks: dict[int, str] = {}
        self._run_id = run_id
        self._launcher: int | None = None
        self._launcher_fd: int | None = None
        self._launcher_exit: processes.Exit | None = None
        self._launcher_end: float | None = None
        self._killed = False
        self._killed_at: float | None = None
        self._decision: asyncio.TimerHandle | None = None
        self._oom_before = forensics.oom_kills()
        self._yields = False

    # ------------------------------------------------------------------ start

    def launch(self, argv: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start the launcher, for which ``prepare`` has made room. Raises OSError when it cannot be started."""
        self._launcher = processes.spawn(argv, environment, self.launcher_log)
        if self.standby:
            self._yields = processes.yield_cpu(self._launcher)
            processes.offer_to_oom_killer(self._launcher)
        self._launcher_fd = processes.open_pidfd(self._launcher)
        if self._launcher_fd is None:
            self._launcher_ended()
        else:
            asyncio.get_running_loop().add_reader(self._launcher_fd, self._launcher_ended)

    def prepare(self) -> None:
        """Make the folders for the logs and the control pages. Raises StorageError."""
        pages = control_folder(self.runtime, self.number)
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(pages, ignore_errors=True)  # a dead standby's words must not pass for this one's
            pages.mkdir(mode=0o700, parents=True)
        except OSError as error:
            raise StorageError(f"{error.filename}: {error.strerror}") from None

    def reap_adopted(self) -> None:
        """Let orphans that were given to us and have ended go; the ends of the attempt's own processes stay readable."""
        processes.reap_adopted({self._launcher or 0, *(seat.pid for seat in self.seats.values())})

    def welcome(self, pid: int, message: Mapping[str, Any]) -> Seat:
        """Seat a worker that greets. Raises ValueError (refused) for one of another attempt or a taken rank."""
        rank, local_rank, attempt = int(message["rank"]), int(message["local_rank"]), int(message["attempt"])
        if attempt != self.number or int(message.get("standby", 0)) != self.standby or self._killed:
            raise ValueError(f"attempt {attempt} is over")
        if rank in self.seats and self.seats[rank].pid == pid:
            return self.seats[rank]  # a command that became, by exec, a Python program with a Session
        if rank in self.seats:
            raise ValueError(f"rank {rank} is taken by pid {self.seats[rank].pid}")
        self.world_size = int(message["world_size"])
        self.local_size = int(message.get("local_world_size", self.world_size))
        page = ControlPage(page_path(self.runtime, self.number, local_rank))
        seat = Seat(rank, local_rank, pid, processes.open_pidfd(pid), page)
        self.seats[rank] = seat
        if seat.pidfd is None:
            self._worker_ended(seat)
        else:
            asyncio.get_running_loop().add_reader(seat.pidfd, self._worker_ended, seat)
        return seat

    def begin(self) -> None:
        """A standby is let begin: from now on it counts."""
        self._oom_before = forensics.oom_kills()
        launcher = [self._launcher] if self._launcher is not None else []
        pids = [*launcher, *(seat.pid for seat in self.seats.values())]
        processes.take_from_oom_killer(pids)
        if self._yields:
            processes.compete_again(pids)

    @property
    def is_full(self) -> bool:
        """Whether every rank on this node has greeted."""
        return self.local_size is not None and len(self.seats) == self.local_size

    @property
    def ranks(self) -> Ranks:
        """Who writes its snapshots."""
        return Ranks(self.number, self.local_size or 0, self.world_size or 0, self.nodes, self.node_rank)

    @property
    def in_session(self) -> bool:
        """Whether every rank is inside a Session and knows its step, so that a save can be agreed."""
        return self.is_in_session_here and (self.others is None or self.others.in_session)

    @property
    def is_in_session_here(self) -> bool:
        """Whether every rank on this node is."""
        return self.is_full and all(
            seat.page[Word.SESSION] & (SessionFlag.OPEN | SessionFlag.CLOSED) == SessionFlag.OPEN
            and seat.page[Word.PHASE] != Phase.RESTORE  # its STEP is not yet the one that it resumes at
            and seat.end is None
            for seat in self.seats.values()
        )

    @property
    def has_session(self) -> bool:
        """Whether any rank ever opened a Session."""
        return any(seat.session for seat in self.seats.values())

    @property
    def steps(self) -> list[int]:
        """Completed steps of each seated rank; of other nodes, those of the slowest and the fastest."""
        own = [seat.step for seat in self.seats.values()]
        return own if self.others is None or not own else own + self.others.steps

    @property
    def total_steps(self) -> int | None:
        """How many steps the training is to take, once a Session has said so."""
        return max((seat.page[Word.TOTAL_STEPS] for seat in self.seats.values()), default=0) or None

    def offer_slot(self, word: int) -> None:
        """Write the slot that may be written next (``Snapshots.offer_word``) on every rank's page."""
        for seat in self.seats.values():
            seat.page[Word.FREE_SLOT] = word

    # ------------------------------------------------------------------ ends

    def hangs(self, hang: Hang, stacks: dict[int, str]) -> None:
        """It does not go on: end it for that."""
        if not self.ended.is_set():
            self._hang, self._stacks = hang, stacks
            self.ended.set()

    def call_off(self) -> None:
        """It has ended on another node: end it here, which is nobody's failure. Not if a rank has died here: that may be why, and decides."""
        for seat in self.seats.values():
            if seat.pidfd is not None and select.select([seat.pidfd], [], [], 0)[0]:
                self._worker_ended(seat)  # nobody has looked yet
        if not self.ended.is_set() and not (self._decision and ends.any_died(self.seats.values())):
            self.called_off = True
            self.ended.set()

    def goes_wrong(self, trouble: Trouble) -> None:
        """Its numbers are no good any more: end it for that. The cause may be heard of after what it has led to elsewhere."""
        is_earlier = self._trouble is not None and trouble.step < self._trouble.step
        if is_earlier or not self.ended.is_set():
            self._trouble = trouble
            self.ended.set()

    def stacks_of(self, seat: Seat) -> Path:
        """The file that its stacks are written to."""
        return stacks_path(self.runtime, self.number, seat.local_rank)

    def raised(self, seat: Seat, raised: Raised) -> None:
        """A worker says that an exception is ending it."""
        if seat.raised is None and seat.end is None:
            seat.raised, seat.raised_at = raised, clock.monotonic()
            self._decide_in(RAISED_GRACE)

    def left(self, seat: Seat) -> None:
        """A worker that fails says that everything of the script's is done.

        After its loop, and in a stop, there is nothing to hasten for: the others may still be writing what it has written.
        """
        if seat.told_code and seat.end is None and not seat.closed and not self.stopping:
            seat.left = True
            self._decide_in(self._grace_after(seat))

    def _grace_after(self, seat: Seat) -> float:
        """How long to wait for another rank's failure that may be behind this one's."""
        others = (other for other in self.seats.values() if other is not seat)
        if symptoms.may_be_echo(seat.raised) or any(processes.is_exiting(other.pid) for other in others):
            return ECHO_GRACE
        return 0.0

    def _worker_ended(self, seat: Seat) -> None:
        if self._launcher_fd is not None and select.select([self._launcher_fd], [], [], 0)[0]:
            self._launcher_ended()  # both at once: a worker dies with torchrun, never the other way round
        launcher_goes = self._launcher_fd is not None and self._launcher_is_going(seat)
        if seat.end is not None:
            return
        how = None
        if seat.pidfd is not None:
            asyncio.get_running_loop().remove_reader(seat.pidfd)
            how = processes.exit_of(seat.pidfd, seat.pid)
            os.close(seat.pidfd)
            seat.pidfd = None
        if self._killed:
            return  # our own doing is no evidence
        code = how.code if how else seat.told_code
        if seat.told_code == 0 and how is not None and how.signal in symptoms.LATE_SIGNALS:
            code, how = 0, None
        seat.end = ends.end_of(seat, code, how.signal if how else None)
        if self.ended.is_set():
            return
        if launcher_goes:
            self._decide_in(ECHO_GRACE)  # its own end, in milliseconds, says how
        elif seat.end.signal is not None and seat.end.signal != signal.SIGABRT:
            self._decide_in(0)
        elif code is None:
            self._decide_in(UNKNOWN_GRACE)
        elif code != 0:
            self._decide_in(self._grace_after(seat))
        elif seat.session and not seat.closed and not self.stopping:
            self._decide_in(ECHO_GRACE)  # it left its training with code 0: the others cannot go on
        elif self.is_full and all(other.end and other.end.exit_code == 0 for other in self.seats.values()):
            self.finished = True
            self._decide_in(0)

    def _launcher_is_going(self, seat: Seat) -> bool:
        """Whether torchrun was dying before this worker of its: note when, as its pidfd will be late to say so."""
        if self._launcher is None or self._launcher == seat.pid or not processes.is_exiting(self._launcher):
            return False
        self._launcher_end = self._launcher_end or clock.monotonic()
        return True

    def _launcher_ended(self) -> None:
        assert self._launcher is not None
        if self._launcher_fd is not None:
            asyncio.get_running_loop().remove_reader(self._launcher_fd)
            how = processes.exit_of(self._launcher_fd, self._launcher)
            os.close(self._launcher_fd)
            self._launcher_fd = None
            if not self._killed:
                self._launcher_exit, self._launcher_end = how, self._launcher_end or clock.monotonic()
        if self._killed or self.ended.is_set():
            return
        by_signal = self._launcher_exit is not None and self._launcher_exit.signal is not None
        # in order, it leaves after its workers, whose own ends are being noticed right now
        self._decide_in(
            0 if by_signal and self._launcher not in {s.pid for s in self.seats.values()} else ECHO_GRACE
        )

    def _decide_in(self, delay: float) -> None:
        if self.ended.is_set():
            return
        loop = asyncio.get_running_loop()
        due = loop.time() + delay
        if self._decision is None or due < self._decision.when():
            if self._decision is not None:
                self._decision.cancel()
            self._decision = loop.call_at(due, self.ended.set)

    # ------------------------------------------------------------------ clearing away

    async def farewell(self) -> None:
        """After a finish: let the launcher leave in its own time, within limits."""
        deadline = clock.monotonic() + FAREWELL
        while self._launcher_fd is not None and clock.monotonic() < deadline:
            await asyncio.sleep(clearing.PERIOD)

    def _own_processes(self) -> set[int]:
        launcher = self._launcher if self._launcher_fd is not None else None
        return clearing.own_processes(self._run_id, self.number, launcher)

    async def teardown(self, spare: Attempt | None = None) -> list[int]:
        """Kill all that is left of the attempt and wait until it is gone; returns the pids that would not die.

        That is every process of the run below the supervisor, less those of the standby to ``spare``.
        """
        self._kill_seated()
        launchers = [self._launcher] if self._launcher is not None else []
        spared = spare._own_processes if spare else set
        return await clearing.clear(lambda: set(processes.descendants(self._run_id, launchers)) - spared())

    async def withdraw(self) -> None:
        """Kill a standby, and nothing of the attempt beside which it waits."""
        await clearing.clear(self._own_processes, self._kill_seated() | self._own_processes())

    def _kill_seated(self) -> set[int]:
        """The quick part: whoever is known to belong to it."""
        self._killed, self._killed_at = True, clock.monotonic()
        if self._decision is not None:
            self._decision.cancel()
        self.ended.set()
        alive = [seat.pid for seat in self.seats.values() if seat.end is None]
        if self._launcher is not None and self._launcher_fd is not None:
            alive.append(self._launcher)
        processes.send(alive, signal.SIGKILL)
        return set(alive)

    async def leave(self) -> None:
        """Collect the dead without killing anybody (what a finished script left running stays)."""
        self._killed = True
        processes.reap()

    def close(self) -> None:
        """Give back descriptors and mappings. The last words on the pages are gone afterwards."""
        loop = asyncio.get_running_loop()
        for fd in [self._launcher_fd, *(seat.pidfd for seat in self.seats.values())]:
            if fd is not None:
                loop.remove_reader(fd)
                os.close(fd)
        self._launcher_fd = None
        for seat in self.seats.values():
            seat.pidfd = None
            seat.page.close()
        shutil.rmtree(control_folder(self.runtime, self.number), ignore_errors=True)

    @property
    def noticed(self) -> float | None:
        """Unix seconds of the first sign of its end: a death, an exception, or our own decision to kill it."""
        ended_for = self._hang or self._trouble
        signs = [self._launcher_end, self._killed_at, ended_for.monotonic if ended_for else None]
        for seat in self.seats.values():
            told_at = seat.told_at if seat.left else 0.0
            signs += [seat.end.monotonic if seat.end else None, seat.raised_at or told_at or None]
        first = min((sign for sign in signs if sign is not None), default=None)
        return None if first is None else clock.unix_of(int(first * 1e9))

    def evidence(self) -> AttemptEvidence:
        """All that is known after the teardown; only ends that were not our doing."""
        reported = forensics.exit_codes_in(self.launcher_log)
        oom_killed = forensics.oom_kills() > self._oom_before
        launcher = self._launcher_exit
        crashed = {
            seat.rank: forensics.text_of(self.stacks_of(seat)) for seat in self.seats.values() if seat.end
        }
        return AttemptEvidence(
            attempt=self.number,
            world_size=self.local_size,
            step=max((seat.step for seat in self.seats.values() if seat.step), default=None),
            ends=tuple(
                ends.complete(seat, reported, oom_killed, self.logs)
                for seat in ends.gone(self.seats.values())
            ),
            launcher_exit_code=launcher.code if launcher else None,
            launcher_signal=launcher.signal if launcher else None,
            launcher_monotonic=self._launcher_end,
            launcher_pid=self._launcher,
            launcher_lines=forensics.last_lines(self.launcher_log),
            has_session=self.has_session,
            hang=self._hang,
            trouble=self._trouble,
            stacks=self._stacks or {rank: text for rank, text in crashed.items() if text},
        )
