"""The live stream: whole lines, nothing lost, nobody blocked."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from supervisor.edge.console import Console


class Pipe:
    """The reading end of what a console writes, collected by a thread once ``read`` is called."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self.text = b""

    def read(self) -> threading.Thread:
        def collect() -> None:
            while chunk := os.read(self.reader, 65536):
                self.text += chunk

        thread = threading.Thread(target=collect)
        thread.start()
        return thread


def shown(console: Console, pipe: Pipe) -> str:
    reading = pipe.read()
    console.close()
    os.close(pipe.writer)
    reading.join(20)
    os.close(pipe.reader)
    return pipe.text.decode()


def test_lines_of_all_ranks_are_whole_and_prefixed(tmp_path: Path) -> None:
    pipe = Pipe()
    console = Console(out=pipe.writer, err=pipe.writer)
    for rank in (0, 1):
        console.follow(tmp_path / f"rank-{rank}.log", f"[rank{rank}] ")
    with open(tmp_path / "rank-0.log", "wb", 0) as a, open(tmp_path / "rank-1.log", "wb", 0) as b:
        for n in range(500):
            a.write(b"zero %d, first half" % n)
            b.write(b"one %d\n" % n)
            a.write(b", second half\n")
        a.write(b"cut off by death")
    console.finish(tmp_path)
    lines = shown(console, pipe).splitlines()
    assert [line for line in lines if "rank0" in line] == [
        *(f"[rank0] zero {n}, first half, second half" for n in range(500)),
        "[rank0] cut off by death",
    ]
    assert [line for line in lines if "rank1" in line] == [f"[rank1] one {n}" for n in range(500)]
    assert len(lines) == 1001


def test_a_reader_that_is_slow_to_start_gets_everything(tmp_path: Path) -> None:
    pipe = Pipe()
    console = Console(out=pipe.writer, err=pipe.writer)
    log = tmp_path / "rank-0.log"
    log.write_bytes(
        b"x" * 99 + b"\n" + b"".join(b"%098d\n" % n for n in range(30000))
    )  # far more than a pipe holds
    console.follow(log, "")
    console.say("not waited for")  # returns at once although nobody reads
    assert len(shown(console, pipe).splitlines()) == 30002


def test_a_reader_that_leaves_stops_nothing(tmp_path: Path) -> None:
    pipe = Pipe()
    os.close(pipe.reader)
    console = Console(out=pipe.writer, err=pipe.writer)
    (tmp_path / "log").write_text("line\n" * 1000)
    console.follow(tmp_path / "log", "")
    console.say("still here")
    console.close()
    assert not console._thread.is_alive()
    os.close(pipe.writer)


def test_quiet_hides_the_ranks_and_not_everstep(tmp_path: Path) -> None:
    pipe = Pipe()
    console = Console(quiet=True, out=pipe.writer, err=pipe.writer)
    (tmp_path / "log").write_text("chatter\n")
    console.follow(tmp_path / "log", "")
    console.say("attempt 0 failed")
    assert shown(console, pipe) == "everstep: attempt 0 failed\n"


def test_a_terminal_gets_a_progress_line_below_the_output(tmp_path: Path) -> None:
    import pty

    master, slave = pty.openpty()
    console = Console(out=slave, err=slave)
    console.progress("step 5/10")
    text = b""
    while b"step 5/10" not in text:
        text += os.read(master, 4096)
    console.say("something happened")
    while b"happened" not in text or not text.rstrip().endswith(b"step 5/10"):
        text += os.read(master, 4096)
    assert b"\r\x1b[Keverstep: something happened" in text
    console.close()
    os.close(slave)
    os.close(master)
