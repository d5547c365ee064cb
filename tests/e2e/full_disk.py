"""Rehearses a full disk on a real job whose checkpoints go to a tmpfs. Run by ``test_rehearse.py`` in a mount namespace.

``full_disk.py DIRECTORY``: mounts over ``DIRECTORY/disk``, so that nobody else sees it and it goes with the process.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from supervisor.edge import ballast
from supervisor.edge.files import free_bytes
from supervisor.model import AttemptEnded, CheckpointCommitted, CheckpointFailed
from tests.e2e import harness
from tests.e2e.test_rehearse import reported

FILL = """
import sys
from pathlib import Path
from supervisor.edge import ballast
with ballast.filled(Path(sys.argv[1]), 4096):
    print("full", flush=True)
    sys.stdin.read()
"""


def main(root: Path) -> None:
    disk = root / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], check=True)
    assert ballast.used_by_others(disk) == []
    assert ballast.used_by_others(Path("/")) != []
    assert ballast.would_take_memory(disk, 1 << 50)
    a_killed_rehearsal_gives_the_space_back(disk)
    with harness.job(root / "job") as job:
        command = harness.torchrun(
            "--out", root / "out", "--steps", 1_000_000, "--pause", "0.01", "--ballast", 4 << 20
        )
        options = ("--standby", "off", "--checkpoints", disk / "c", "--snapshot-every", "20steps")
        job.start(command, *options, "--checkpoint-every", "20steps", "--keep-last", 1)
        job.until_fact(CheckpointCommitted)
        before = free_bytes(disk)
        report = reported(job, "full-disk")
        assert report["recovered"], report
        assert "No space left" in report["reason"]
        assert report["detection"] > 0
        assert report["total"] > 0
        assert job.facts(CheckpointFailed) != []
        assert job.facts(AttemptEnded) == []
        assert free_bytes(disk) > before - (40 << 20)


def a_killed_rehearsal_gives_the_space_back(disk: Path) -> None:
    before = free_bytes(disk)
    with subprocess.Popen(
        [sys.executable, "-c", FILL, str(disk)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "full\n"
        assert free_bytes(disk) <= 2 * 4096
        process.kill()
    deadline = time.monotonic() + 10
    while free_bytes(disk) != before:
        assert time.monotonic() < deadline


if __name__ == "__main__":
    main(Path(sys.argv[1]))
