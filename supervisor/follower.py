"""The node supervisor on a node that does not lead: its ranks, its part of everything, as the leader orders it.

It decides nothing but what cannot wait for anybody: that its ranks have failed (then it takes them away at once, and reports why), and that it
has not reached the store for too long (``decide/fencing``). It writes no journal: the leader's tells the story of the job.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from dataclasses import asdict

from supervisor import background
from supervisor.attempt import Attempt
from supervisor.checkpoint.manifest import Key
from supervisor.chores import Chores
from supervisor.company import BEAT, Team, peer_copies
from supervisor.config import Options
from supervisor.decide import classify, restart
from supervisor.decide.fencing import Isolation
from supervisor.edge import clock, jobdir, processes, runtimes
from supervisor.edge.channel import Channel, Message, Peer
from supervisor.edge.console import Console
from supervisor.errors import CheckpointError, EverstepError, JobError
from supervisor.finder import Finder
from supervisor.fleet import Assignment, Ended, Member, Order, Release
from supervisor.hand import Hand
from supervisor.launching import Launcher
from supervisor.model import Failure, FailureKind
from supervisor.part_places import PartPlaces
from supervisor.private_ledger import PrivateLedger
from supervisor.program import Program
from supervisor.reception import Reception
from supervisor.resume import Resume
from supervisor.saves import NodeSaves
from supervisor.shared_snapshots import SharedSnapshots
from supervisor.solitude import Solitude
from supervisor.staging import Staging
from supervisor.standby import Standby, Waiting
from supervisor.vigil import Vigil
from supervisor.warden import Warden


class Follower:
    """One time of following one leader. ``run`` returns the exit code, or None when there is nobody to follow any more."""

    def __init__(
        self,
        options: Options,
        program: Program,
        job: jobdir.JobDirectory,
        team: Team,
        order: Order,
        console: Console,
        warden: Warden,
        engine: str = "",
    ) -> None:
        self._options, self._program, self._job, self._team = options, program, job, team
        self._console, self._warden = console, warden
        self._joining = team.joining
        self._run_id = order.run_id
        file = job.read()
        if file is None or file.run_id != order.run_id:
            raise JobError(f"{job.path} is not the directory that the leader has: all nodes must share it")
        self._runtime = runtimes.make(order.run_id, self._joining.report.name)
        self._lock = runtimes.lay_out(self._runtime, job.path, order.epoch, engine, follows=True)
        self._key = Key.from_environment()
        self._ledger = PrivateLedger()
        self._snapshots = SharedSnapshots(
            self._runtime, run_id=order.run_id, key=self._key, fact=self._ledger.add, report=console.say
        )
        self._copies = peer_copies(team, options, self._runtime, self._snapshots, self._key, console)
        self._hand = Hand(
            team.joining, self._snapshots, PartPlaces.asked_for(options, job, self._key), console.say, self._copies,
        )  # fmt: skip
        self._saves = NodeSaves(self._hand, self._snapshots)
        self._staging = Staging(self._runtime, self._runtime)
        self._finder = Finder(options, job, self._key, self._snapshots, self._staging, self._copies)
        self._launcher = Launcher(program, job.path, order.run_id, self._runtime)
        guard = asdict(options.guard_policy) if options.guard_policy.is_on else None
        self._welcome: Message = {"save_every_steps": list(order.save_every), "guard": guard}
        self._standby = Standby.asked_for(
            options, self._launcher, job.attempt, self._welcome, self._ledger, console
        )
        self._standby.on_ready = lambda serial: self._hand.mind(ready=serial)
        self._standby.on_lost = lambda serial: self._hand.mind(ready=-serial)
        self._standby_serial = 0
        self._attempt: Attempt | None = None
        self._last = max(order.over, order.run.attempt - 1 if order.run is not None else -1)
        self._world_size: int | None = None
        self._reception: Reception | None = None
        self._vigil: Vigil | None = None
        self._origin = asyncio.Event()
        self._solitude = Solitude(options, console)
        self._stop_forwarded = False
        self._followed = False
        self._resume_failed: Failure | None = None
        self._unloadable: tuple[str, ...] = ()  # what was found damaged before any rank was told of it
        self._chores = Chores(console)
        self._work: asyncio.Task[None] | None = None

    # ------------------------------------------------------------------ the run

    async def run(self) -> int | None:
        """Follow until the end, or until there is no leader. Raises EverstepError."""
        channel = Channel(self._runtime / "socket", self._on_message, self._console.say)
        await channel.open()
        await self._copies.start()
        keep = True
        try:
            while True:
                self._joining.changed.clear()
                leaving = self._think()
                if leaving is not None:
                    code, keep = leaving
                    return code
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._joining.changed.wait(), BEAT)
                self._beat()
        finally:
            if self._attempt is not None:
                self._attempt.call_off()
            if self._work is not None:
                await asyncio.gather(self._work, return_exceptions=True)
            await self._chores.catch_up()
            await self._standby.end()
            await self._hand.close()
            await channel.close()
            if not keep:
                runtimes.remove(self._runtime)
                await self._warden.acknowledge()
            self._lock.close()

    def _think(self) -> tuple[int | None, bool] | None:
        """Do what the order says; the exit code and whether what is in RAM is to be kept, when it is time to go."""
        order = self._joining.in_force
        if (lost := self._cut_off()) is not None:
            return lost
        if order is None:
            return None
        if order.final is not None and self._attempt is None:
            self._hand.mind(leaving=True)
            self._console.say(order.final.reason)
            return order.final.exit_code, not order.final.saved
        attempt = self._attempt
        if attempt is None and (release := self._release(order)) is not None:
            self._hand.mind(leaving=True)
            self._console.say("the job goes on without this node")
            return restart.EXIT_AGAIN, not release.saved
        if self._joining.leader is None and not self._team.is_embedded:  # somebody has to lead
            if attempt is None:
                return None, True
            attempt.call_off()  # the leader's ranks were part of it
        if attempt is not None:
            if order.over >= attempt.number or order.final is not None:
                attempt.call_off()
            elif order.stop is not None and not attempt.ended.is_set():
                self._stop(attempt)
            else:
                attempt.stopping = False
        if order.origin is not None and attempt is not None and order.origin.attempt == attempt.number:
            self._origin.set()
        self._hand.heed()
        self._heed_standby(order)
        if attempt is None and order.run is not None and order.run.attempt > max(self._last, order.over):
            return self._begin(order.run)
        return None

    def _release(self, order: Order) -> Release | None:
        own = Member(name=self._joining.report.name, life=self._joining.report.life)
        return next((one for one in order.released if one.member == own), None)

    def _begin(self, assignment: Assignment) -> tuple[int | None, bool] | None:
        report = self._joining.report
        rank = assignment.rank_of(report.name, report.life)
        if rank is None:
            return None
        self._last = assignment.attempt
        self._work = background.start(self._live(assignment, rank))
        return None

    def _beat(self) -> None:
        attempt = self._attempt
        report, heard = self._joining.report, self._warden
        if (report.notice, report.standing) != (heard.signal, heard.standing):
            self._hand.mind(notice=heard.signal, standing=heard.standing)
        self._hand.beat()
        if attempt is not None and not attempt.ended.is_set():
            attempt.reap_adopted()
            if self._vigil is not None:
                self._vigil.look()

    def _cut_off(self) -> tuple[int | None, bool] | None:
        """What to do without the store."""
        joining, attempt = self._joining, self._attempt
        match self._solitude.look(
            joining.silent,
            joining.problem or "it is silent",
            attempt,
            stopping=self._warden.must_leave is not None,
        ):
            case Isolation.GO_ON:
                return None
            case Isolation.END:
                if attempt is not None:
                    attempt.call_off()
                return None
            case Isolation.LEAVE:
                self._console.say(
                    f"the store was not reached for {joining.silent:.0f} s: leaving; run the same command again to carry on"
                )
                return restart.EXIT_AGAIN, True

    def _stop(self, attempt: Attempt) -> None:
        attempt.stopping = True
        if attempt.seats and not attempt.has_session and not self._stop_forwarded:
            self._stop_forwarded = True
            processes.send([s.pid for s in attempt.seats.values() if s.end is None], signal.SIGTERM)

    # ------------------------------------------------------------------ an attempt

    async def _live(self, assignment: Assignment, rank: int) -> None:
        standby: Waiting | None = None
        if assignment.standby:
            standby = await self._standby.take(assignment.attempt, self._world_size)
        if standby is None:
            await self._standby.drop()
        number = assignment.attempt
        attempt = self._attempt = (
            standby.attempt
            if standby is not None
            else Attempt(
                number,
                self._job.attempt(number),
                self._runtime,
                self._run_id,
                nodes=len(assignment.members),
                node_rank=rank,
            )
        )
        self._origin.clear()
        self._resume_failed, self._unloadable = None, ()
        self._stop_forwarded = False
        self._ledger.begin(number)
        self._vigil = Vigil(attempt, self._options, self._ledger, self._console)
        resume = asyncio.ensure_future(self._resume(attempt))
        background.start(self._mind(resume))
        self._reception = Reception(
            attempt,
            ledger=self._ledger,
            snapshots=self._snapshots,
            savepoints=self._saves,
            console=self._console,
            resume=resume,
            welcome=self._welcome,
            on_saved=lambda _step, _flags: None,
            on_imported=self._standby.imported,
            on_restored=self._on_restored,
            prefix_lines=self._program.has_ranks,
        )
        meeting = self._hand.meeting(assignment)
        self._hand.begin(attempt)
        self._joining.changed.set()  # the order may have had more to say
        failure: Failure | None = None
        try:
            if not self._followed:
                self._console.follow(attempt.launcher_log, "[torchrun] " if self._program.has_ranks else "")
                self._followed = True
            if standby is not None:
                self._reception.begin()
                attempt.begin()
                standby.gate.set()
            elif assignment.standby:
                failure = Failure(
                    kind=FailureKind.LAUNCHER, reason="the standby was gone", attempt=number, time=clock.now()
                )
            else:
                self._launcher.launch(attempt, meeting)
            if failure is None:
                await attempt.ended.wait()
                self._hand.tell()  # the others need not wait until it is cleared away here
        except EverstepError as error:
            failure = Failure(kind=FailureKind.STARTUP, reason=str(error), attempt=number, time=clock.now())
        finally:
            if attempt.finished:
                await attempt.farewell()
                await attempt.leave()
            elif left := await attempt.teardown(spare=self._standby.attempt):
                self._console.say(f"processes that cannot be killed: {left}")
            self._console.finish(attempt.logs)
            resume.cancel()
            await asyncio.gather(resume, return_exceptions=True)
        self._report_end(attempt, failure)

    def _report_end(self, attempt: Attempt, failure: Failure | None) -> None:
        assert self._reception is not None
        self._snapshots.reset()
        self._reception.close()
        self._on_restored()
        failure = failure or self._resume_failed
        self._world_size = attempt.world_size or self._world_size
        evidence = attempt.evidence()
        if failure is None and not attempt.called_off and not (attempt.stopping and attempt.finished):
            failure = classify.classify(evidence, clock.now())
        if failure is not None:
            self._console.say(f"attempt {attempt.number}: {failure.reason}")
            self._chores.write_evidence(
                attempt.folder, failure, evidence, f"failure-{attempt.node_rank}.json"
            )
            self._chores.catch_up_soon()
        completed = all(seat.completed is True for seat in attempt.seats.values()) or not attempt.has_session
        self._hand.over(
            Ended(
                step=evidence.step,
                finished=attempt.finished,
                completed=attempt.finished and completed,
                failure=failure,
                noticed=None if attempt.called_off else attempt.noticed,
                unloadable=self._unloadable or tuple(map(str, self._reception.unloadable)),
            )
        )
        attempt.close()
        self._attempt = None
        self._joining.changed.set()

    def _on_restored(self) -> None:
        self._staging.clear()
        self._copies.clear()

    async def _resume(self, attempt: Attempt) -> Resume:
        """What the leader has chosen, as this node has it. Raises EverstepError, which ends the attempt."""
        await self._origin.wait()
        order = self._joining.order
        assert order is not None
        origin = order.origin
        assert origin is not None
        self._ledger.skips(origin.skips)
        try:
            return await self._finder.find(origin, attempt.node_rank, attempt.nodes)
        except (EverstepError, OSError) as error:
            if isinstance(error, CheckpointError) and origin.path is not None:
                self._unloadable = (origin.path,)
            self._resume_failed = Failure(
                kind=FailureKind.STORAGE, reason=str(error), attempt=attempt.number, time=clock.now()
            )
            attempt.call_off()
            raise

    async def _mind(self, resume: asyncio.Future[Resume]) -> None:
        """What ends an attempt is told; anything else is a bug."""
        with contextlib.suppress(EverstepError, OSError, asyncio.CancelledError):
            await asyncio.shield(resume)

    # ------------------------------------------------------------------ the standby, and what the ranks say

    def _heed_standby(self, order: Order) -> None:
        ordered, attempt = order.standby, self._attempt
        if ordered is None:
            waiting = self._standby.attempt
            taken = order.run is not None and order.run.standby == self._standby_serial
            if waiting is not None and not taken:
                background.start(self._standby.drop())
            return
        if (
            ordered.standby <= self._standby_serial
            or attempt is None
            or attempt.number + 1 != ordered.attempt
        ):
            return
        self._standby_serial = ordered.standby
        try:
            self._standby.arm_for(attempt, ordered.standby, self._hand.meeting(ordered))
        except EverstepError:
            self._hand.mind(ready=-ordered.standby)

    async def _on_message(self, peer: Peer, message: Message) -> Message | None:
        if self._standby.is_for_us(peer, message):
            return await self._standby.handle(peer, message)
        if self._reception is None:
            raise ValueError("no attempt is running")
        answer = await self._reception.handle(peer, message)
        if message["kind"] in ("hello", "session", "closed", "metrics"):
            self._hand.tell()
        return answer
