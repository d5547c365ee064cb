"""The boot in real workers, against a socket that speaks the supervisor's part: what it reports, what it survives."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from supervisor.edge.control import Phase, SessionFlag, Word
from tests.launch.listener import CLOSED, Listener, wait

PYTHON = sys.executable
TORCHRUN = str(Path(sys.executable).with_name("torchrun"))
ROOT = Path(__file__).parents[2]
ALL = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGUSR2, signal.SIGINT)
#: what a script writes to say that it has come this far
UNTIL_GO = "import os\nwhile not os.path.exists('go'): os.sched_yield()\n"
READY = "from supervisor.edge.link import current; current().tell('ready')\n"


@pytest.fixture
def listener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with Listener(tmp_path) as one:
        yield one


def script(text: str, name: str = "script.py") -> str:
    Path(name).write_text(textwrap.dedent(text))
    return name


def plain(*command: str) -> tuple[int, str]:
    """Exit code and output without us."""
    done = subprocess.run(
        [PYTHON, "-u", *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


# --------------------------------------------------------------------------- how it ends


ENDS = {
    "normal": ("print('done')", 0, None),
    "exit 3": ("import sys; sys.exit(3)", 3, None),
    "exit None": ("import sys; sys.exit()", 0, None),
    "exit text": ("import sys; sys.exit('no data')", 1, "SystemExit"),
    "raise": ("def f():\n    raise ValueError('x' * 3)\nf()", 1, "ValueError"),
    "chained": ("try:\n    1 / 0\nexcept Exception as e:\n    raise KeyError('k') from e", 1, "KeyError"),
    "syntax": ("x = (\n", 1, "SyntaxError"),
    "import": ("import no_such_module", 1, "ModuleNotFoundError"),
    "interrupt": ("raise KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt"),
    "hook": ("import sys\nsys.excepthook = lambda *a: print('hook', a[0], a[2].tb_frame.f_code.co_name)\nint('x')", 1,
             "ValueError"),
    "exit handler": ("import atexit\natexit.register(print, 'bye')\nraise OSError(28, 'full')", 1, "OSError"),
    "own class": ("class E(RuntimeError):\n    def __str__(self): raise OSError\nraise E", 1, "__main__.E"),
    "group": ("raise ExceptionGroup('g', [ValueError(1)])", 1, "ExceptionGroup"),
}  # fmt: skip


@pytest.mark.parametrize("case", ENDS)
def test_it_ends_as_without_us_and_says_why(listener: Listener, case: str) -> None:
    text, code, kind = ENDS[case]
    name = script(text)
    pid = listener.start([PYTHON, name])
    assert wait(pid) == code
    listener.expect(CLOSED)
    assert (code, listener.log()) == plain(name)
    raised = [message for message in listener.seen if message["kind"] == "raised"]
    assert [message["type"] for message in raised] == ([kind] if kind else [])
    assert [message["code"] for message in listener.seen if message["kind"] == "exiting"] == [
        130 if code < 0 else code
    ]
    for message in raised:
        assert "launch/" not in message["traceback"]
        assert message["bases"][0] == kind
        assert message["bases"][-1] == "BaseException"
        assert message["step"] is None


#: the interpreter never gets past this when it takes the script's module apart
NEVER_GONE = """
    import signal
    class Stuck:
        def __del__(self): signal.pause()
    stuck = Stuck()
"""


def test_what_a_failing_script_has_written_is_there_before_its_interpreter_is_taken_apart(
    listener: Listener,
) -> None:
    """Its handler and its hook have run, threads too; buffers are written and files with an end of their own are closed."""
    name = script(
        NEVER_GONE
        + """
    import atexit, gzip, sys, threading, time
    def said(*words): print(*words, end="")
    plain, packed, binary = open("plain", "w"), gzip.open("packed", "wt"), open("binary", "wb")
    plain.write("plain"), packed.write("packed"), binary.write(b"binary")
    atexit.register(said, "handler")
    sys.excepthook = lambda *a: said("hook ")
    threading.Thread(target=lambda: (time.sleep(0.1), said("thread "))).start()
    raise ValueError
    """
    )
    pid = listener.start([PYTHON, name])
    listener.expect("left")
    assert [message["kind"] for message in listener.seen] == ["hello", "raised", "exiting", "left"]
    assert listener.log() == "hook thread handler"
    assert Path("plain").read_text() == "plain"
    assert Path("binary").read_text() == "binary"
    assert gzip.decompress(Path("packed").read_bytes()) == b"packed"
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(("text", "told"), [("raise SystemExit(3)", True), ("raise SystemExit(0)", False)])
def test_only_who_fails_is_not_waited_for(listener: Listener, text: str, told: bool) -> None:
    wait(listener.start([PYTHON, script(text)]))
    listener.expect(CLOSED)
    assert [message["kind"] for message in listener.seen].count("left") == told


def test_exit_handlers_from_before_the_script_are_waited_for(listener: Listener) -> None:
    """They come after ours, so we cannot say that all have run."""
    script("import atexit\natexit.register(print, 'site')", "sitecustomize.py")
    path = f"{Path.cwd()}{os.pathsep}{ROOT}"
    assert wait(listener.start([PYTHON, script("raise ValueError")], PYTHONPATH=path)) == 1
    listener.expect(CLOSED)
    assert [message["kind"] for message in listener.seen] == ["hello", "raised", "exiting", CLOSED]
    assert listener.log().endswith("site\n")


def test_a_fork_that_comes_to_its_end_says_nothing(listener: Listener) -> None:
    name = script("import os, sys\nif os.fork() == 0: raise ValueError\nos.wait()")
    assert wait(listener.start([PYTHON, name])) == 0
    listener.expect(CLOSED)
    assert [message["kind"] for message in listener.seen] == ["hello", "exiting", CLOSED]
    assert "ValueError" in listener.log()


def test_a_hook_that_fails_is_told_by_the_interpreter(listener: Listener) -> None:
    assert wait(listener.start([PYTHON, script("import sys\nsys.excepthook = 3\nint('x')")])) == 1
    assert listener.log().startswith("Error in sys.excepthook:")
    assert listener.log().endswith("ValueError: invalid literal for int() with base 10: 'x'\n")


def test_a_module_ends_as_without_us(listener: Listener) -> None:
    script("def f(): raise ValueError('x')\nf()", "mod.py")
    pid = listener.start([PYTHON, "-m", "mod"])
    assert wait(pid) == 1
    assert listener.log() == plain("-m", "mod")[1]
    assert listener.expect("raised")["message"] == "x"


def test_a_missing_module(listener: Listener) -> None:
    pid = listener.start([PYTHON, "-m", "no_such_module"])
    assert wait(pid) == 1
    assert listener.log() == plain("-m", "no_such_module")[1]


# --------------------------------------------------------------------------- the link


def test_hello_and_the_page(listener: Listener) -> None:
    name = script(READY + "import signal; signal.pause()")
    pid = listener.start([PYTHON, name])
    hello = listener.expect("hello")
    assert hello == {
        "kind": "hello", "rank": 0, "local_rank": 0, "world_size": 1, "local_world_size": 1, "attempt": 7, "standby": 0, "pid": pid, "from": 0,
        "ask": True,
    }  # fmt: skip
    listener.expect("ready")
    page = listener.page()
    assert (page[Word.PID], page[Word.PHASE], page[Word.STEP]) == (pid, Phase.SETUP, 0)
    assert page[Word.HEARTBEAT_NS] > 0
    os.kill(pid, signal.SIGKILL)
    wait(pid)
    assert [message["kind"] for message in listener.seen] == ["hello", "ready"]  # one link, not two


def test_without_a_supervisor_it_does_not_start(listener: Listener) -> None:
    name = script("print('started')")
    listener.__exit__(None, None, None)
    (listener.runtime / "socket").unlink()
    assert wait(listener.start([PYTHON, name])) == 1
    assert listener.log().startswith("everstep: no supervisor for this worker")


def test_output_written_before_sigkill_is_there(listener: Listener) -> None:
    name = script("import sys\nprint('a', end='', flush=False)\nprint('b', end='', file=sys.stderr)\n" + READY
                  + "import time; time.sleep(600)")  # fmt: skip
    pid = listener.start([PYTHON, name])
    listener.expect("ready")
    os.kill(pid, signal.SIGKILL)
    wait(pid)
    assert listener.log() == "ab"


def test_the_users_own_module_named_supervisor_is_found(listener: Listener) -> None:
    script("own = 'mine'", "supervisor.py")
    script("own = 'mine too'", "launch.py")
    name = script("import supervisor, launch, sys; print(supervisor.own, launch.own, len(sys.modules) > 9)")
    assert wait(listener.start([PYTHON, name], PYTHONPATH="")) == 0
    assert listener.log() == "mine mine too True\n"


def test_our_package_is_handed_back_whole(listener: Listener) -> None:
    name = script("""
        import supervisor.edge.control, supervisor.edge, supervisor.model, pickle, inspect
        from supervisor.edge import link
        from supervisor.edge.control import Phase
        assert link.current().page is not None and supervisor.edge.link is link
        assert pickle.loads(pickle.dumps(Phase.STEP)) is Phase.STEP
        assert inspect.getsource(link).startswith('\"\"\"A worker')
        assert link.__spec__.loader.__class__.__name__ == 'SourceFileLoader', link.__spec__
    """)
    assert wait(listener.start([PYTHON, name])) == 0, listener.log()
    listener.expect(CLOSED)
    assert [message["kind"] for message in listener.seen] == ["hello", "exiting", CLOSED]


# --------------------------------------------------------------------------- signals


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGUSR2, signal.SIGINT]
)
def test_without_a_session_a_signal_does_what_it_did(listener: Listener, number: signal.Signals) -> None:
    pid = listener.start([PYTHON, script(READY + "import time; time.sleep(600)")])
    listener.expect("ready")
    os.kill(pid, number)
    assert wait(pid) == -number
    assert ("KeyboardInterrupt" in listener.log()) == (number == signal.SIGINT)


def test_with_a_session_open_signals_are_for_the_supervisor(listener: Listener) -> None:
    pid = listener.start([PYTHON, script(READY + UNTIL_GO + "print('went on')")])
    listener.expect("ready")
    listener.page()[Word.SESSION] = SessionFlag.OPEN
    for number in ALL:
        os.kill(pid, number)
    Path("go").touch()
    assert wait(pid) == 0
    assert listener.log() == "went on\n"


def test_after_its_session_a_signal_kills_again(listener: Listener) -> None:
    pid = listener.start([PYTHON, script(READY + UNTIL_GO)])
    listener.expect("ready")
    listener.page()[Word.SESSION] = SessionFlag.OPEN | SessionFlag.CLOSED
    os.kill(pid, signal.SIGTERM)
    assert wait(pid) == -signal.SIGTERM


def test_the_scripts_own_handler_wins(listener: Listener) -> None:
    text = (
        "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\n"
        + READY
        + "signal.pause()"
    )
    pid = listener.start([PYTHON, script(text)])
    listener.expect("ready")
    os.kill(pid, signal.SIGTERM)
    assert wait(pid) == 5


def test_forked_and_started_children_die_of_sigterm(listener: Listener) -> None:
    name = script("""
        import multiprocessing, subprocess, time
        from supervisor.edge.link import current
        from supervisor.edge.control import Word
        current().page[Word.SESSION] = 1
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
        child.start()
        child.terminate()
        child.join(30)
        other = subprocess.Popen(["sleep", "600"])
        other.terminate()
        print(child.exitcode, other.wait(30), current() is not None)
    """)
    assert wait(listener.start([PYTHON, name])) == 0
    assert listener.log() == "-15 -15 True\n"


STRANGER = """
    import multiprocessing, os, signal, subprocess, sys, time
    from supervisor.edge.link import current
    from supervisor.edge.control import Word
    NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGUSR2, signal.SIGINT)

    def stranger(pid, numbers=NUMBERS):
        words = [str(int(number)) for number in numbers]
        code = "import os, sys; [os.kill(int(sys.argv[1]), int(number)) for number in sys.argv[2:]]"
        subprocess.run([sys.executable, "-c", code, str(pid), *words], check=True)
        # until they were taken: the kernel keeps one of a kind, so that the parent's would be lost on a stranger's
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                lines = open(f"/proc/{pid}/status").readlines()
            except (FileNotFoundError, ProcessLookupError):  # it was the end of it
                return
            if not any(int(line.split()[1], 16) for line in lines if line.startswith("ShdPnd")):
                return
        print("not taken")

    def work(pipe):
        for word in iter(pipe.recv, "end"):
            if word == "subprocess":
                other = subprocess.Popen(["sleep", "600"])
                other.terminate()
                word = other.wait(30)
            elif word == "mask":
                word = subprocess.check_output(["grep", "SigBlk", "/proc/self/status"], text=True).split()[1]
            elif word == "handle":
                signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
            elif word == "torch":
                import torch
                torch.utils.data._utils.signal_handling._set_worker_signal_handlers()
            pipe.send(word)

    def child(method, *words):
        context = multiprocessing.get_context(method)
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs,))
        process.start()
        return process, lambda word: (ours.send(word), ours.recv())[1]
"""


def stranger(text: str) -> str:
    main = textwrap.indent(textwrap.dedent(text), "    ")
    return script(textwrap.dedent(STRANGER) + "\nif __name__ == '__main__':" + main)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_outlive_a_signal_to_the_whole_tree_but_not_their_parents(
    listener: Listener, method: str
) -> None:
    name = stranger(f"""
        page = current().page
        page[Word.SESSION] = 1
        process, ask = child({method!r})
        stranger(process.pid)
        print(ask("there"), ask("subprocess"), int(ask("mask"), 16))
        process.terminate()
        process.join(30)
        print(process.exitcode)
        process, ask = child({method!r})
        page[Word.SESSION] = 3
        ask("there")
        stranger(process.pid, [signal.SIGUSR1])
        process.join(30)
        print(process.exitcode + signal.SIGUSR1)
    """)
    assert wait(listener.start([PYTHON, name])) == 0, listener.log()
    assert listener.log() == "there -15 0\n-15\n0\n"


def test_a_childs_own_handlers_meet_its_parents_signals_only(listener: Listener) -> None:
    """Python's, though the child is inside a system call; and torch's, which ends a loader's worker with code 0."""
    name = stranger("""
        current().page[Word.SESSION] = 1
        for word in ("handle", "torch"):
            process, ask = child("fork")
            ask(word)
            stranger(process.pid)
            print(ask("there"))
            process.terminate()
            process.join(30)
            print(process.exitcode)
    """)
    assert wait(listener.start([PYTHON, name])) == 0, listener.log()
    assert listener.log() == "there\n7\nthere\n0\n"


def test_children_made_before_the_session_are_shielded_in_it(listener: Listener) -> None:
    name = stranger("""
        import supervisor.training
        process, ask = child("fork")
        ask("there")
        current().page[Word.SESSION] = 1
        stranger(process.pid)
        print(ask("still there"))
        process.kill()
    """)
    assert wait(listener.start([PYTHON, name])) == 0, listener.log()
    assert listener.log() == "still there\n"


# --------------------------------------------------------------------------- under torchrun


def test_ranks_under_torchrun_and_a_signal_to_the_whole_tree(listener: Listener) -> None:
    """SLURM's way: everything gets SIGTERM; torchrun and its workers with a Session go on."""
    text = (
        "import os\n"
        + READY
        + "while not os.path.exists('go'): os.sched_yield()\nprint('rank', os.environ['RANK'])"
    )
    pid = listener.start([TORCHRUN, "--nproc-per-node=2", script(text)])
    workers = [listener.expect("hello")["pid"] for _ in range(2)]
    for _ in range(2):
        listener.expect("ready")
    for rank in range(2):
        listener.page(rank)[Word.SESSION] = SessionFlag.OPEN
    for one in (pid, *workers):
        for number in ALL:
            os.kill(one, number)
    Path("go").touch()
    assert wait(pid) == 0
    assert [listener.log(rank) for rank in range(2)] == ["rank 0\n", "rank 1\n"]


def test_workers_die_with_torchrun(listener: Listener) -> None:
    pid = listener.start([TORCHRUN, script(READY + "import time; time.sleep(600)")])
    worker = listener.expect("hello")["pid"]
    fd = os.pidfd_open(worker)
    listener.expect("ready")
    os.kill(pid, signal.SIGKILL)
    wait(pid)
    listener.expect(CLOSED)
    os.close(fd)


def test_torchruns_own_redirects_are_kept(listener: Listener) -> None:
    pid = listener.start([TORCHRUN, "-r", "3", "--log-dir", "mine", script("print('hello')")])
    assert wait(pid) == 0
    (out,) = Path("mine").rglob("stdout.log")
    assert out.read_text() == "hello\n"
    assert not (listener.logs / "rank-0.log").exists()


def test_virtual_local_ranks_have_pages_of_their_own(listener: Listener) -> None:
    pid = listener.start([TORCHRUN, "--nproc-per-node=2", "--virtual-local-rank", script("import os; print(os.environ['LOCAL_RANK'])")],
                         CUDA_VISIBLE_DEVICES="0,1")  # fmt: skip
    assert wait(pid) == 0, (listener.logs / "torchrun.log").read_text()
    assert sorted(listener.expect("hello")["local_rank"] for _ in range(2)) == [0, 1]
    assert listener.log(1) == "0\n"


def test_a_plain_command(listener: Listener) -> None:
    text = "#!/bin/sh\necho $RANK $TORCHELASTIC_RESTART_COUNT $TORCHELASTIC_RUN_ID; exit 3\n"
    Path(script(text, "run.sh")).chmod(0o755)
    pid = listener.start([TORCHRUN, "--no-python", "./run.sh"])
    assert wait(pid) == 1
    listener.expect("hello")
    listener.expect(CLOSED)  # only at the end of the command, since nothing is told before it
    assert [message["kind"] for message in listener.seen] == ["hello", CLOSED]
    assert listener.log() == "0 7 cafe0123\n"


def test_environment_variables_of_torchrun_do_not_undo_ours(listener: Listener) -> None:
    pet = {
        "PET_STANDALONE": "1",
        "PET_RDZV_ENDPOINT": "nowhere:1",
        "PET_MODULE": "0",
        "PET_NPROC_PER_NODE": "2",
    }
    text = "import os; print(*sorted(k for k in os.environ if k.startswith('PET_')))"
    assert wait(listener.start([TORCHRUN, script(text)], **pet)) == 0, listener.logs
    assert listener.log(1).split() == sorted(pet)


# --------------------------------------------------------------------------- steps without a Session

COUNT = """
    import os, torch
    from supervisor.edge.link import current
    from supervisor.edge.control import Word
    page = current().page
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    for weight in weights: weight.grad = torch.ones(2)
"""


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("a = torch.optim.SGD(weights)\nfor _ in range(3): a.step()", 3),
        ("a, b = torch.optim.SGD(weights[:1]), torch.optim.AdamW(weights[1:])\nfor _ in range(3): a.step(); b.step()", 3),
        ("torch.optim.SGD(weights).step()\na = torch.optim.AdamW(weights)\nfor _ in range(3): a.step()", 4),
        ("class A(torch.optim.AdamW):\n    def step(self, *a): return super().step(*a)\n"
         "torch.optim.AdamW(weights)\na = A(weights)\nfor _ in range(3): a.step()", 3),
        ("class A(torch.optim.SGD):\n    def step(self, fail=False):\n        super().step()\n        assert not fail\n"
         "torch.optim.SGD(weights)\na = A(weights)\n"
         "try: a.step(fail=True)\nexcept AssertionError: pass\nfor _ in range(3): a.step()", 3),
        ("a = torch.optim.SGD(weights)\na.step()\npage[Word.SESSION] = 1\na.step()", 1),
        ("a = torch.optim.SGD(weights)\na.step()\nif os.fork() == 0:\n    a.step()\n    os._exit(0)\nos.wait()", 1),
        ("a = torch.optim.SGD(weights)\ns = torch.compile(a.step, backend='eager')\nfor _ in range(4): s()", 4),
        ("a = torch.optim.SGD(weights)\n@torch.compile(backend='eager')\ndef s(): a.step()\nfor _ in range(4): s()", 4),
    ],
    ids=["one", "two", "the next", "fires twice", "raises", "session", "forked", "compiled", "compiled around"],
)  # fmt: skip
def test_steps_are_counted(listener: Listener, text: str, steps: int) -> None:
    name = script(textwrap.dedent(COUNT) + text + "\nprint(page[Word.STEP])")
    assert wait(listener.start([PYTHON, name])) == 0, listener.log()
    assert listener.log().splitlines()[-1] == str(steps)
    page = listener.page()
    assert page[Word.PHASE] == Phase.STEP
    assert 0 < page[Word.FIRST_STEP_NS] <= page[Word.HEARTBEAT_NS]
