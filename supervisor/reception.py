"""What workers say, and what is done about it: one method per kind of message (kinds in ``edge/channel.py``)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from supervisor.attempt import Attempt
from supervisor.checkpoint.location import Location
from supervisor.checkpoint.on_demand import OnDemand
from supervisor.decide import rollback
from supervisor.edge import clock
from supervisor.edge.channel import Message, Peer
from supervisor.edge.console import Console
from supervisor.edge.threads import in_thread
from supervisor.errors import CheckpointError, EverstepError, StorageError
from supervisor.guarding import Guarding
from supervisor.ledger import Ledger
from supervisor.model import ProposalFlag, Raised, Resumed, WorkersReady
from supervisor.resume import Resume
from supervisor.saves import Saves
from supervisor.seat import Seat
from supervisor.snapshots import Snapshots
from supervisor.wording import size


class Reception:
    """Serves the workers of one attempt."""

    def __init__(
        self,
        attempt: Attempt,
        *,
        ledger: Ledger,
        snapshots: Snapshots,
        savepoints: Saves,
        console: Console,
        resume: asyncio.Task[Resume],
        welcome: Message,
        on_saved: Callable[[int, ProposalFlag], None],
        on_imported: Callable[[Message], None],
        on_restored: Callable[[], None],
        prefix_lines: bool,
    ) -> None:
        self._attempt = attempt
        self._ledger = ledger
        self._snapshots = snapshots
        self._savepoints = savepoints
        self._console = console
        self._resume = resume
        self._welcome = welcome
        self._saved = on_saved
        self._imported = on_imported
        self._on_restored = on_restored
        self._restored: set[int] = set()
        self._prefix_lines = prefix_lines
        #: states that a rank could not load, though nothing was seen to be wrong with them when they were chosen
        self.unloadable: set[Location] = set()
        self._resume_said = False
        self._guarding = Guarding(attempt)

    async def handle(self, peer: Peer, message: Message) -> Message | None:
        """Answer one message; ValueError, KeyError and TypeError refuse it."""
        kind = message["kind"]
        if kind == "hello":
            return self._hello(peer, message)
        seat = peer.seat
        if not isinstance(seat, Seat) or self._attempt.seats.get(seat.rank) is not seat:
            raise ValueError("greet first")
        method = getattr(self, f"_on_{kind}", None)
        if method is None:
            raise ValueError(f"unknown kind {kind!r}")
        answer = method(seat, message)
        if asyncio.iscoroutine(answer):
            answer = await answer
        return answer  # type: ignore[no-any-return]

    def _hello(self, peer: Peer, message: Message) -> Message:
        seat = peer.seat = self._attempt.welcome(peer.pid, message)
        self._follow(seat)
        if self._attempt.is_full:
            self._ready()
        return self._welcome

    def begin(self) -> None:
        """The workers of a standby, seated already, are let begin."""
        for seat in self._attempt.seats.values():
            self._follow(seat)
        self._ready()

    def _follow(self, seat: Seat) -> None:
        prefix = f"[rank{seat.rank}] " if self._prefix_lines else ""
        self._console.follow(self._attempt.logs / f"rank-{seat.rank}.log", prefix)
        self._attempt.offer_slot(self._snapshots.offer_word)

    def _ready(self) -> None:
        world_size = self._attempt.world_size or 0
        self._ledger.add(WorkersReady(time=clock.now(), attempt=self._attempt.number, world_size=world_size))

    def _on_session(self, seat: Seat, message: Message) -> None:
        seat.session = True

    async def _on_resume(self, seat: Seat, message: Message) -> Message:
        seat.session = True
        await asyncio.wait({self._resume})
        if self._resume.cancelled() or self._resume.exception() is not None:
            raise ValueError("the attempt is over")
        resume = self._resume.result()
        if not self._resume_said:
            self._resume_said = True
            self._ledger.add(
                Resumed(
                    time=clock.now(),
                    attempt=self._attempt.number,
                    step=resume.step,
                    tier=resume.tier,
                    path=str(resume.kept) if resume.kept else None,
                )
            )
        return {
            "path": str(resume.path) if resume.path else None,
            "step": resume.step,
            "tier": resume.tier.value if resume.tier else None,
            "on_demand": resume.on_demand is not None,
            "skips": [asdict(skip) for skip in self._ledger.record.skips],
            "known": rollback.known(self._ledger.record)._asdict(),
        }

    async def _on_need(self, seat: Seat, message: Message) -> Message:
        source = self._source
        if source is None:
            raise ValueError("there is nothing to ask for")
        wanted = {
            str(name): [(int(start), int(length)) for start, length in ranges]
            for name, ranges in dict(message["files"]).items()
        }
        self._attempt.fetching += 1
        try:
            await in_thread(lambda: source.need(wanted))
        except (CheckpointError, StorageError) as error:
            return {"problem": str(error), "damaged": isinstance(error, CheckpointError)}
        finally:
            self._attempt.fetching -= 1
        return {}

    @property
    def _source(self) -> OnDemand | None:
        done = self._resume.done() and not self._resume.cancelled() and self._resume.exception() is None
        return self._resume.result().on_demand if done else None

    def close(self) -> None:
        """No rank asks any more."""
        if self._source is not None:
            self._source.close()

    def _on_resumed(self, seat: Seat, message: Message) -> None:
        seconds = float(message["seconds"])
        self._attempt.restore_seconds = max(self._attempt.restore_seconds, seconds)
        if seat.rank == 0 and int(message["step"]):
            self._console.say(f"resumed at step {message['step']} in {seconds:.2f} s")
        self._restored.add(seat.rank)
        if len(self._restored) == self._attempt.local_size:
            if (source := self._source) is not None:
                needed, total = size(source.bytes), size(source.total)
                self._console.say(f"{needed} of the checkpoint's {total} were read for this node")
            self._on_restored()

    def _on_rejected(self, seat: Seat, message: Message) -> None:
        reason, resume = str(message["reason"]), self._resume.result()
        kept = resume.kept if resume.kept is not None else Path(str(message["path"]))
        if message["damaged"] and kept not in self.unloadable:
            self.unloadable.add(kept)
            self._console.say(f"rank {seat.rank} cannot load {kept}: {reason}")

    def _on_saved(self, seat: Seat, message: Message) -> None:
        step = int(message["step"])
        try:
            whole = self._snapshots.part(
                seat.rank,
                self._attempt.ranks,
                step=step,
                slot=int(message["slot"]),
                seconds=float(message["seconds"]),
                size=int(message["bytes"]),
                metrics=_numbers(message["metrics"]),
            )
        except EverstepError as error:
            self._save_failed(step, str(error), self._snapshots.abandon(step, str(error)))
            return
        if whole:
            self._attempt.offer_slot(self._snapshots.offer_word)
            self._saved(step, self._savepoints.served(step))

    def _on_save_failed(self, seat: Seat, message: Message) -> None:
        step, reason, torn = int(message["step"]), str(message["reason"]), bool(message.get("torn"))
        if int(message["slot"]) < 0:  # there was none
            self._snapshots.skip(step, reason)
            self._save_failed(step, reason)
        elif torn:  # on this rank alone
            if self._snapshots.tear(step, int(message["slot"])):
                self._save_failed(step, f"rank {seat.rank}: {reason}")
        elif seat.rank == 0:  # any other failure is alike on all ranks
            self._save_failed(step, reason, self._snapshots.abandon(step, reason))

    def _save_failed(self, step: int, reason: str, moved: Path | None = None) -> None:
        self._savepoints.failed(step, reason)
        self._attempt.offer_slot(self._snapshots.offer_word)
        elsewhere = f"; its slot lies in {moved} from now on" if moved else ""
        self._console.say(f"the snapshot of step {step} failed: {reason}{elsewhere}; training goes on")

    def _on_request(self, seat: Seat, message: Message) -> None:
        self._savepoints.request(int(message["step"]))

    def _on_waiting(self, seat: Seat, message: Message) -> None:
        self._savepoints.standing(seat.rank, int(message["step"]))

    def _on_metrics(self, seat: Seat, message: Message) -> None:
        self._attempt.metrics |= _numbers(message["values"])

    def _on_trouble(self, seat: Seat, message: Message) -> None:
        self._guarding.hear(seat, message)

    def _on_imported(self, seat: Seat, message: Message) -> None:
        self._imported({key: message[key] for key in ("names", "beyond", "stopped_by")})

    def _on_closed(self, seat: Seat, message: Message) -> None:
        seat.completed = bool(message["completed"])

    def _on_raised(self, seat: Seat, message: Message) -> None:
        raised = Raised(
            type=str(message["type"]),
            message=str(message["message"]),
            traceback=str(message["traceback"]),
            bases=tuple(str(base) for base in message.get("bases", ())),
        )
        self._attempt.raised(seat, raised)

    def _on_exiting(self, seat: Seat, message: Message) -> None:
        seat.told_code, seat.told_at = int(message["code"]), clock.monotonic()

    def _on_left(self, seat: Seat, message: Message) -> None:
        self._attempt.left(seat)


def _numbers(values: Any) -> dict[str, float]:
    return {str(name): float(value) for name, value in dict(values).items()}
