"""The node supervisor: owns one job, launches its attempts, and keeps them going until there is a reason not to.

The loop is: observe (signals, sockets, pidfds, control pages) → write the fact into the journal and fold it into the
job's record → decide (pure functions of the record) → act. Nothing is decided from anything that is not in the journal,
so a journal read back tells the same story and yields the same decisions.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from supervisor import background, vigil
from supervisor.attempt import Attempt
from supervisor.chores import Chores
from supervisor.companions import Outcome, Turn
from supervisor.company import Team
from supervisor.config import Options
from supervisor.decide import classify, restart
from supervisor.edge import clock, jobdir, processes, runtimes, threads
from supervisor.edge.channel import Channel, Message, Peer
from supervisor.edge.console import Console
from supervisor.engine import Engine
from supervisor.errors import EverstepError, LeadershipLostError
from supervisor.herald import Herald
from supervisor.launching import Launcher, attempt_ended, run_started
from supervisor.ledger import Ledger
from supervisor.live_view import LiveView
from supervisor.lookout import Warnings
from supervisor.model import (
    Action,
    AttemptEnded,
    AttemptStarted,
    Decided,
    Failure,
    RunEnded,
    StopRequested,
    Verdict,
)
from supervisor.program import Program, Rendezvous
from supervisor.pulse import Pulse
from supervisor.reception import Reception
from supervisor.standby import Standby, Waiting
from supervisor.stopping import Stopping
from supervisor.stores import Stores
from supervisor.warden import SIGNALS, Warden
from supervisor.with_others import companions


class Node:
    """One run of the supervisor over one job."""

    def __init__(
        self,
        options: Options,
        program: Program,
        job: jobdir.JobDirectory,
        file: jobdir.JobFile,
        ledger: Ledger,
        console: Console,
        engine: Engine,
        warden: Warden,
        team: Team | None = None,
    ) -> None:
        self._options, self._program, self._job, self._file = options, program, job, file
        self._ledger, self._console = ledger, console
        self._runtime = Path(file.runtime)
        self._stores = Stores(options, job, file, ledger, console, team)
        self._snapshots, self._draining = self._stores.snapshots, self._stores.draining
        self._launcher = Launcher(program, job.path, file.run_id, self._runtime)
        guard = asdict(options.guard_policy) if options.guard_policy.is_on else None
        self._welcome: Message = {"save_every_steps": list(options.save_every), "guard": guard}
        self._standby = Standby.asked_for(
            options, self._launcher, job.attempt, self._welcome, ledger, console
        )
        self._view = LiveView(job.path, file.run_id, file.epoch, console.say)
        self._herald = Herald(options, job, file, ledger, console.say, self._view)
        self._warnings = Warnings(options, ledger, console)
        self._engine, self._warden = engine, warden
        self._stopping = Stopping(
            engine, ledger, console, self._draining, options.grace, warden=warden,
            begun=self._on_stop, end=self._end_attempt, recalled=self._recall_stop, save=self._save_soon,
        )  # fmt: skip
        self._unsaved: str | None = None  # why the newest state is not durable
        self._launched = False
        self._chores = Chores(console)
        self._pulse: Pulse | None = None
        self._reception: Reception | None = None
        self._companions = companions(team, self._stores, self._standby, self._stopping, ledger, options)

    # ------------------------------------------------------------------ the run

    async def run(self) -> int:
        """From taking charge to leaving; returns the exit code."""
        processes.become_subreaper()
        swept = await self._stores.sweep()
        record = self._ledger.record
        self._ledger.add(run_started(self._options, self._program, self._file.epoch))
        if not self._runtime.is_relative_to(runtimes.SHM):
            self._console.say(f"/dev/shm is too small: snapshots go to {self._runtime}")
        for notice in (*self._program.notices, vigil.describe(self._options)):
            self._console.say(notice)
        self._console.say(
            f"{'job resumed' if record.attempt is not None else 'job started'} in {self._job.path} "
            f"(pid {os.getpid()}, logs in {self._job.attempts})"
        )
        self._stopping.listen()
        channel = Channel(self._runtime / "socket", self._on_message, self._console.say)
        await channel.open()
        if swept:
            self._console.say(f"unfinished checkpoints removed: {', '.join(path.name for path in swept)}")
        try:
            await self._companions.start()
            verdict = await self._supervise()
            self._companions.check()
        except EverstepError as error:
            await self._break_off(error)
            await self._herald.close()
            await self._companions.close()
            raise
        finally:
            await self._standby.end()
            await channel.close()
        await self._view.close()
        if not self._unsaved:
            runtimes.remove(self._runtime)
        code = restart.exit_code(verdict.action, self._stopping.requested)
        self._ledger.add(RunEnded(time=clock.now(), exit_code=code, reason=verdict.reason))
        self._console.say(verdict.reason)
        await self._companions.finish(code, verdict.reason, saved=not self._unsaved)
        await self._companions.close()
        if not self._unsaved:
            await self._warden.acknowledge()
        await self._herald.close(self._stopping.time_left(self._options.hook_timeout))
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        if said := self._engine.leave(code, self._companions.bad_nodes):
            self._console.say(said)
        if self._stopping.cut_short == "user" or threads.are_busy():
            self._leave_at_once(code)
        return code

    def _leave_at_once(self, code: int) -> None:
        """Leave without the threads that may be reading or writing for minutes yet: they are safe to die at any point."""
        self._ledger.close()
        self._console.close()
        os._exit(code)

    async def _supervise(self) -> Verdict:
        while True:
            verdict = await self._run_attempt()
            if not verdict.action.goes_on:
                return verdict
            if verdict.delay:
                await self._standby.drop()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.seen.wait(), verdict.delay or 0.0001)
                assert self._stopping.requested is not None
                return await self._final_stop(self._stopping.requested)

    async def _run_attempt(self) -> Verdict:
        record = self._ledger.record
        number = 0 if record.attempt is None else record.attempt + 1
        if (turn := await self._companions.muster(number)) is None:
            assert self._stopping.requested is not None
            return await self._final_stop(self._stopping.requested)
        standby = await self._standby.take(number, record.world_size) if turn.from_standby else None
        if standby is None:
            await self._standby.drop()
        attempt = standby.attempt if standby else self._new_attempt(number, turn)
        self._ledger.add(AttemptStarted(time=clock.now(), attempt=number, standby=standby is not None))
        meeting = self._companions.begin(attempt, turn, from_standby=standby is not None)
        resume = asyncio.create_task(self._companions.choose(number, turn))
        resume.add_done_callback(lambda task: None if _is_fine(task) else attempt.ended.set())
        self._warnings.begin()
        saves = self._companions.saves(attempt)
        self._pulse = Pulse(
            attempt, self._options, self._ledger, self._snapshots, self._draining, saves, self._console, self._drive_stop,
            on_first_step=lambda: self._companions.made_first_step(attempt), warnings=self._warnings,
            view=self._view,
        )  # fmt: skip
        self._reception = Reception(
            attempt,
            ledger=self._ledger,
            snapshots=self._snapshots,
            savepoints=saves,
            console=self._console,
            resume=resume,
            welcome=self._welcome,
            on_saved=self._companions.follow(self._pulse),
            on_imported=self._standby.imported,
            on_restored=self._stores.staging.clear,
            prefix_lines=self._program.has_ranks,
        )
        beat = asyncio.create_task(self._pulse.beat())
        beat.add_done_callback(lambda task: None if _is_fine(task) else attempt.ended.set())
        try:
            await self._live(attempt, standby, meeting)
        finally:
            beat.cancel()
            resume.cancel()
            await asyncio.gather(beat, resume, return_exceptions=True)
        for task in (resume, beat):
            if not _is_fine(task):
                task.result()  # storage that cannot even be listed is the user's to mend; anything else is a bug
        return await self._post_mortem(attempt)

    def _new_attempt(self, number: int, turn: Turn) -> Attempt:
        folder = self._job.attempt(number)
        return Attempt(
            number, folder, self._runtime, self._file.run_id, nodes=turn.nodes, node_rank=turn.rank
        )

    async def _live(self, attempt: Attempt, standby: Waiting | None, meeting: Rendezvous | None) -> None:
        if not self._launched:  # torchrun greets the same way each time
            self._console.follow(attempt.launcher_log, "[torchrun] " if self._program.has_ranks else "")
        self._launched = True
        if standby is None:
            port = self._launcher.launch(attempt, meeting)
        else:
            port = standby.port
            assert self._reception is not None
            self._reception.begin()
            attempt.begin()
            standby.gate.set()
        try:
            self._chores.catch_up_soon()
            if self._stopping.requested is not None:
                self._drive_stop()
            await attempt.ended.wait()
            if attempt.finished:
                await self._standby.drop()
                await attempt.farewell()
                await attempt.leave()
            elif left := await attempt.teardown(spare=self._standby.attempt):
                self._console.say(f"processes that cannot be killed: {left}")
        finally:
            if port is not None:
                port.release()
            self._console.finish(attempt.logs)

    # ------------------------------------------------------------------ the end of an attempt

    async def _post_mortem(self, attempt: Attempt) -> Verdict:
        assert self._pulse is not None
        assert self._reception is not None
        self._pulse.note_first_step()
        self._snapshots.reset()
        self._stores.staging.clear()
        self._reception.close()
        self._stores.doubt(attempt.number, self._reception.unloadable)
        evidence = attempt.evidence()
        completed = attempt.finished and all(seat.completed is not False for seat in attempt.seats.values())
        stopped = self._stopping.requested is not None and not (completed and attempt.has_session)
        failure = None
        if not (stopped and self._stopping.cut_short) and not attempt.called_off:
            failure = classify.classify(evidence, clock.now())
        noticed = None if attempt.called_off else attempt.noticed
        try:
            failure, noticed, completed = await self._companions.end(
                attempt, Outcome(failure, noticed, completed)
            )
        except LeadershipLostError:
            attempt.close()
            raise
        stopped = stopped or (
            self._stopping.requested is not None and not (completed and attempt.has_session)
        )
        reshaping = None if failure else self._companions.reshaping
        last_step = None  # of a training that was completed: its state must not be lost
        if failure is None and attempt.has_session and all(seat.completed for seat in attempt.seats.values()):
            last_step = attempt.total_steps
        ended = attempt_ended(
            attempt,
            evidence,
            failure,
            stopped=stopped,
            reshaped=reshaping is not None,
            noticed=noticed,
            metrics=self._pulse.metrics,
        )
        attempt.close()
        self._ledger.add(ended)
        if failure is not None:
            await self._stores.condemn(failure)
            self._chores.write_evidence(attempt.folder, failure, evidence)
        if stopped and self._stopping.requested is not None:
            return await self._final_stop(self._stopping.requested, failure)
        if reshaping is not None:
            reason = f"{'' if attempt.called_off else 'all ranks have saved; '}going on {reshaping}"
            return self._decided(Verdict(action=Action.RESTART, reason=reason))
        if failure is not None:
            verdict = restart.decide(self._ledger.record, failure)
            if verdict.action.goes_on:
                return self._decided(verdict)
            return await self._final(lambda: verdict)
        return await self._final(lambda: restart.decide_finished(self._ledger.record), last_step)

    async def _final_stop(self, stop: StopRequested, failure: Failure | None = None) -> Verdict:
        verdict = await self._final(lambda: restart.decide_stop(self._ledger.record, stop))
        if failure is not None:
            self._console.say(f"while stopping, {failure.reason}")
        return verdict

    async def _final(self, decide: Callable[[], Verdict], last_step: int | None = None) -> Verdict:
        """The last verdict, given once the newest state is durable, or it is known why it cannot be."""
        await self._standby.end()
        await self._chores.catch_up()
        self._unsaved = await self._draining.secure(last_step, may_drain=self._stopping.cut_short != "user")
        verdict = decide()
        if self._unsaved:
            action = Action.GIVE_UP if verdict.action is Action.COMPLETE else verdict.action
            verdict = Verdict(action=action, reason=f"{verdict.reason}; {self._unsaved}")
        return self._decided(verdict)

    def _decided(self, verdict: Verdict) -> Verdict:
        number = self._ledger.record.attempt or 0
        self._ledger.add(
            Decided(
                time=clock.now(),
                attempt=number,
                action=verdict.action,
                reason=verdict.reason,
                delay=verdict.delay,
                rollback=verdict.rollback,
                skip=verdict.skip,
                level=verdict.level,
            )
        )
        if verdict.action.goes_on:
            self._console.say(f"attempt {number}: {verdict.reason}")
        return verdict

    async def _break_off(self, error: EverstepError) -> None:
        """Tell the journal of an end that is no attempt's doing."""
        if isinstance(error, LeadershipLostError):
            return  # the journal is another's now
        now, record = clock.now(), self._ledger.record
        if record.attempt is not None:
            self._ledger.add(AttemptEnded(time=now, attempt=record.attempt, step=None))
        self._decided(Verdict(action=Action.GIVE_UP, reason=str(error)))
        self._ledger.add(RunEnded(time=now, exit_code=error.exit_code, reason=str(error)))
        await self._companions.finish(error.exit_code, str(error), saved=False)

    # ------------------------------------------------------------------ what reaches it from outside

    async def _on_message(self, peer: Peer, message: Message) -> Message | None:
        if self._standby.is_for_us(peer, message):
            return await self._standby.handle(peer, message)
        if self._reception is None:
            raise ValueError("no attempt is running")
        return await self._reception.handle(peer, message)

    def _on_stop(self) -> None:
        background.start(self._standby.end())
        self._companions.stop()
        self._drive_stop()

    def _drive_stop(self) -> None:
        if self._stopping.requested is not None and self._pulse is not None:
            self._pulse.drive_stop()

    def _recall_stop(self) -> bool:
        if self._pulse is None or not self._pulse.recall_stop():
            return False
        self._companions.go_on()
        self._standby.allow()
        return True

    def _save_soon(self) -> None:
        if self._pulse is not None:
            self._pulse.save_soon()

    def _end_attempt(self) -> None:
        if self._pulse is not None:
            self._pulse.end_attempt()


def _is_fine(task: asyncio.Task[Any]) -> bool:
    return task.cancelled() or task.exception() is None
