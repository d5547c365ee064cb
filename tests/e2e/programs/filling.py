"""A job whose disk, a tmpfs of 64 MB, is filled by others while it runs. In a mount namespace of its own."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

from supervisor.checkpoint.catalog import list_checkpoints, verify
from supervisor.model import CheckpointCommitted, CheckpointFailed, Resumed, Tier
from tests.e2e import harness
from tests.e2e.conftest import STEPS
from tests.e2e.harness import torchrun

OPTIONS = ("--snapshot-every", "1step", "--checkpoint-every", "2steps", "--keep-last", "20")
FILES = ("--ballast", 2 << 20)


def good(checkpoints: Path) -> list[int]:
    """The steps of all checkpoints: they are whole."""
    records = list_checkpoints(checkpoints)
    assert not [problem for record in records for problem in verify(record)]
    return [record.step for record in records]


def fill(path: Path) -> None:
    """To the last byte."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))


def main(root: Path) -> None:
    disk = root / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], check=True)
    out, others = root / "out", disk / "others"
    with harness.job(disk / "job") as job:
        job.output_path.symlink_to(root / "output")
        job.start(torchrun("--out", out, *FILES, "--pause", "0.05"), *OPTIONS)
        job.until_fact(CheckpointCommitted)
        fill(others)
        assert job.wait() in (1, 75), job.output
        assert out.exists(), "the training came to its end"
        before = good(job.folder / "checkpoints")
        assert before
        assert STEPS not in before
        assert "No space left on device" in job.output
        others.unlink()
        assert job.run(torchrun("--out", root / "again", *FILES), *OPTIONS) == 0, job.output
        assert job.facts(Resumed)[-1].tier is Tier.RAM
        assert job.facts(Resumed)[-1].step == STEPS
        assert good(job.folder / "checkpoints")[0] == STEPS
        assert set(before) <= set(good(job.folder / "checkpoints"))
        assert job.facts(CheckpointFailed)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
