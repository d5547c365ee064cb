"""``everstep report``: the story of a job as one HTML file that needs nothing else."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Mapping
from json import dumps
from pathlib import Path
from typing import Any, Final

from supervisor.errors import StorageError, UsageError
from supervisor.wording import count

DEFAULT: Final = "report.html"
MOST_SAID: Final = 5  # lines about a damaged journal
TEXT: Final = """\
Writes what a job did into one HTML file: attempts, time, metrics, checkpoints, failures with their evidence. The file loads
nothing from anywhere, so it can be kept, sent or attached. The job may be running; it is not disturbed.
"""


def add_parser(commands: Any, add_job: Callable[[argparse.ArgumentParser], None]) -> Any:
    """The words of the command."""
    parser = commands.add_parser("report", help="write what a job did into one HTML file", description=TEXT)
    parser.add_argument(
        "-o", "--output", metavar="FILE", default=DEFAULT,
        help=f"ending in .html, or - for standard output (default: {DEFAULT})",
    )  # fmt: skip
    add_job(parser)
    return parser


def answer(given: Mapping[str, Any], find_job: Callable[[], Path]) -> int:
    """Write it; returns 0. Raises UsageError, JobError or StorageError."""
    from launch import pages
    from supervisor.edge import clock
    from supervisor.report import Reporter

    output: str = given["output"]
    if not given["json"] and output != "-" and not output.lower().endswith((".html", ".htm")):
        raise UsageError(
            f"-o {output}: a report is written to a file ending in .html, or to - (standard output)"
        )
    document = Reporter(find_job()).document(clock.now())
    if given["json"]:
        print(dumps(document, indent=2, allow_nan=False))
        return 0
    problems = document["status"]["problems"]
    for problem in problems[:MOST_SAID]:
        print(f"everstep: {problem}", file=sys.stderr)
    if len(problems) > MOST_SAID:
        print(f"everstep: and {len(problems) - MOST_SAID} more, which the report lists", file=sys.stderr)
    page = pages.render(document)
    if output == "-":
        sys.stdout.write(page)
    else:
        _write(Path(output).expanduser(), page)
        print(f"{output}: {count(len(document['attempts']), 'attempt')}, {len(page.encode()) / 1e6:.1f} MB")
    return 0


def _write(file: Path, page: str) -> None:
    """All of it, or what was there before. Raises StorageError."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        raise StorageError(f"{file}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
