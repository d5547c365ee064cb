"""Every command that the README and the documentation show is one that works.

Commands that look at a job are run on a real one, in a directory where their job names lead to it. Those that start, stop or change
something are read as ``everstep`` would read them: every word known, every option valid, the program named in a way that it takes.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import program
from launch.cli import call, read
from supervisor import config
from supervisor.config import READERS
from tests.e2e.harness import BIN, ROOT, Job

pytestmark = pytest.mark.xdist_group("docs")  # its job is made once

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").glob("*.md")),
]
#: what only looks, and so can be run
LOOKS = {"status", "checkpoints", "simulate", "report"}
STEPS = (50, 100, 150)


def shown() -> Iterator[tuple[str, str]]:
    """Where, and the command line, of every command in a block of code that is no synopsis."""
    for page in PAGES:
        fenced = False
        for number, line in enumerate(page.read_text().splitlines(), 1):
            fenced ^= line.strip().startswith("```")
            text = re.sub(r"\s+#.*", "", line.strip().removeprefix("$ "))
            in_code = fenced or line.startswith("    ")
            if in_code and text.startswith("everstep ") and not re.search(r"[\[\]|\\]|\s{3,}", text):
                yield f"{page.name}:{number}", text


COMMANDS = list(shown())


def words_of(text: str) -> list[str]:
    """An ellipsis stands for the program and its arguments."""
    if re.search(r"(torchrun|python) …", text):
        text = text.replace("…", "train.py")
    text = text.replace(" …", " torchrun train.py")
    return shlex.split(text)[1:]


def test_there_are_commands_in_every_important_page() -> None:
    pages = {where.split(":")[0] for where, _ in COMMANDS}
    assert {"README.md", "quickstart.md", "checkpoints.md", "rehearse.md", "simulate.md"} <= pages
    assert len(COMMANDS) > 20


@pytest.mark.parametrize(("where", "text"), COMMANDS, ids=[where for where, _ in COMMANDS])
def test_every_word_is_known(where: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("train.py", "examples/gpt_ddp.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for script in re.findall(r"\S+\.py\b", text):
        (tmp_path / script).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / script).touch()
    monkeypatch.setenv("PATH", str(BIN), prepend=os.pathsep)
    given = read(words_of(text))
    if given["command"] == "run":
        config.load({name: value for name, value in given.items() if name in READERS})
        program.parse(given["words"])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where there is a finished job, under every name that the pages give it."""
    root = tmp_path_factory.mktemp("docs")
    job = Job(root / "everstep-runs" / "train")
    save = ("--snapshot-every", "50steps", "--checkpoint-every", "50steps")
    script = str(ROOT / "examples" / "gpt_ddp.py")
    command = [sys.executable, script, "--steps", str(STEPS[-1]), "--batch-size", "1"]
    assert job.run(command, *save) == 0, job.output
    for _, text in COMMANDS:
        for name in re.findall(r"--dir ([^/\s]\S*)", text):
            link = root / name
            if not link.exists():
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(job.folder)
    return root


@pytest.mark.parametrize(
    ("where", "text"), [(where, text) for where, text in COMMANDS if text.split()[1] in LOOKS],
    ids=[where for where, text in COMMANDS if text.split()[1] in LOOKS],
)  # fmt: skip
def test_what_looks_at_a_job_does(
    where: str,
    text: str,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(directory)
    words = [str(STEPS[1]) if word.isdigit() and int(word) not in STEPS else word for word in words_of(text)]
    quick = ["--runs", "1"] if words[0] == "simulate" else []
    assert call([*words, *quick]) == 0, capsys.readouterr().err
