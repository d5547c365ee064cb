"""``everstep status``: once, or again and again until the job has ended."""

from __future__ import annotations

import sys
import time
from json import dumps
from pathlib import Path

from supervisor import status as statuses
from supervisor.edge import clock

PERIOD = 1.0  # seconds between two looks
HOME_AND_CLEAR = "\x1b[H\x1b[2J"


def status(job: Path, *, json: bool, watch: bool) -> int:
    """Print the status; with ``watch`` every second: one JSON object a line, or a page that is renewed on a terminal."""
    terminal = sys.stdout.isatty()
    looker = statuses.Watch(job)
    while True:
        found = looker.look(clock.now())
        text = (
            dumps(statuses.to_json(found), indent=None if watch else 2) if json else statuses.to_text(found)
        )
        if watch and terminal and not json:
            text = HOME_AND_CLEAR + text
        elif watch and not json:
            text += "\n"
        print(text, flush=True)
        if not watch or not found.alive:  # killed or in order: without a supervisor nothing will change
            return 0
        time.sleep(PERIOD)
