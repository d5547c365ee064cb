"""What is installed: our two packages and nothing else, side by side with supervisord, which has our import name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("wheel")  # it is built once
ROOT = Path(__file__).parent.parent.parent
SUPERVISORD = "supervisor==4.3.0"


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Standard output of a command that must succeed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=cwd, timeout=180, env=environment
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our wheel, built from a copy of what a user would clone."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(
        ROOT,
        source,
        ignore=shutil.ignore_patterns(
            ".git", ".venv*", ".*_cache", "__pycache__", "everstep-runs", ".hypothesis"
        ),
    )
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_our_two_packages_only(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"supervisor", "launch"}
    assert {"supervisor/model.py", "supervisor/training/__init__.py", "supervisor/py.typed"} <= set(names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


@pytest.mark.parametrize("ours_first", [True, False], ids=["everstep first", "supervisord first"])
def test_works_beside_supervisord_in_either_order(wheel: Path, tmp_path: Path, ours_first: bool) -> None:
    python = environment(tmp_path / "environment")
    for package in [str(wheel), SUPERVISORD] if ours_first else [SUPERVISORD, str(wheel)]:
        pip(python, "install", "--no-deps", package)
    both_work(python, tmp_path)


def test_each_survives_the_others_removal(wheel: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "environment")
    pip(python, "install", "--no-deps", str(wheel), SUPERVISORD)
    pip(python, "uninstall", "--yes", "supervisor")
    everstep_works(python, tmp_path)
    pip(python, "install", "--no-deps", SUPERVISORD)
    pip(python, "uninstall", "--yes", "everstep")
    supervisord_works(python, tmp_path)


def environment(folder: Path) -> Path:
    """A virtual environment that sees what ours has installed (torch, psutil, …), but not our own source tree."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    site = Path(
        run(folder / "bin" / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    )
    # a plain path: .pth files in it, such as that of an editable install, are not followed
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


def pip(python: Path, *arguments: str) -> None:
    """Run our own pip for another environment."""
    run(
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--quiet",
        "--python",
        str(python),
        *arguments,
    )


def both_work(python: Path, folder: Path) -> None:
    everstep_works(python, folder)
    supervisord_works(python, folder)


def everstep_works(python: Path, folder: Path) -> None:
    """A job runs to its end under the installed command."""
    script = folder / "script.py"
    script.write_text("import supervisor.model, torch\nprint('ran', supervisor.__file__)\n")
    run(python.parent / "everstep", "run", "--dir", folder / "job", python, script, cwd=folder)
    assert '"completed"' in run(
        python.parent / "everstep", "status", "--dir", folder / "job", "--json", cwd=folder
    )
    shutil.rmtree(folder / "job")


def supervisord_works(python: Path, folder: Path) -> None:
    """It starts, runs a program, and is shut down by its own control command."""
    marker = folder / "marker"
    marker.unlink(missing_ok=True)
    configuration = folder / "supervisord.conf"
    configuration.write_text(
        f"""
[supervisord]
logfile={folder}/supervisord.log
pidfile={folder}/supervisord.pid
[unix_http_server]
file={folder}/socket
[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
[supervisorctl]
serverurl=unix://{folder}/socket
[program:stays]
command=/bin/sh -c "echo ran > {marker}; exec sleep 600"
autostart=false
autorestart=false
startsecs=0
"""
    )
    control = [python.parent / "supervisorctl", "-c", configuration]
    run(python.parent / "supervisord", "-c", configuration, cwd=folder)  # leaves a daemon behind
    try:
        run(*control, "start", "stays")  # one that ends could do so before supervisorctl looks
        deadline = time.monotonic() + 60
        while not (marker.exists() and marker.read_text() == "ran\n"):
            assert time.monotonic() < deadline, (folder / "supervisord.log").read_text()
            time.sleep(0.02)
    finally:
        run(*control, "shutdown", cwd=folder)
