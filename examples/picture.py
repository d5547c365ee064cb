"""The picture in the README: what ``make demo`` prints, recorded from a run of it, as an SVG of a terminal.

    make demo | python examples/picture.py docs/demo.svg

Nothing of it is made up, and a demo that was not true leaves no picture. The SVG loads no font from elsewhere: every line has
the length that its characters have in any monospaced one.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from rich.console import Console
from rich.highlighter import RegexHighlighter
from rich.terminal_theme import TerminalTheme
from rich.theme import Theme

WIDTH = 116  # columns
#: on a window that is dark in light surroundings, too
COLOURS = TerminalTheme(
    (22, 27, 34), (201, 209, 217),
    [(22, 27, 34), (255, 123, 114), (126, 231, 135), (242, 204, 96), (121, 192, 255), (210, 168, 255), (118, 227, 234), (201, 209, 217)],
)  # fmt: skip
STYLES = Theme(
    {
        "demo.command": "bold", "demo.kill": "bold red", "demo.back": "bold yellow", "demo.true": "bold green",
        "demo.ours": "cyan", "demo.teller": "#8b949e", "demo.weights": "green",
    }
)  # fmt: skip
SVG = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<title>What make demo prints</title>
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, "SFMono-Regular", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px; white-space: pre }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g></g></svg>
"""


class Marks(RegexHighlighter):
    """What one should see at first sight."""

    base_style = "demo."
    highlights = (
        r"(?P<teller>^(demo:|      \|))",
        r"(?P<command>\$ .*)",
        r"(?P<ours>everstep:)",
        r"(?P<kill>SIGKILL to rank \d)",
        r"(?P<kill>was killed by SIGKILL)",
        r"(?P<back>restarting now|resumed at step \d+ in [\d.]+ s|\d+ ms after the kill)",
        r"(?P<weights>\b[0-9a-f]{32}\b)",
        r"(?P<true>every bit is the same)",
    )


def main() -> int:
    """Draw what the standard input says, if it was all true; 0 when there is a picture."""
    if len(sys.argv) != 2 or not sys.argv[1].endswith(".svg"):
        print("usage: make demo | python examples/picture.py FILE.svg", file=sys.stderr)
        return 64
    lines = sys.stdin.read().splitlines()
    begin = next((number for number, line in enumerate(lines) if line.startswith("demo: ")), len(lines))
    if not lines or lines[-1] != "demo: every bit is the same":
        print("the demo did not come to its end, or was not true: no picture", file=sys.stderr)
        return 1
    console = Console(record=True, width=WIDTH, file=io.StringIO(), theme=STYLES, highlighter=Marks())
    for line in ("$ make demo", *lines[begin:]):
        console.print(line, markup=False)
    svg = console.export_svg(title="make demo", theme=COLOURS, code_format=SVG, unique_id="demo")
    Path(sys.argv[1]).write_text(svg)
    return 0


if __name__ == "__main__":
    sys.exit(main())
