"""The version of the installed distribution."""

from __future__ import annotations


def version() -> str:
    """As pip knows it; ``0+unknown`` in a source tree that was never installed."""
    from importlib import metadata

    try:
        return metadata.version("everstep")
    except metadata.PackageNotFoundError:
        return "0+unknown"
