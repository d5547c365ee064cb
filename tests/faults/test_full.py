"""A real file system that is full, wherever that happens."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.faults.moments import ROOT


def test_a_tmpfs_that_is_full_at_any_page(tmp_path: Path) -> None:
    namespace = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    command = [*namespace, sys.executable, "-W", "ignore", "-m", "tests.faults.full", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    _, failed, fine = map(int, run.stdout.split())
    assert failed > 10
    assert fine == 3
