"""The page that a report is: one HTML file with its style, its script and its data in it, which loads nothing.

It says so itself: its content security policy allows exactly the one style and the one script that are in it, by their
digests, and no connection to anywhere (a served page: only to where it came from). What a job has printed or raised is data,
never markup.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from pathlib import Path
from typing import Any, Final

ASSETS: Final = Path(__file__).parent / "page"
SCRIPTS: Final = ("base.js", "charts.js", "tables.js", "page.js")


def render(document: dict[str, Any], *, live: dict[str, Any] | None = None) -> str:
    """``document`` (``supervisor/report.py``) as a page. ``live``: it is served, and follows its job."""
    style = _asset("page.css")
    script = "\n".join(map(_asset, SCRIPTS))
    data = document if live is None else {**document, "live": live}
    return _asset("page.html").format(
        policy=html.escape(policy(live=live is not None), quote=True),
        title=html.escape(f"{document['name']}: everstep"),
        style=style,
        script=script,
        data=embedded(data),
    )


def policy(*, live: bool) -> str:
    """The content security policy of the page."""
    style, script = _asset("page.css"), "\n".join(map(_asset, SCRIPTS))
    connect = "; connect-src 'self'" if live else ""
    return (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'{connect}; "
        "base-uri 'none'; form-action 'none'"
    )


def embedded(document: dict[str, Any]) -> str:
    """JSON that no text in it can end the element of: ``<`` is written as an escape."""
    text = json.dumps(document, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
