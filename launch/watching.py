"""The options of ``everstep run`` that say what is watched for: hangs, and numbers that go wrong."""

from __future__ import annotations

from typing import Any, Final

_HANG_LIMITS: Final = {
    "startup": "up to the first step, without a sign of life (default: 30m, once it is known to make steps)",
    "floor": "no learned limit is shorter (default: 1m with a Session, 10m without)",
    "ceiling": "no learned limit is longer; also that of evaluation phases (default: 30m)",
    "silence": "without any output, for programs without torch (default: never)",
}


_GUARD: Final = {
    "loss": ("NAME", "the metric that is the loss (default: loss)"),
    "norm": ("NAME", "the metric that is the norm of the gradients (default: grad_norm)"),
    "factor": ("X", "a spike is so many mean absolute deviations above the mean (default: 10)"),
    "patience": ("N", "… for so many logged steps in a row (default: 3)"),
    "skip": (
        "STEPS",
        "leave out so many steps and their data, up to the bad one: 1step, 50steps (default: off)",
    ),
    "times": ("N", "rollbacks that do not get past the trouble before it gives up (default: 3)"),
    "back": ("N", "checkpoints further back at each repetition (default: 1)"),
}


def add_options(group: Any) -> None:
    """Add them to a group of argparse's."""
    group.add_argument(
        "--hang",
        metavar="auto|off|TIME",
        help="when ranks that do not go on are killed and restarted: auto learns from the job's own steps, a TIME is "
        "the longest that a step may take (default: auto)",
    )
    for name, text in _HANG_LIMITS.items():
        group.add_argument(f"--hang-{name}", metavar="TIME", help=text)
    group.add_argument(
        "--guard",
        metavar="off|nan|spike",
        help="roll back when the logged loss is not finite, or (spike) also when it jumps (default: off)",
    )
    for name, (value, text) in _GUARD.items():
        group.add_argument(f"--guard-{name}", metavar=value, help=text)
