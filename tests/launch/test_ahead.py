"""A script that runs ahead stops in front of the first thing that would be noticed outside, and does it afterwards."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from supervisor.edge import marks
from supervisor.edge.link import STANDBY
from tests.launch.listener import CLOSED, Listener, wait

PYTHON = sys.executable
ROOT = Path(__file__).parents[2]


@pytest.fixture
def listener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with Listener(tmp_path) as one:
        one.welcome = {"ahead": True}
        yield one


def start(listener: Listener, text: str, *arguments: str) -> int:
    Path("script.py").write_text(textwrap.dedent(text))
    return listener.start([PYTHON, "script.py", *arguments], **{STANDBY: "1"})


def marks_of(gate: dict[str, Any]) -> set[str]:
    """The files that were read or looked for, those below the project's directory."""
    here = str(Path.cwd())
    return {name[len(here) + 1 :] for name in gate["read"] if name.startswith(here + os.sep)}


#: what a script does, and where the gate stands
ACTS = {
    "write": ("open('done', 'w')", "writing to "),
    "append": ("import os; os.close(os.open('done', os.O_WRONLY | os.O_CREAT | os.O_APPEND))", "writing to "),
    "pathlib": ("import pathlib; pathlib.Path('done').write_text('x')", "writing to "),
    "mkdir": ("import os; os.makedirs('done')", "os.mkdir of done"),
    "rename": ("import os; os.rename('there', 'done')", "os.rename of there"),
    "symlink": ("import os; os.symlink('there', 'done')", "os.symlink of there"),
    "list": ("import os; assert os.listdir() == ['script.py', 'there'] or True; open('done', 'w')", "os.listdir of "),
    "glob": ("import glob; glob.glob('*'); open('done', 'w')", "glob.glob of *"),
    "program": ("import subprocess; subprocess.run(['touch', 'done'], check=True)", "subprocess.Popen"),
    "shell": ("import os; os.system('touch done')", "os.system"),
    "fork": ("import os\nif os.fork() == 0: os._exit(0)\nos.wait(); open('done', 'w')", "os.fork"),
    "connect": ("import socket\nwith socket.socket() as s: s.connect_ex(('127.0.0.1', 9))\nopen('done', 'w')", "socket.connect"),
    "serve": ("import socket\nwith socket.socket() as s: s.bind(('127.0.0.1', 0))\nopen('done', 'w')", "socket.bind"),
    "lock": ("import fcntl\nwith open('there') as f: fcntl.flock(f, fcntl.LOCK_EX)\nopen('done', 'w')", "fcntl.flock"),
    "database": ("import sqlite3; sqlite3.connect('done').execute('create table t (x)')", "sqlite3.connect"),
    "temporary": ("import tempfile; tempfile.mkdtemp(); open('done', 'w')", ""),
    "session": ("from supervisor.edge.link import current; current(); open('done', 'w')", "a Session"),
    "job": ("import os; os.path.exists(os.environ['EVERSTEP_DIR'] + '/best'); open('done', 'w')", "reading "),
    "thread": ("import threading; t = threading.Thread(target=open, args=('done', 'w')); t.start(); t.join()", "writing to "),
    "while imported": ("import own_module", "writing to "),
}  # fmt: skip


@pytest.mark.parametrize("case", ACTS)
def test_it_stops_in_front_of_the_outside(listener: Listener, case: str) -> None:
    text, where = ACTS[case]
    Path("there").touch()
    Path("own_module.py").write_text("open('done', 'w')")
    pid = start(listener, text)
    gate = listener.expect("gate")
    assert gate["where"].startswith(where)
    assert not os.path.lexists("done")
    assert "script.py" in marks_of(gate)
    listener.gate.set()
    assert wait(pid) == 0, listener.log()
    assert os.path.lexists("done")
    listener.expect(CLOSED)
    assert [message["kind"] for message in listener.seen] == ["hello", "gate", "exiting", CLOSED]


def test_what_it_reads_and_looks_for_is_written_down(listener: Listener) -> None:
    """Its own modules by their source, though compiled before; and what it learns is what it learns without us."""
    Path("own_module.py").write_text(
        "import os.path\nfound = os.path.exists('checkpoint'), os.path.isdir('.')\n"
    )
    Path("config").write_text("rate: 3")
    text = """
        import importlib.metadata, json, os, pathlib, sys, tempfile
        importlib.metadata.version("everstep"), tempfile.gettempdir()
        import own_module
        print(own_module.found, open("config").read(), pathlib.Path("best").exists(), len(sys.argv))
        import os; os.environ["X"] = "1"
        open("done", "w")
        print(os.stat in os.supports_dir_fd, os.path.exists("done"))
    """
    pid = start(listener, text, "argument")
    gate = listener.expect("gate")
    read = marks_of(gate)
    assert {"script.py", "own_module.py", "config", "checkpoint", "best"} <= read
    assert gate["read"][str(Path.cwd() / "checkpoint")] is None
    assert not [name for name in gate["read"] if "json" in name], "installed modules do not change"
    assert marks.changed(gate["read"]) == []
    listener.gate.set()
    assert wait(pid) == 0
    assert listener.log() == "(False, True) rate: 3 False 2\nTrue True\n"

    for name, change in (("config", "rate: 4"), ("checkpoint", "new"), ("own_module.py", "found = 1")):
        before = Path(name).read_text() if Path(name).exists() else None
        Path(name).write_text(change)
        assert str(Path.cwd() / name) in marks.changed(gate["read"])
        assert before != change


def test_what_has_changed_before_is_not_read_ahead(listener: Listener) -> None:
    Path("latest").write_text("100")
    listener.welcome["hold"] = [str(Path("latest").absolute())]
    pid = start(listener, "print(open('latest').read())")
    assert listener.expect("gate")["where"] == f"reading {Path('latest').absolute()}"
    Path("latest").write_text("200")
    listener.gate.set()
    assert wait(pid) == 0
    assert listener.log() == "200\n"


@pytest.mark.parametrize("end", ["raise ValueError('too early')", "import sys; sys.exit(3)", "pass"])
def test_who_ends_before_the_gate_ends_there(listener: Listener, end: str) -> None:
    """And says why; no exit handler runs for an attempt that never was."""
    pid = start(listener, f"import atexit\natexit.register(print, 'handler')\n{end}")
    assert wait(pid) == -signal.SIGKILL
    listener.expect(CLOSED)
    assert "gate" not in [message["kind"] for message in listener.seen]
    assert ("too early" in listener.log()) == ("raise" in end)
    assert "handler" not in listener.log()


def test_a_standby_that_is_not_needed_leaves_no_trace(listener: Listener) -> None:
    pid = start(listener, "import atexit\natexit.register(open, 'done', 'w')\nopen('out', 'w')")
    listener.expect("gate")
    os.kill(pid, signal.SIGKILL)
    wait(pid)
    assert not {"done", "out"} & set(os.listdir())


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (
            "init_process_group('gloo', init_method='tcp://127.0.0.1:0', rank=0, world_size=1)",
            "init_process_group",
        ),
        (
            "w = torch.nn.Parameter(torch.ones(1)); torch.optim.SGD([w], 0.1).step()",
            "the first optimizer step",
        ),
        ("torch.cuda._lazy_init()", "the first use of cuda"),
    ],
)
def test_torch(listener: Listener, text: str, where: str) -> None:
    """Its doors to the outside, under whatever name a script holds them; and it has them back afterwards."""
    listener.welcome["preimport"] = {"names": ["torch", "torch._dynamo"]}
    wrapped = f"""
        import contextlib, torch
        from torch.distributed import init_process_group
        with contextlib.suppress(RuntimeError, AssertionError):  # without a GPU
            {text}
        print(torch.distributed.init_process_group is torch.distributed.distributed_c10d.init_process_group,
              hasattr(torch.cuda._lazy_init, "__wrapped__"))
    """
    pid = start(listener, wrapped)
    assert listener.expect("gate")["where"] == where
    listener.gate.set()
    assert wait(pid) == 0, listener.log()
    assert listener.log() == "True False\n"
