"""The live view of ``everstep status --watch``: a status as rows that fit any width from 40 columns on.

Shapes tell as much as colours do, so it is read without them too (NO_COLOR, a photograph of a screen).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Final

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from launch.plot import bars
from launch.trail import Trail
from supervisor import numbers
from supervisor.decide import straggler
from supervisor.errors import ConfigError
from supervisor.intervals import parse_duration
from supervisor.model import State
from supervisor.status import Held, Status
from supervisor.status_views import slow_node
from supervisor.wording import duration

LABEL: Final = 11  # columns
MOST_WIDE: Final = 67  # columns of a bar
MOST_RANKS: Final = 8  # each with a row of its own
STATES: Final = {
    State.RUNNING: "green", State.COMPLETED: "green", State.FAILED: "red", State.PREEMPTED: "yellow", State.STOPPING: "yellow",
    State.RESTARTING: "yellow",
}  # fmt: skip
OUTCOMES: Final = {
    "running": ("▶", "cyan"), "finished": ("●", "green"), "failed": ("✗", "red"), "stopped": ("◐", "yellow"), "cut off": ("○", "yellow"),
}  # fmt: skip
ACTIVITIES: Final = {
    "productive": ("█", "green"), "redone": ("▓", "yellow"), "snapshot": ("▒", "magenta"), "startup": ("▒", "blue"),
    "detection": ("▓", "red"), "teardown": ("▒", "red"), "restore": ("▒", "cyan"), "stopped": ("░", "white"),
}  # fmt: skip


class View:
    """One look at a job, to be drawn in whatever width there is."""

    def __init__(self, status: Status, trail: Trail) -> None:
        self._status, self._trail = status, trail

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The rows."""
        room = max(20, options.max_width - LABEL - 2)
        grid = Table.grid(padding=(0, 1), expand=False)
        grid.add_column(width=LABEL, style="dim", no_wrap=True)
        grid.add_column(width=room, overflow="fold")
        for label, text in self._rows(room):
            grid.add_row(label, text)
        yield grid

    def _rows(self, room: int) -> Iterable[tuple[str, Text]]:
        status, record = self._status, self._status.record
        yield (
            "",
            _spaced(
                (status.path.name, "bold"), (status.state.value, STATES.get(status.state, "cyan") + " bold")
            ),
        )
        if status.reason:
            yield "", Text(status.reason)
        yield "steps", self._steps()
        if status.total_steps:
            yield "", _bar(status.step / status.total_steps, room)
        if (loss := status.metrics.get("loss")) is not None:
            yield "loss", self._loss(loss, room)
        others = [f"{name} {value:.4g}" for name, value in status.metrics.items() if name != "loss"]
        if others:
            yield "metrics", Text(", ".join(others))
        yield "snapshot", self._held(status.snapshot)
        yield "checkpoint", self._held(status.checkpoint)
        if record.drain_failure:
            yield "", Text(f"a newer one failed: {record.drain_failure}", "red")
        yield "attempts", self._attempts(room)
        yield (
            "goodput",
            Text(f"{status.spent.goodput:.1%}", "bold").append(f", {record.lost_steps} steps done again"),
        )
        yield from self._time(room)
        yield from self._ranks(room)
        yield from self._remarks()
        yield "left", Text(self._budgets())
        if status.age is not None:
            yield "live", Text(f"as {record.host} told {duration(status.age)} ago", "dim")

    def _steps(self) -> Text:
        status = self._status
        of = f" of {status.total_steps:,}" if status.total_steps else ""
        text = Text(f"{status.step:,}", "bold").append(of, "not bold")
        if status.rate:
            text.append(f"   {status.rate:.3g} steps/s", "not bold")
            if status.total_steps and status.total_steps > status.step:
                left = duration((status.total_steps - status.step) / status.rate)
                text.append(f"   {left} to go", "not bold")
        return text

    def _loss(self, loss: float, room: int) -> Text:
        newest = [loss] if math.isfinite(loss) else []
        text = _spark([*self._trail.losses, *newest], room - 10)
        return text.append(f"  {loss:.4g}", "bold" if newest else "bold red")

    def _held(self, held: Held | None) -> Text:
        if held is None:
            return Text("none yet", "dim")
        age = "" if held.time is None else f"   {duration(self._status.now - held.time)} ago"
        return Text(f"step {held.step:,}").append(age, "dim")

    def _attempts(self, room: int) -> Text:
        outcomes = list(self._trail.outcomes.values())
        shown = outcomes[-min(room - 6, 60) :]
        text = Text()
        if len(shown) < len(outcomes):
            text.append(f"…{len(outcomes) - len(shown)} ", "dim")
        for outcome in shown:
            if outcome == "running" and not self._status.alive:
                outcome = "cut off"
            text.append(*OUTCOMES[outcome])
        record = self._status.record
        counts = [
            f"{number} {noun}{'' if number == 1 else 's'}"
            for number, noun in ((record.restarts, "restart"), (record.preemptions, "preemption"))
            if number
        ]
        return text.append(f"  {', '.join(counts)}" if counts else "", "dim")

    def _time(self, room: int) -> Iterable[tuple[str, Text]]:
        wide = min(room, MOST_WIDE)
        spent = {name: seconds for name, seconds in asdict(self._status.spent).items() if seconds >= 0.05}
        total = sum(spent.values())
        if not total:
            return
        bar, edge, done = Text(), 0, 0.0
        for name, (glyph, colour) in ACTIVITIES.items():
            done += spent.get(name, 0.0)
            bar.append(glyph * (round(done / total * wide) - edge), colour)
            edge = round(done / total * wide)
        yield "time", bar
        legend, used = Text(), 0
        for name, seconds in sorted(spent.items(), key=lambda item: -item[1]):
            glyph, colour = ACTIVITIES[name]
            words = f" {name} {duration(seconds)}"
            apart = "   " if used and used + 4 + len(words) <= room else "\n" if used else ""
            used = (used if apart == "   " else 0) + len(apart.strip("\n")) + 1 + len(words)
            legend.append(apart).append(glyph, colour).append(words, "dim")
        yield "", legend

    def _ranks(self, room: int) -> Iterable[tuple[str, Text]]:
        """How long each rank is busy with a step; all of them march in step, so the busiest is the one that is waited for."""
        shares, rate = self._status.own_shares, self._status.rate
        if not shares or not rate:
            return
        slow = straggler.slowest(shares)
        shown = (
            sorted(shares)
            if len(shares) <= MOST_RANKS
            else sorted(shares, key=lambda rank: -shares[rank])[:3]
        )
        width = max(4, min(24, room - 22))
        for number, rank in enumerate(shown):
            share = min(1.0, shares[rank])
            text = Text(f"{rank:>4} ").append("━" * round(share * width), "red" if rank == slow else "cyan")
            text.append("╌" * (width - round(share * width)), "dim").append(f" {duration_ms(share / rate)}")
            if rank == slow:
                node = slow_node(self._status)
                text.append(" ◀ waited for" + ("" if node is None else f", on {node}"), "red")
            yield ("own time" if number == 0 else ""), text
        if len(shown) < len(shares):
            yield "", Text(f"the busiest of {len(shares)} ranks; a step takes {duration_ms(1 / rate)}", "dim")

    def _remarks(self) -> Iterable[tuple[str, Text]]:
        status, record = self._status, self._status.record
        if record.stop is not None and status.alive and status.state is State.STOPPING:
            since = status.now - record.stop.time
            left = self._time_left(since)
            countdown = "" if left is None else f", {duration(left)} left of its time"
            yield (
                "notice",
                Text(
                    f"{record.stop.source} {duration(since)} ago: all ranks save and stop{countdown}",
                    "yellow",
                ),
            )
        elif record.deadline is not None and status.alive:
            left = record.deadline.deadline - status.now
            yield "notice", Text(f"{record.deadline.source} in {duration(left)}", "yellow")
        for label, text in numbers.rows(record, alive=status.alive):
            yield label, Text(text, "yellow" if label == "warning" else "")
        if record.last_failure is not None:
            failure = record.last_failure
            ago = duration(status.now - failure.time)
            yield "failed", Text(f"{ago} ago, attempt {failure.attempt}: {failure.reason}")
        if status.problems:
            yield (
                "journal",
                Text(f"{len(status.problems)} lines cannot be used: {status.problems[-1]}", "yellow"),
            )
        if not status.alive and status.record.pid is not None:
            yield "supervisor", Text("gone: what is shown is how it left the job", "dim")

    def _time_left(self, since: float) -> float | None:
        """Of a stop: until the deadline that came with it or is known, else what is left of ``--grace``."""
        record, now = self._status.record, self._status.now
        known = [
            one.deadline
            for one in (record.stop, record.deadline)
            if one is not None and one.deadline is not None
        ]
        if known:
            return max(0.0, min(known) - now)
        try:
            return max(0.0, parse_duration(self._trail.settings["grace"]) - since)
        except (KeyError, ConfigError):
            return None

    def _budgets(self) -> str:
        record = self._status.record
        failures = max(0, record.limits.max_failures - record.failures_since_progress)
        preemptions = max(0, record.limits.max_preemptions - record.preemptions_since_progress)
        return f"{failures} of {record.limits.max_failures} failures, {preemptions} of {record.limits.max_preemptions} preemptions"


def duration_ms(seconds: float) -> str:
    """As ``duration``, but milliseconds below a second."""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else duration(seconds)


def can_show(encoding: str | None) -> bool:
    """Whether a terminal of this encoding can show it."""
    try:
        "█▁╌✗▶".encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return os.environ.get("TERM", "dumb") != "dumb"


def _spaced(*parts: tuple[str, str]) -> Text:
    return Text("  ").join(Text(*part) for part in parts)


def _bar(part: float, room: int) -> Text:
    width = max(4, min(60, room - 7))
    full = round(min(1.0, part) * width)
    return Text("━" * full, "cyan").append("─" * (width - full), "dim").append(f" {part:.0%}")


def _spark(values: Sequence[float], room: int) -> Text:
    if not values:
        return Text()
    return Text(bars(values, max(4, min(48, room))), "cyan")
