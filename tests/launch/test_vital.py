"""Signs of life of real workers, and the stacks that they write on request."""

from __future__ import annotations

import asyncio
import signal
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.vital import SIGNAL
from supervisor.decide import stacks
from supervisor.edge import stacks as asking
from supervisor.edge.control import ControlPage, Word
from supervisor.edge.link import stacks_path
from tests.launch.listener import DEADLINE, Listener, wait

ROOT = Path(__file__).parents[2]
READY = "from supervisor.edge.link import current; current().tell('ready')\n"
TORCH = "import torch\n"


@pytest.fixture
def listener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with Listener(tmp_path) as one:
        yield one


def start(listener: Listener, *parts: str) -> int:
    Path("script.py").write_text("".join(map(textwrap.dedent, parts)))
    pid = listener.start([sys.executable, "script.py"])
    listener.expect("ready")
    return pid


def changes(page: ControlPage, word: Word, count: int) -> None:
    """Wait until a word has changed so often."""
    limit = time.monotonic() + DEADLINE
    for _ in range(count):
        before = page[word]
        while page[word] == before:
            assert time.monotonic() < limit, f"{word.name} does not change"
            time.sleep(0.01)


def stands_still(page: ControlPage, word: Word) -> None:
    """Wait until a word has been the same for two seconds."""
    limit, since, before = time.monotonic() + DEADLINE, time.monotonic(), page[word]
    while time.monotonic() - since < 2:
        assert time.monotonic() < limit, f"{word.name} goes on changing"
        if page[word] != before:
            since, before = time.monotonic(), page[word]
        time.sleep(0.01)


def ask(listener: Listener, pid: int, number: int) -> str:
    asked = asking.Asked(0, pid, number, stacks_path(listener.runtime, listener.attempt, 0))
    return asyncio.run(asking.collect([asked], 10.0)).get(0, "")


def test_a_sleeping_main_thread_beats_and_does_not_move(listener: Listener) -> None:
    start(listener, TORCH, READY, "import time; time.sleep(600)")
    page = listener.page()
    changes(page, Word.BEAT_NS, 4)
    moved = page[Word.MOVED_NS]
    changes(page, Word.BEAT_NS, 4)
    assert page[Word.MOVED_NS] == moved


@pytest.mark.parametrize(
    "body",
    [
        "while True: pass",
        "while True: sum(x for x in range(1000))",
        "while True: f()",
        "a = torch.ones(900, 900)\nwhile True: a @ a",
    ],
    ids=["loop", "generator", "calls", "kernels"],
)
def test_a_main_thread_at_work_moves(listener: Listener, body: str) -> None:
    start(listener, TORCH, READY, "def f(): return len([1])\n", body)
    changes(listener.page(), Word.MOVED_NS, 4)


HOLD = """
import ctypes
library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
library.pthread_mutex_lock(mutex)
library.pthread_mutex_lock(mutex)
"""


def test_without_the_lock_there_is_no_beat_but_there_are_stacks(listener: Listener) -> None:
    pid = start(listener, TORCH, READY, HOLD)
    page = listener.page()
    stands_still(page, Word.BEAT_NS)
    text = ask(listener, pid, SIGNAL)
    assert [frame.name for frame in stacks.main_thread(text)][:1] == ["<module>"]
    beat = page[Word.BEAT_NS]
    assert ask(listener, pid, SIGNAL)
    assert page[Word.BEAT_NS] == beat


def test_without_torch_there_is_no_thread_and_there_are_stacks(listener: Listener) -> None:
    pid = start(listener, f"import time\ndef f():\n    {READY}\n    time.sleep(600)\nf()")
    page = listener.page()
    assert page[Word.BEAT_NS] == 0
    text = ask(listener, pid, page[Word.STACKS])
    names = [frame.name for frame in stacks.main_thread(text)]  # it may still be in tell()
    assert names[names.index("f") + 1] == "<module>"
    assert len(stacks.threads(text)) == 1


def test_a_forked_child_that_imports_torch_is_not_the_worker(listener: Listener) -> None:
    step = (
        "p = torch.nn.Parameter(torch.ones(1)); p.grad = torch.ones(1); torch.optim.SGD([p], lr=1.0).step()"
    )
    child = f"import os\nif os.fork() == 0:\n    import torch\n    {step}\n    os._exit(0)\n"
    pid = start(listener, child, "print(os.waitstatus_to_exitcode(os.wait()[1]))\n", READY)
    assert wait(pid) == 0
    assert listener.log() == "0\n"
    page = listener.page()
    assert (page[Word.BEAT_NS], page[Word.STEP]) == (0, 0)


def test_a_handler_of_the_scripts_own_stays(listener: Listener) -> None:
    handler = f"import signal, time\nsignal.signal({SIGNAL}, lambda *_: print('mine'))\n"
    start(listener, TORCH, handler, READY, "time.sleep(600)")
    page = listener.page()
    changes(page, Word.BEAT_NS, 2)
    assert page[Word.STACKS] == 0


def test_who_has_no_handler_is_not_signalled(listener: Listener) -> None:
    pid = start(listener, READY, "import signal, os\nos.execv('/bin/sleep', ['sleep', '600'])")
    limit = time.monotonic() + DEADLINE
    while "sleep" not in Path(f"/proc/{pid}/comm").read_text():
        assert time.monotonic() < limit
    assert ask(listener, pid, SIGNAL) == ""
    assert Path(f"/proc/{pid}").exists()


def test_a_crash_writes_the_stacks(listener: Listener) -> None:
    pid = start(listener, READY, "import os\ndef f(): os.kill(os.getpid(), 11)\nf()")
    assert wait(pid) == -signal.SIGSEGV
    text = stacks_path(listener.runtime, listener.attempt, 0).read_text()
    assert [frame.name for frame in stacks.main_thread(text)][:2] == ["f", "<module>"]
    assert "Segmentation" not in listener.log()


def test_the_scripts_own_faulthandler_stays(listener: Listener) -> None:
    pid = start(
        listener,
        "import faulthandler; faulthandler.enable()\n",
        READY,
        "import os\nos.kill(os.getpid(), 11)\n",
    )
    assert wait(pid) == -signal.SIGSEGV
    assert "Segmentation fault" in listener.log()


def test_many_signals_at_once(listener: Listener) -> None:
    """They are handled on one stack, which has room for all of them."""
    text = "import os, signal\nfor n in (10, 12): signal.signal(n, lambda *_: None)\n"
    again = f"for n in (10, 12, 10, 12, {int(SIGNAL)}): os.kill(os.getpid(), n)"
    burst = f"for _ in range(300):\n    {again}\n"
    pid = start(listener, text, READY, burst, "import gc; gc.collect()\nprint('well')\n")
    assert wait(pid) == 0
    assert listener.log() == "well\n"
