"""Fixtures of the end-to-end tests: a job that cleans up after itself, and the undisturbed run to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import harness

STEPS = 30


@pytest.fixture
def job(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[harness.Job]:
    """``STANDBY`` in a module: whether its jobs have a standby."""
    with harness.job(tmp_path / "job") as one:
        one.standby = getattr(request.module, "STANDBY", one.standby)
        yield one


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """As ``undisturbed``, of a single process."""
    return harness.plain_digests(tmp_path_factory.mktemp("alone"), STEPS, ranks=1)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of the final weights of the same script under plain torchrun, without a Session."""
    return harness.plain_digests(tmp_path_factory.mktemp("undisturbed"), STEPS)
