"""Hooks: who is told what, in which order, and that none of them can harm the run."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor import config
from supervisor.decide import lifecycle, telling
from supervisor.decide.telling import Event, Hook
from supervisor.edge import processes
from supervisor.edge.hooks import MOST_WAITING, Runner
from supervisor.errors import ConfigError
from supervisor.model import Action, Decided, Fact
from supervisor.settings import described
from tests.journals import journals

PATIENCE = 60.0

# --------------------------------------------------------------------------- who is told


@pytest.mark.parametrize(
    ("text", "events", "argv", "url"),
    [
        ("notify-send done", tuple(Event), ("notify-send", "done"), None),
        ("failure=page 'two words' $HOME;ls", (Event.FAILURE,), ("page", "two words", "$HOME;ls"), None),
        ("gave_up,failure=./x", (Event.FAILURE, Event.GAVE_UP), ("./x",), None),
        ("https://hooks.example/T0/B1?x=1", tuple(Event), (), "https://hooks.example/T0/B1?x=1"),
        ("completed=http://[::1]:8080/", (Event.COMPLETED,), (), "http://[::1]:8080/"),
    ],
)
def test_forms(text: str, events: tuple[Event, ...], argv: tuple[str, ...], url: str | None) -> None:
    assert Hook.parse(text) == Hook(events=events, argv=argv, url=url)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("", "is no hook"),
        ("failure=", "is no hook"),
        ("failed=page", "unknown event 'failed'; allowed: failure, preempted, stopped, completed, gave-up"),
        ("page 'unfinished", "No closing quotation"),
        ("ftp://host/x", "no address of a webhook"),
        ("https://", "no address of a webhook"),
        ({"run": "a string"}, "run is a list of words"),
        ({"run": ["a"], "post": "http://h/"}, "there is one of them"),
        ({"on": ["never"], "run": ["a"]}, "unknown event 'never'"),
        ({"on": 3, "run": ["a"]}, "a list of events"),
        ({"when": "now"}, "a mapping of on, and run or post"),
        (7, "is no hook"),
    ],
)
def test_what_is_no_hook(value: object, said: str) -> None:
    with pytest.raises(ConfigError, match="^[^\n]*$") as caught:
        telling.hooks(value)
    assert said in str(caught.value)


def test_from_a_file_and_from_flags(tmp_path: Path) -> None:
    file = tmp_path / "everstep.yaml"
    file.write_text(
        "hook:\n  - gave-up=page me\n  - {on: [preempted, stopped], run: [mail, -s, a b]}\n  - {post: 'https://h.example/s3cret'}\n"
        "hook-timeout: 5s\nmetrics_port: 0\n"
    )
    options = config.load({"config": str(file)})
    assert options.hook == (
        Hook(events=(Event.GAVE_UP,), argv=("page", "me")),
        Hook(events=(Event.PREEMPTED, Event.STOPPED), argv=("mail", "-s", "a b")),
        Hook(url="https://h.example/s3cret"),
    )
    assert (options.hook_timeout, options.metrics_port) == (5.0, 0)
    assert config.load({"hook": ["a", "b c"]}, tmp_path / "none").hook == (
        Hook(argv=("a",)),
        Hook(argv=("b", "c")),
    )
    words = described(options)
    assert words["hook"] == "gave-up=page me, preempted,stopped=mail -s 'a b', https://h.example/…"
    assert "s3cret" not in str(words)
    assert (words["grace"], words["snapshot-every"], words["hook-timeout"]) == ("60s", "30s", "5s")


@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1), min_size=1))
def test_words_stay_words(words: list[str]) -> None:
    hook = Hook.parse("failure=" + shlex.join(words)) if "://" not in words[0] else Hook(argv=tuple(words))
    assert hook.argv == tuple(words)


def test_a_secret_in_an_address_is_in_no_message() -> None:
    hook = Hook.parse("https://user:pass@hooks.example:8443/T0/s3cret?token=s3cret")
    assert str(hook) == "https://hooks.example:8443/…"


@given(journals())
def test_every_verdict_is_told_once_and_as_json(facts: list[Fact]) -> None:
    record = lifecycle.NEW_JOB
    for fact in facts:
        record = lifecycle.apply(record, fact)
        if not isinstance(fact, Decided):
            continue
        told = telling.events(record, fact)
        last = {
            Action.COMPLETE: {Event.COMPLETED},
            Action.GIVE_UP: {Event.GAVE_UP},
            Action.RESTART: set(),
            Action.ROLL_BACK: set(),
        }
        wanted = last.get(fact.action, {Event.PREEMPTED, Event.STOPPED})
        assert len(wanted & set(told)) == (1 if wanted else 0)
        assert Event.FAILURE in told or not fact.action.goes_on
        assert len(told) == len(set(told))
        for event in told:
            plain = json.loads(
                json.dumps(telling.message(event, record, fact, {"name": "gpt"}), allow_nan=False)
            )
            assert (plain["event"], plain["name"], plain["attempt"]) == (event, "gpt", fact.attempt)
            if event is Event.FAILURE:
                assert plain["failure"]["attempt"] == fact.attempt


# --------------------------------------------------------------------------- how they are run


def script(tmp_path: Path, text: str) -> tuple[str, ...]:
    file = tmp_path / "hook.py"
    file.write_text("import json, os, signal, sys, time\n" + text)
    return sys.executable, str(file)


def runner(tmp_path: Path, argv: tuple[str, ...], said: list[str], timeout: float = PATIENCE) -> Runner:
    return Runner("page", argv, None, timeout=timeout, log=tmp_path / "hooks.log", report=said.append)


def tell(one: Runner, *messages: dict[str, Any], patience: float = PATIENCE) -> None:
    async def work() -> None:
        for message in messages:
            one.tell({"event": "failure", **message})
        await one.finish(patience)

    asyncio.run(work())


def test_it_is_told_one_thing_at_a_time_in_order(tmp_path: Path) -> None:
    said: list[str] = []
    argv = script(
        tmp_path,
        "told = json.load(sys.stdin)\n"
        "os.mkdir('busy')\n"  # fails when another one is at work
        "print(told['n'], os.environ['EVERSTEP_EVENT'], 'EVERSTEP_RUN_ID' in os.environ, os.getsid(0) == os.getpid(), flush=True)\n"
        "os.rmdir('busy')\n",
    )
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        tell(runner(tmp_path, argv, said), *({"n": n} for n in range(5)))
    finally:
        os.chdir(before)
    assert (tmp_path / "hooks.log").read_text() == "".join(f"{n} failure False True\n" for n in range(5))
    assert said == []


def test_one_that_never_reads_is_not_waited_for(tmp_path: Path) -> None:
    said: list[str] = []
    tell(runner(tmp_path, script(tmp_path, "print('done', flush=True)"), said), {"much": "x" * 5_000_000})
    assert (said, (tmp_path / "hooks.log").read_text()) == ([], "done\n")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sys.exit(3)", "failed with exit code 3, see"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "failed with signal 9, see"),
    ],
)
def test_its_failure_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    lines: list[str] = []
    one = runner(tmp_path, script(tmp_path, text), lines)
    tell(one, {})
    assert len(lines) == one.failures == 1
    assert lines[0].startswith("hook page ")
    assert said in lines[0]


def test_one_that_cannot_be_started(tmp_path: Path) -> None:
    lines: list[str] = []
    tell(runner(tmp_path, ("/no/such/command",), lines), {}, {})
    assert lines == ["hook page cannot be started: No such file or directory; the run goes on"] * 2


def test_one_that_takes_too_long_is_ended_with_all_it_started(tmp_path: Path) -> None:
    lines: list[str] = []
    pids = tmp_path / "pids"
    text = f"trap '' TERM; sleep 600 & echo $$ $! > {shlex.quote(str(pids))}; wait"
    tell(runner(tmp_path, ("/bin/sh", "-c", text), lines, timeout=3.0), {})
    assert lines == ["hook page took longer than 3 s (--hook-timeout) and was ended; the run goes on"]
    started = [psutil.Process(int(pid)) for pid in pids.read_text().split() if psutil.pid_exists(int(pid))]
    _, alive = psutil.wait_procs(started, timeout=PATIENCE)
    processes.reap()
    assert alive == []


def test_the_end_of_the_run_waits_only_so_long(tmp_path: Path) -> None:
    lines: list[str] = []
    tell(runner(tmp_path, script(tmp_path, "time.sleep(600)"), lines), {}, {}, {}, patience=0.5)
    assert lines == ["hook page was ended, the run does not wait for it (3 not told); the run goes on"]
    processes.reap()


def test_of_too_many_messages_the_newest_are_told(tmp_path: Path) -> None:
    lines: list[str] = []
    one = runner(tmp_path, ("/no/such/command",), lines)
    tell(one, *({"n": n} for n in range(MOST_WAITING + 20)))
    assert len(lines) == MOST_WAITING


def test_an_end_that_somebody_else_has_collected_is_known(tmp_path: Path) -> None:
    """As the supervisor's pulse does with every orphan."""
    lines: list[str] = []
    one = runner(tmp_path, script(tmp_path, "sys.exit(5)"), lines)

    async def work() -> None:
        one.tell({"event": "failure"})

        async def collect() -> None:
            while not lines:
                processes.reap()
                await asyncio.sleep(0)

        await asyncio.wait_for(collect(), PATIENCE)

    asyncio.run(work())
    assert "exit code 5" in lines[0]


# --------------------------------------------------------------------------- webhooks


class Endpoint(ThreadingHTTPServer):
    """Answers with the given codes, one after another, and keeps what it was sent."""

    def __init__(self, *codes: int) -> None:
        self.codes = list(codes)
        self.taken: list[tuple[str, dict[str, str], Any]] = []
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/hook/s3cret"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server = self.server
        assert isinstance(server, Endpoint)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.taken.append((self.path, dict(self.headers), body))
        code = server.codes.pop(0) if server.codes else 200
        self.send_response(code)
        if code == 302:
            self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint(request: pytest.FixtureRequest) -> Iterator[Endpoint]:
    server = Endpoint(*getattr(request, "param", ()))
    yield server
    server.shutdown()
    server.server_close()


def posted(endpoint: Endpoint, tmp_path: Path, timeout: float = PATIENCE) -> list[str]:
    said: list[str] = []
    one = Runner("h", (), endpoint.url, timeout=timeout, log=tmp_path / "hooks.log", report=said.append)
    tell(one, {"n": 1})
    return said


@pytest.mark.parametrize("endpoint", [(200,), (503, 429, 200)], indirect=True)
def test_a_webhook_is_told_and_tries_again(endpoint: Endpoint, tmp_path: Path) -> None:
    times = len(endpoint.codes)
    assert posted(endpoint, tmp_path) == []
    assert len(endpoint.taken) == times
    path, headers, body = endpoint.taken[-1]
    assert (path, headers["Content-Type"], body) == (
        "/hook/s3cret",
        "application/json",
        {"event": "failure", "n": 1},
    )


@pytest.mark.parametrize("endpoint", [(404,), (302,)], indirect=True)
def test_a_webhook_that_refuses_is_not_asked_again_nor_followed_elsewhere(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    assert len(posted(endpoint, tmp_path)) == 1
    assert [path for path, _, _ in endpoint.taken] == ["/hook/s3cret"]


def test_the_address_is_no_argument(endpoint: Endpoint, tmp_path: Path) -> None:
    """Arguments can be read by everybody on the machine."""
    one = Runner("h", (), endpoint.url, timeout=1.0, log=tmp_path / "hooks.log", report=lambda line: None)
    assert "s3cret" not in " ".join(one._argv)
