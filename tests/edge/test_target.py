"""A process is hit for certain, or not at all; a bit that was flipped is put back."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from supervisor.edge import damage
from supervisor.edge.target import has_open, held, parent_of

WAIT = [sys.executable, "-c", "import sys; sys.stdin.read()"]


def test_the_process_meant_is_signalled() -> None:
    with subprocess.Popen(WAIT, stdin=subprocess.PIPE) as process:
        assert parent_of(process.pid) == os.getpid()
        with held(process.pid, lambda pid: pid == process.pid) as target:
            assert target.is_alive
            target.send(signal.SIGKILL)
            process.wait()
            assert not target.is_alive
            with pytest.raises(ProcessLookupError):
                target.send(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL


def test_another_process_is_not() -> None:
    with subprocess.Popen(WAIT, stdin=subprocess.PIPE) as process:
        with pytest.raises(ProcessLookupError, match="another process"), held(process.pid, lambda pid: False):
            pass
        process.stdin.close()  # type: ignore[union-attr]
        assert process.wait() == 0
    with pytest.raises(ProcessLookupError), held(process.pid, lambda pid: True):
        pass


def test_who_has_a_file_open(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch()
    assert not has_open(os.getpid(), path)
    with path.open():
        assert has_open(os.getpid(), path)
    assert not has_open(os.getpid(), tmp_path / "none")


# --------------------------------------------------------------------------- damage


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(200)))
    return path


def test_a_bit_is_flipped_and_put_back_whatever_happens(file: Path, tmp_path: Path) -> None:
    before, note = file.read_bytes(), tmp_path / "note"
    with contextlib.suppress(KeyboardInterrupt), damage.flipped(file, note) as offset:
        now = file.read_bytes()
        assert [n for n in range(200) if now[n] != before[n]] == [offset]
        assert note.exists()
        raise KeyboardInterrupt
    assert file.read_bytes() == before
    assert not note.exists()


def test_what_was_written_since_is_left_alone(file: Path, tmp_path: Path) -> None:
    with damage.flipped(file, tmp_path / "note"):
        file.rename(tmp_path / "aside")
        file.write_bytes(b"new" * 100)
    assert file.read_bytes() == b"new" * 100
    assert (tmp_path / "aside").read_bytes() == bytes(range(200))


DIE = """
import os, signal, sys
from pathlib import Path
from supervisor.edge import damage
with damage.flipped(Path(sys.argv[1]), Path(sys.argv[2])):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_rehearsal_leaves_what_can_be_mended(file: Path, tmp_path: Path) -> None:
    before, note = file.read_bytes(), tmp_path / "note"
    assert damage.mend_noted(note) is None
    killed = subprocess.run([sys.executable, "-c", DIE, str(file), str(note)], cwd=Path(__file__).parents[2])
    assert killed.returncode == -signal.SIGKILL
    assert file.read_bytes() != before
    assert damage.mend_noted(note) == file
    assert file.read_bytes() == before
    assert not note.exists()
