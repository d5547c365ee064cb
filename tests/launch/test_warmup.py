"""What the recorder notes, what it leaves out, and what importing ahead leaves behind."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
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


def test_it_tells_what_came_before_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLD", "1")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    recorder = warmup.Recorder()
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("OLD")
    recorder.find_spec("torch", None)
    recorder.find_spec("wave", None)
    assert recorder.stopped_by == ["OLD", "OMP_NUM_THREADS"]
    monkeypatch.setitem(sys.modules, "torch", sys)
    recorder = warmup.Recorder()
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    recorder.find_spec("wave", None)
    assert recorder.stopped_by == []


def test_it_notes_apart_what_comes_after_a_change_of_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = warmup.Recorder(["known"], ["further"])
    recorder.find_spec("json", None)
    monkeypatch.syspath_prepend("/somewhere")
    recorder.find_spec("csv", None)
    assert recorder.names == ["known", "json"]
    assert recorder.beyond == ["further", "csv"]


def test_only_installed_modules_that_are_loaded_can_be_imported_ahead() -> None:
    import json

    names = [
        "json",
        "json",
        "no_such_module",
        "tests.launch.test_warmup",
        "pytest",
        "supervisor.errors",
        "sys",
    ]
    assert warmup.Recorder(names).importable(ROOT) == (["json", "pytest", "supervisor.errors"], {})
    found = warmup.Recorder([], ["tests", "tests.launch", *names]).importable(ROOT)
    assert found[0] == []
    assert found[1] == {
        "tests": f"*{ROOT}/tests/__init__.py",
        "json": json.__file__,
        "pytest": pytest.__file__,
        "supervisor.errors": sys.modules["supervisor.errors"].__file__,
        "sys": "built-in",
    }


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of installed packages; what is imported from it is forgotten again."""
    for name, text in {"outer": "import ahead_of_it", "ahead_of_it": "", "outer/inner": ""}.items():
        path = tmp_path / "installed" / (f"{name}.py" if name != "outer" else "outer/__init__.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path / "installed"))
    before = set(sys.modules)
    yield tmp_path / "installed"
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_what_is_beyond_is_imported_where_it_is_the_same(place: Path) -> None:
    beyond = {
        "scripts_own": "*/own/scripts_own.py",
        "outer": str(place / "outer" / "__init__.py"),
        "ahead_of_it": str(place / "ahead_of_it.py"),
        "outer.inner": str(place / "outer" / "inner.py"),
    }
    warmup.preimport([], beyond)
    assert beyond.keys() - sys.modules.keys() == {"scripts_own"}


def test_what_the_path_would_find_elsewhere_is_left_to_the_script(place: Path) -> None:
    other = {"outer": "/other/outer/__init__.py", "outer.inner": "/other/outer/inner.py"}
    warmup.preimport([], other)
    assert not other.keys() & sys.modules.keys()
    # its own `ahead_of_it`, which an installed package imports, too
    own = {"ahead_of_it": "*/own/ahead_of_it.py", "outer": str(place / "outer" / "__init__.py")}
    warmup.preimport([], own)
    assert not own.keys() & sys.modules.keys()
    own["ahead_of_it"] = f"*{place / 'ahead_of_it.py'}"  # the same that the path leads to anyway
    warmup.preimport([], own)
    assert "outer" in sys.modules


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
    told: list[str] = []

    class Link:
        welcome: ClassVar[dict[str, object]] = {}

        def __init__(self) -> None:
            self.rank, self.local_rank = rank, local_rank

        def tell(self, kind: str, **_: object) -> None:
            told.append(kind)

    gate = warmup.Gate(Link(), ROOT)  # type: ignore[arg-type]
    gate.is_closed = False
    before = list(sys.meta_path)
    gate.enter()
    noted = [finder for finder in sys.meta_path if finder not in before]
    gate.told()()
    assert bool(noted) == ("imported" in told) == notes
    assert sys.meta_path == before
