"""The live stream: whole lines, nothing lost, nobody blocked."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from supervisor.edge.console import BAR_PERIOD, MOST_HELD, Console, _Tail


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


def test_an_output_that_is_full_and_non_blocking_is_waited_for(tmp_path: Path) -> None:
    """The flag belongs to the open file, so a program that shares our terminal or pipe can set it on us."""
    pipe = Pipe()
    os.set_blocking(pipe.writer, False)
    console = Console(out=pipe.writer, err=pipe.writer)
    (tmp_path / "log").write_bytes(
        b"".join(b"%099d\n" % n for n in range(30000))
    )  # far more than a pipe holds
    console.follow(tmp_path / "log", "")
    console.say("still here")
    lines = shown(console, pipe).splitlines()
    assert lines[:-1] == [f"{n:099d}" for n in range(30000)]
    assert lines[-1] == "everstep: still here"


def test_a_full_disk_loses_what_it_refuses_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, full, refused = Pipe(), [True], threading.Event()
    real = os.write

    def write(fd: int, data: bytes) -> int:
        if fd == pipe.writer and full[0]:
            refused.set()
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data)

    monkeypatch.setattr(os, "write", write)
    console = Console(err=pipe.writer)
    console.say("lost")
    assert refused.wait(20)
    full[0] = False
    console.say("printed")
    assert shown(console, pipe) == "everstep: printed\n"


def test_a_log_that_cannot_be_read_for_a_while_ends_nothing(tmp_path: Path) -> None:
    pipe = Pipe()
    console = Console(out=pipe.writer, err=pipe.writer)
    (tmp_path / "broken").mkdir()  # opening it is an error, and so is reading on storage that fails
    (tmp_path / "log").write_text("one\n")
    console.follow(tmp_path / "broken", "")
    console.follow(tmp_path / "log", "")
    assert os.read(pipe.reader, 100) == b"one\n"
    (tmp_path / "broken").rmdir()
    (tmp_path / "broken").write_text("two\n")
    assert os.read(pipe.reader, 100) == b"two\n"
    assert shown(console, pipe) == ""


def test_a_progress_bar_is_seen_before_its_line_ends(tmp_path: Path) -> None:
    pipe = Pipe()
    console = Console(out=pipe.writer, err=pipe.writer)
    (tmp_path / "log").write_bytes(b"\r 10%\r 20%\r 30%")
    console.follow(tmp_path / "log", "[rank0] ")
    assert os.read(pipe.reader, 100) == b"[rank0]  20%\n"
    with open(tmp_path / "log", "ab") as log:
        log.write(b"\r100%\nnext\n")
    assert shown(console, pipe) == "[rank0] 100%\n[rank0] next\n"


def printed(*chunks: bytes, every: float = BAR_PERIOD) -> list[bytes]:
    """The lines that come of chunks that are read ``every`` so many seconds."""
    tail, lines = _Tail(Path("log"), b""), []
    for number, chunk in enumerate(chunks, 1):
        lines += tail.take(chunk)
        lines += tail.due(number * every)
    return lines + tail.end()


@pytest.mark.parametrize(
    ("chunks", "lines"),
    [
        ([b"one\n\ntwo"], [b"one", b"", b"two"]),
        ([b"dos\r\nends\r", b"\n"], [b"dos", b"ends"]),
        ([b"\r1", b"\r2", b"\r3\n"], [b"1", b"3"]),
        ([b"\r1\r", b"2\r", b"\r", b"\n"], [b"1", b"2"]),
        ([b"\r1\r2\r   \r\n"], [b"2"]),
        ([b"\r1\r2\r", b"    \r", b"after\n"], [b"2", b"after"]),
        ([b"\r1\r2"], [b"1", b"2"]),
        ([b"\r1\r2\r"], [b"2"]),
    ],
)
def test_what_is_printed_of_carriage_returns(chunks: list[bytes], lines: list[bytes]) -> None:
    assert printed(*chunks) == lines


def test_a_fast_progress_bar_is_printed_once_a_second() -> None:
    drawings = [b"\r%03d" % n for n in range(101)]
    assert printed(*drawings, every=BAR_PERIOD / 10) == [
        *(b"%03d" % (n - 1) for n in range(1, 101, 10)),
        b"100",
    ]


def test_a_line_without_end_is_not_held() -> None:
    tail, lines, chunk = _Tail(Path("log"), b""), [], b"x" * 1000
    for _ in range(1000):
        lines += tail.take(chunk)
        assert len(tail.rest) <= MOST_HELD
    lines += tail.end()
    assert b"".join(lines) == chunk * 1000
    assert len(lines) <= 1000 * 1000 / MOST_HELD + 1
