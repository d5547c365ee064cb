"""What the recorder notes, what it leaves out, and what importing ahead leaves behind."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from launch import warmup

ROOT = str(Path(__file__).parents[2])


def test_it_notes_until_the_environment_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = warmup.Recorder(["known"])
    recorder.find_spec("json", None)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/tmp/torchinductor_me")  # torch's own doing
    recorder.find_spec("wave", None)
    monkeypatch.setenv("SOME_LIBRARYS_BACKEND", "torch")
    recorder.find_spec("csv", None)
    monkeypatch.delenv("SOME_LIBRARYS_BACKEND")
    recorder.find_spec("cmd", None)
    assert recorder.names == ["known", "json", "wave"]


def test_it_notes_until_the_path_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = warmup.Recorder()
    recorder.find_spec("json", None)
    monkeypatch.syspath_prepend("/somewhere")
    recorder.find_spec("csv", None)
    assert recorder.names == ["json"]


def test_only_installed_modules_that_are_loaded_can_be_imported_ahead() -> None:
    import json

    assert json.__name__ in sys.modules
    names = [
        "json",
        "json",
        "no_such_module",
        "tests.launch.test_warmup",
        "pytest",
        "supervisor.errors",
        "sys",
    ]
    assert warmup.Recorder(names).importable(ROOT) == ["json", "pytest", "supervisor.errors"]


def test_importing_ahead_leaves_no_trace_in_the_surroundings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meddler.py").write_text(
        "import os, sys\nos.environ['HOME'] = os.environ['MEDDLED'] = 'x'\nsys.path.append('x')\nsys.argv.append('x')\n"
    )
    (tmp_path / "failing.py").write_text("raise OSError\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = dict(os.environ), list(sys.path), list(sys.argv)
    warmup.preimport(["failing", "meddler", "no_such_module"])
    assert "meddler" in sys.modules
    assert (dict(os.environ), sys.path, sys.argv) == before
    del sys.modules["meddler"]


@pytest.mark.parametrize(
    ("rank", "local_rank", "notes"), [(0, 0, True), (1, 1, False), (8, 0, True), (9, 1, False)]
)
def test_on_every_node_one_rank_notes(rank: int, local_rank: int, notes: bool) -> None:
    """The standby of a node without rank 0 had nothing to import ahead."""
    told: dict[str, list[str]] = {}

    class Link:
        welcome: ClassVar[dict[str, object]] = {}

        def __init__(self) -> None:
            self.rank, self.local_rank = rank, local_rank

        def tell(self, kind: str, names: list[str]) -> None:
            told[kind] = names

    gate = warmup.Gate(Link(), ROOT)  # type: ignore[arg-type]
    gate.is_closed = False
    before = list(sys.meta_path)
    gate.enter()
    noted = [finder for finder in sys.meta_path if finder not in before]
    gate.told()()
    assert bool(noted) == ("imported" in told) == notes
    assert sys.meta_path == before
