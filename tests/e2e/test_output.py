"""What the user sees and what is kept, over attempts and deaths; and every way of torchrun to name a program."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from supervisor.model import AttemptEnded, FirstStep
from tests.e2e import harness
from tests.e2e.harness import Job, torchrun

CHATTY = str(harness.PROGRAMS / "chatty.py")


def expected(rank: int, attempt: int) -> list[str]:
    lines = []
    for n in range(200):
        lines += [f"out {n} of rank {rank} in two halves", f"err {n} of rank {rank}"]
    lines += [f"straight to the descriptor, rank {rank}", f"from a child of rank {rank}"]
    return lines + (["last words, no newline"] if attempt == 0 and rank == 1 else [])


def test_every_line_of_every_rank_is_shown_once_and_kept(job: Job) -> None:
    """And options of torchrun that everstep owns are said, once each."""
    launcher, *words = torchrun(script=CHATTY)
    assert job.run([launcher, "--standalone", "--max-restarts=3", *words]) == 0, job.output
    shown = job.output.splitlines()
    for option in ("--standalone", "--max-restarts"):
        assert sum(option in line for line in shown if line.startswith("everstep: ")) == 1, shown
    logs = job.folder / "attempts"
    for rank in (0, 1):
        mine = [line.removeprefix(f"[rank{rank}] ") for line in shown if line.startswith(f"[rank{rank}] ")]
        files = [logs / f"00000{attempt}" / "logs" / f"rank-{rank}.log" for attempt in (0, 1)]
        if rank == 0 and not files[0].exists():
            files[0].touch()  # rank 1's death was so quick that rank 0 had not begun
        kept = [file.read_text().splitlines() for file in files]
        assert mine == kept[0] + kept[1]
        assert kept[1] == expected(rank, 1)
        assert kept[0] == expected(rank, 0) or (rank == 0 and kept[0] == expected(0, 0)[: len(kept[0])])
    assert all(line.startswith(("[rank0] ", "[rank1] ", "[torchrun] ", "everstep: ")) for line in shown)


def test_quiet_prints_everstep_only(job: Job) -> None:
    assert job.run(torchrun(script=CHATTY), "--quiet") == 0, job.output
    assert all(line.startswith("everstep: ") for line in job.output.splitlines())
    log = job.folder / "attempts" / "000001" / "logs" / "rank-1.log"
    assert log.read_text().splitlines() == expected(1, 1)


def test_a_reader_that_leaves_does_not_end_the_run(job: Job, tmp_path: Path) -> None:
    """``everstep run … | head -1``."""
    argv = [*harness.RUN, "--dir", str(job.folder), *torchrun(script=CHATTY)]
    script = '"$@" 2>&1 | head -1; exit "${PIPESTATUS[0]}"'
    result = subprocess.run(
        ["bash", "-c", script, "bash", *argv], cwd=harness.ROOT, env=harness.environment(), timeout=harness.DEADLINE,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) == 1
    assert job.facts(AttemptEnded)[-1].finished


def test_a_terminal_shows_the_progress(job: Job, tmp_path: Path) -> None:
    master, slave = pty.openpty()
    argv = [
        *harness.RUN, "--dir", str(job.folder), "--snapshot-every", "5steps",
        *torchrun("--out", tmp_path / "out", "--pause", "0.1"),
    ]  # fmt: skip
    job.process = subprocess.Popen(
        argv, cwd=harness.ROOT, env=harness.environment(), stdin=slave, stdout=slave, stderr=slave,
        start_new_session=True,
    )  # fmt: skip
    os.close(slave)
    text, limit = b"", time.monotonic() + harness.DEADLINE
    while time.monotonic() < limit:
        try:
            text += os.read(master, 65536)
        except OSError:  # the terminal's other end is closed: the run is over
            break
    os.close(master)
    assert job.wait() == 0
    shown = text.decode()
    for part in ("/30", "loss ", "snapshot ", "attempt 0"):
        assert part in shown, shown


@pytest.mark.parametrize("form", ["module", "no-python", "plain python", "python module"])
def test_every_way_to_name_a_program(job: Job, tmp_path: Path, form: str) -> None:
    package = tmp_path / "somewhere" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "main.py").write_text(
        "import sys, torch\n"
        "print('hello from', __name__, __spec__.name if __spec__ else None, sys.argv[1:])\n"
        "model = torch.nn.Linear(2, 2)\noptimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "for _ in range(5):\n    model(torch.ones(2)).sum().backward(); optimizer.step()\n"
    )
    command = {
        "module": [str(harness.BIN / "torchrun"), "--nproc-per-node=1", "-m", "package.main", "a", "--b"],
        "no-python": [str(harness.BIN / "torchrun"), "--no-python", "sh", "-c", "echo hello from sh $RANK"],
        "plain python": [sys.executable, "package/main.py", "a", "--b"],
        "python module": [sys.executable, "-m", "package.main", "a", "--b"],
    }[form]
    argv = [*harness.RUN, "--dir", str(job.folder), *command]
    result = subprocess.run(
        argv, cwd=package.parent, env=harness.environment(), capture_output=True, text=True, check=False,
        timeout=harness.DEADLINE,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    expected = {
        "module": "[rank0] hello from __main__ package.main ['a', '--b']",
        "no-python": "[rank0] hello from sh 0",
        "plain python": "hello from __main__ None ['a', '--b']",
        "python module": "hello from __main__ package.main ['a', '--b']",
    }[form]
    assert expected in result.stdout.splitlines()
    if form != "no-python":  # steps are seen without a Session, through the optimizer
        assert job.facts(FirstStep)
        assert job.status()["step"] == 5
