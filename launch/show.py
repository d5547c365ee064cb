"""``everstep status``: once, or again and again until the job has ended."""

from __future__ import annotations

import sys
import time
from json import dumps
from pathlib import Path

from supervisor import status as statuses
from supervisor.edge import clock
from supervisor.edge.jobdir import JobDirectory
from supervisor.status_views import to_json, to_text

PERIOD = 1.0  # seconds between two looks


def status(job: Path, *, json: bool, watch: bool) -> int:
    """Print the status; with ``watch`` every second: one JSON object a line, a block of lines, or a view on a terminal."""
    if watch and not json and sys.stdout.isatty():
        from launch import view

        if view.can_show(sys.stdout.encoding):
            return _live(job)
    looker = statuses.Watch(job)
    while True:
        found = looker.look(clock.now())
        text = dumps(to_json(found), indent=None if watch else 2) if json else to_text(found)
        print(text + ("\n" if watch and not json else ""), flush=True)
        if not watch or not found.alive:  # killed or in order: without a supervisor nothing will change
            return 0
        time.sleep(PERIOD)


def _live(job: Path) -> int:
    """A view that is renewed in place; what it showed last stays on the screen."""
    from rich.console import Console
    from rich.live import Live

    from launch.trail import Trail
    from launch.view import View

    looker, trail, console = statuses.Watch(job), Trail(JobDirectory(job).journal), Console()
    view = None
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                found = looker.look(clock.now())
                trail.advance()
                view = View(found, trail)
                live.update(view, refresh=True)
                if not found.alive:
                    return 0
                time.sleep(PERIOD)
    finally:
        if view is not None:
            console.print(view)
