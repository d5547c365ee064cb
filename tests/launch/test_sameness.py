"""A script sees under our boot what it sees without: run one probe both ways and compare all it has noticed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.launch.listener import Listener, wait

PROBE = Path(__file__).with_name("probe.py")
PYTHON = sys.executable
TORCHRUN = str(Path(sys.executable).with_name("torchrun"))


@pytest.fixture(autouse=True)
def usual_signals() -> Iterator[None]:
    """As in a terminal: a shell has what it starts in the background ignore SIGQUIT, which torchrun alone undoes."""
    before = signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGQUIT, before)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's directory with the probe in every form; it is the cwd. It has modules named as ours are."""
    root = tmp_path / "project"
    package = root / "package"
    package.mkdir(parents=True)
    for place in (root / "probe.py", package / "__main__.py", package / "inner.py"):
        shutil.copy(PROBE, place)
    (package / "__init__.py").write_text("")
    (root / "link.py").symlink_to(package / "inner.py")
    with zipfile.ZipFile(root / "probe.zip", "w") as archive:
        archive.write(PROBE, "__main__.py")
    for name in ("supervisor", "launch", "boot", "worker", "torchrun", "program", "socket_"):
        (root / f"{name}.py").write_text("raise ImportError('the user's own module was imported')\n")
    monkeypatch.chdir(root)
    return root


def under_boot(command: Sequence[str], folder: Path, ranks: int = 1, **more: str) -> list[Any]:
    folder.mkdir()
    probe = folder / "probe"
    probe.mkdir()
    with Listener(folder) as listener:
        code = wait(listener.start(command, PROBE=str(probe), **more))
        output = [file.read_text() for file in listener.logs.iterdir()]
    assert code == 0, output
    return [json.loads((probe / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


def without(command: Sequence[str], folder: Path, ranks: int = 1, **more: str) -> list[Any]:
    folder.mkdir()
    if Path(command[0]).name.startswith("python"):  # torchrun adds it, and so do we
        command = [command[0], "-u", *command[1:]]
    subprocess.run(
        command,
        env={**os.environ, "PROBE": str(folder), **more},
        stdin=subprocess.DEVNULL,
        check=True,
        timeout=120,
    )
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


def compare(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Equal in every rank; what differs is shown, not all."""
    for mine, other in zip(ours, theirs, strict=True):
        assert {k: v for k, v in mine.items() if other.get(k) != v} == {
            k: v for k, v in other.items() if mine.get(k) != v
        }


@pytest.mark.parametrize(
    "words",
    [
        ["probe.py", "--x", "1", "--", "-m"],
        ["./package/../probe.py"],
        ["package/inner.py", "a b", ""],
        ["link.py"],
        ["-m", "probe", "-m"],
        ["-m", "package", "x"],
        ["-m", "package.inner"],
        ["package"],
        ["probe.zip", "y"],
        ["-P", "probe.py"],
        ["-OX", "dev", "-W", "ignore::UserWarning", "-m", "package"],
    ],
    ids=" ".join,
)
def test_python(words: list[str], project: Path, tmp_path: Path) -> None:
    command = [PYTHON, *words]
    compare(under_boot(command, tmp_path / "boot"), without(command, tmp_path / "plain"))


def test_python_with_an_absolute_path(project: Path, tmp_path: Path) -> None:
    command = [PYTHON, str(project / "probe.py")]
    compare(under_boot(command, tmp_path / "boot"), without(command, tmp_path / "plain"))


@pytest.mark.parametrize(
    "words",
    [
        ["--standalone", "--nproc_per_node=2", "probe.py", "--nproc-per-node", "3"],
        ["--nproc-per-node", "1", "--role=trainer", "-m", "package", "x"],
        ["--no-python", PYTHON, "-u", "probe.py", "y"],
    ],
    ids=["script", "module", "no-python"],
)
def test_torchrun(words: list[str], project: Path, tmp_path: Path) -> None:
    ranks = 2 if "--standalone" in words else 1
    command = [TORCHRUN, *words]
    ours, theirs = under_boot(command, tmp_path / "boot", ranks), without(command, tmp_path / "plain", ranks)
    if "--no-python" in words:
        theirs[0]["environ"]["PYTHONUNBUFFERED"] = "1"  # so that no line waits in a process that is killed
    compare(ours, theirs)


def test_torchrun_run_path(project: Path, tmp_path: Path) -> None:
    """torchrun starts it in a child of its own with a temporary ``__main__``; what can be the same is."""
    (project / "small.py").write_text(
        "import json, os, sys\n"
        "seen = [__name__, __file__, sys.argv, sys.path, os.getcwd(), os.environ['RANK']]\n"
        "json.dump(seen, open(os.environ['PROBE'] + '/rank-0.json', 'w'))\n"
    )
    command = [TORCHRUN, "--run-path", str(project / "small.py"), "z"]
    assert under_boot(command, tmp_path / "boot") == without(command, tmp_path / "plain")
