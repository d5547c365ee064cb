"""One job at a time uses a directory of checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from supervisor.edge import claiming
from supervisor.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent
HOLD = (
    "import sys; from pathlib import Path; from supervisor.edge.claiming import claim\n"
    "lock = claim(Path(sys.argv[1]), 'first', Path('/jobs/first')); print('held', flush=True); sys.stdin.read()"
)


def test_another_job_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "checkpoints"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, place], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(ConfigError, match=r"used by another job, /jobs/first: give each"):
        claiming.claim(place, "second", Path("/jobs/second"))
    assert claiming.claim(place, "first", Path("/jobs/first")) is None  # by another of its nodes
    holder.kill()  # however it ends
    holder.wait()
    lock = claiming.claim(place, "second", Path("/jobs/second"))
    assert lock is not None
    with lock:
        assert (place / claiming.NAME).read_text() == "second /jobs/second\n"


def test_a_place_that_cannot_be_locked_is_used_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert claiming.claim(tmp_path / "file" / "checkpoints", "run", Path("/job")) is None
