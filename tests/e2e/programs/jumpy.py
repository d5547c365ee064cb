"""``everstep run`` on a host whose wall clock is set back or forward again and again: ``jumpy.py SECONDS run …``."""

import itertools
import sys

from launch import cli
from supervisor.edge import clock

now = clock.now
jumps = itertools.cycle([0.0, float(sys.argv.pop(1)), 0.0, 60.0])
readings = itertools.count()
offset = 0.0


def jumping() -> float:
    """Every seventh reading comes after another jump."""
    global offset
    if next(readings) % 7 == 0:
        offset = next(jumps)
    return now() + offset


clock.now = jumping
if __name__ == "__main__":
    sys.exit(cli.main())
