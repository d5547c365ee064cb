from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest

from supervisor.edge import forensics

REPORT = b"E0000 failed (exitcode: -9) local_rank: 1 (pid: 4711) of binary: /usr/bin/python\n"


def test_torchruns_report_is_found_at_the_end_of_a_log_of_any_length(tmp_path: Path) -> None:
    """With ``--tee`` every rank's output is in it too."""
    log = tmp_path / "torchrun.log"
    with open(log, "wb") as file:
        file.truncate(300 << 20)  # a hole: it takes no room
        file.seek(0, 2)
        file.write(REPORT + b"rank 0 is told to leave\n" * 10_000)
    tracemalloc.start()
    assert forensics.exit_codes_in(log) == {4711: -9}
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_no_log_tells_nothing(tmp_path: Path) -> None:
    assert forensics.exit_codes_in(tmp_path / "torchrun.log") == {}


def test_flight_records_are_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in forensics.FLIGHT_RECORDS:
        monkeypatch.delenv(name, raising=False)
    assert forensics.collect_flight_records(tmp_path) == []
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "trace_0").write_bytes(b"old")
    os.utime(elsewhere / "trace_0", (1, 1))
    (tmp_path / "logs").mkdir()
    (elsewhere / "trace_1").write_bytes(b"new")
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", str(elsewhere / "trace_"))
    assert forensics.collect_flight_records(tmp_path) == [str(tmp_path / "flight" / "trace_1")]
