"""What an attempt finds in its environment."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from supervisor.attempt import Attempt
from supervisor.edge.forensics import FLIGHT_RECORDS
from supervisor.launching import FLIGHT_RECORDER, Launcher
from supervisor.program import Rendezvous

WRITE = "import json, os, sys; json.dump(dict(os.environ), open(sys.argv[1], 'w'))"


@dataclass(frozen=True)
class Program:
    """Writes down its environment."""

    file: Path
    command: tuple[str, ...] = ()
    identity: str = "it"
    notices: tuple[str, ...] = ()
    has_ranks: bool = False

    @property
    def environment(self) -> Mapping[str, str]:
        return {}

    def attempt_argv(self, meeting: Rendezvous) -> list[str]:
        return [sys.executable, "-c", WRITE, str(self.file)]


def environment_of_an_attempt(folder: Path) -> dict[str, str]:
    async def launch() -> None:
        attempt = Attempt(0, folder / "attempts" / "0", folder / "runtime", "cafe")
        port = Launcher(Program(folder / "seen"), folder, "cafe", folder / "runtime").launch(attempt)
        await asyncio.wait_for(attempt.ended.wait(), 60)
        await attempt.leave()
        attempt.close()
        assert port is not None
        port.release()

    asyncio.run(launch())
    seen: dict[str, str] = json.loads((folder / "seen").read_text())
    return seen


@pytest.fixture(autouse=True)
def no_recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*FLIGHT_RECORDER, *FLIGHT_RECORDS):
        monkeypatch.delenv(name, raising=False)


def test_a_flight_recorder_that_is_on_dumps_into_the_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert FLIGHT_RECORDS[0] not in environment_of_an_attempt(tmp_path)
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "2000")
    prefix = environment_of_an_attempt(tmp_path)[FLIGHT_RECORDS[0]]
    assert prefix == str(tmp_path / "attempts" / "0" / "flight" / "rank_")
    assert Path(prefix).parent.is_dir()
    monkeypatch.setenv(FLIGHT_RECORDS[1], "/tmp/mine_")
    assert FLIGHT_RECORDS[0] not in environment_of_an_attempt(tmp_path)
