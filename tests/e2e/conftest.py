"""Fixtures of the end-to-end tests: a job that cleans up after itself, and the undisturbed run to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import harness

STEPS = 30


@pytest.fixture
def job(tmp_path: Path) -> Iterator[harness.Job]:
    with harness.job(tmp_path / "job") as one:
        yield one


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of the final weights of the same script under plain torchrun, without a Session."""
    return harness.plain_digests(tmp_path_factory.mktemp("undisturbed"), STEPS)
