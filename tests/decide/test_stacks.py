"""What faulthandler really writes is understood."""

from __future__ import annotations

import subprocess
import sys

import pytest

from supervisor.decide import stacks

PROGRAM = """
import faulthandler, signal, sys, threading, os
def outer(): inner()
def inner():
    faulthandler.register(signal.SIGUSR1, file=1, all_threads=True)
    os.kill(os.getpid(), signal.SIGUSR1)
started = threading.Event()
def other():
    started.set()
    threading.Event().wait()
threading.Thread(target=other, daemon=True).start()
started.wait()
outer()
os._exit(0)
"""


@pytest.fixture(scope="module")
def text() -> str:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=60
    ).stdout


def test_the_main_thread_is_the_one_that_took_the_signal(text: str) -> None:
    assert [frame.name for frame in stacks.main_thread(text)] == ["inner", "outer", "<module>"]
    assert len(stacks.threads(text)) == 2


def test_shortened(text: str) -> None:
    lines = stacks.shortened(text)
    assert lines[0] == "main thread:"
    assert lines[1].endswith("(inner)")
    assert "another thread:" in lines
    deep = text.replace('  File "<string>", line 3 in outer\n', '  File "a.py", line 1 in f\n' * 100)
    assert len([line for line in stacks.shortened(deep) if "a.py:1" in line]) < 30
    assert any("more" in line for line in stacks.shortened(deep))


def test_nothing_is_no_place() -> None:
    assert stacks.main_thread("") == []
    assert stacks.place([]) is None
    assert not stacks.is_wait([])
    assert stacks.shortened("") == []


@pytest.mark.parametrize(
    ("file", "name", "waits"),
    [
        ("/v/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py", "all_reduce", True),
        ("/v/lib/python3.11/site-packages/torch/autograd/graph.py", "_engine_run_backward", True),
        ("/v/lib/python3.11/site-packages/torch/autograd/graph.py", "other", False),
        ("/home/u/train.py", "main", False),
    ],
)
def test_places_where_ranks_wait(file: str, name: str, waits: bool) -> None:
    assert stacks.is_wait([stacks.Frame(file, "1", name)]) is waits
