"""Where checkpoints are: a directory, or a prefix in an object store, named by its URL."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from supervisor.errors import ConfigError

#: schemes that lead to an object store, and how their URLs look
SCHEMES: Final = {
    "s3": "s3://bucket/prefix",
    "gs": "gs://bucket/prefix",
    "az": "az://container/prefix",
}
#: seconds that an object store may take to answer, unless the user says otherwise
TIMEOUT: Final = 30.0
_URL: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)


@dataclass(frozen=True, order=True)
class Remote:
    """A prefix in an object store. It joins and prints as a path does; ``url`` has no slash at its end."""

    url: str

    @property
    def scheme(self) -> str:
        """``s3``, ``gs``, …"""
        return self.url.partition("://")[0]

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> Remote:
        """All but the last part."""
        return Remote(self.url.rpartition("/")[0])

    def __truediv__(self, name: str) -> Remote:
        return Remote(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url


Location = Path | Remote


def is_url(text: str) -> bool:
    """Whether ``text`` is a URL, of any scheme."""
    return _URL.fullmatch(text) is not None


def located(text: str) -> Location:
    """The place that a text (the journal's, say) names."""
    return Remote(text.rstrip("/")) if is_url(text) else Path(text)


def parse(text: str) -> Location:
    """The place that the user means. Raises ConfigError for a URL that leads to no object store."""
    found = _URL.fullmatch(text)
    if found is None:
        return Path(text).expanduser()
    scheme, rest = found[1], found[2]
    if scheme not in SCHEMES:
        raise ConfigError(f"{text}: {scheme}:// is not supported; allowed: a path, {_allowed()}")
    if not rest.partition("/")[0]:
        raise ConfigError(f"{text}: no bucket is named; allowed: {SCHEMES[scheme]}")
    if any(character in rest for character in "?#@\\") or any(
        part in (".", "..") for part in rest.split("/")
    ):
        raise ConfigError(f"{text}: only a bucket and a plain prefix are allowed, as in {SCHEMES[scheme]}")
    return Remote(f"{scheme}://{re.sub('/+', '/', rest).rstrip('/')}")


def _allowed() -> str:
    return ", ".join(SCHEMES.values())
