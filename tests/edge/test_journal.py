from __future__ import annotations

import dataclasses
import enum
import json
import os
import threading
import types
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.edge.journal import Journal, decode, encode, read
from supervisor.edge.plain import from_plain, to_plain
from supervisor.errors import JobError
from supervisor.model import FACTS, AttemptStarted, Fact, Progress, WorkersReady

TEXT = st.text(max_size=20).map(lambda text: text.encode("utf-8", "ignore").decode())


def values(annotation: Any) -> st.SearchStrategy[Any]:
    """Anything that an annotation of the vocabulary allows."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*map(values, arguments))
    if origin is tuple:
        return st.lists(values(arguments[0]), max_size=3).map(tuple)
    if origin is dict:
        return st.dictionaries(TEXT, values(arguments[1]), max_size=3)
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        hints = typing.get_type_hints(annotation)
        return st.builds(
            annotation, **{f.name: values(hints[f.name]) for f in dataclasses.fields(annotation)}
        )
    if issubclass(annotation, enum.Enum):
        return st.sampled_from(annotation)
    simple = {
        int: st.integers(-(1 << 62), 1 << 62),
        float: st.floats(),
        bool: st.booleans(),
        str: TEXT,
        types.NoneType: st.none(),
    }
    return simple[annotation]


ANY_FACT = st.one_of(*map(values, FACTS.values()))


def canonical(fact: Fact) -> str:
    """NaN is not equal to itself; its text is."""
    return repr(fact)


def started(time: float, attempt: int = 0) -> AttemptStarted:
    return AttemptStarted(time=time, attempt=attempt)


class Told:
    """Collects what is reported."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, line: str) -> None:
        self.lines.append(line)


@given(ANY_FACT)
def test_every_fact_comes_back_as_it_went(fact: Fact) -> None:
    line = encode(fact)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    back = decode(line)
    assert back is not None
    assert canonical(back) == canonical(fact)


@given(ANY_FACT, st.dictionaries(TEXT.map(lambda name: "new_" + name), st.integers()))
def test_unknown_fields_are_ignored(fact: Fact, extra: dict[str, int]) -> None:
    plain = json.loads(encode(fact)) | extra
    back = decode(json.dumps(plain).encode())
    assert back is not None
    assert canonical(back) == canonical(fact)


@given(
    st.binary(max_size=80)
    | st.recursive(st.none() | st.integers() | TEXT, st.lists).map(lambda v: json.dumps(v).encode())
)
def test_garbage_is_a_value_error(line: bytes) -> None:
    with pytest.raises(ValueError, match="no "):
        decode(line)


@given(ANY_FACT, st.data())
def test_a_torn_line_is_a_value_error(fact: Fact, data: st.DataObject) -> None:
    line = encode(fact)
    with pytest.raises(ValueError, match="no JSON"):
        decode(line[: data.draw(st.integers(0, len(line) - 2))])


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        (
            {"v": 2, "fact": "AttemptStarted"},
            "written by a newer everstep .*version 2, this one reads up to 1.*upgrade",
        ),
        ({"v": 1, "fact": "AttemptStarted", "time": 1.0}, "AttemptStarted lacks 'attempt'"),
        (
            {"v": 1, "fact": "AttemptStarted", "time": 1.0, "attempt": "0"},
            "AttemptStarted.attempt: '0' is no int",
        ),
        (
            {"v": 1, "fact": "AttemptStarted", "time": True, "attempt": 0},
            "AttemptStarted.time: True is no number",
        ),
        (
            {"v": 1, "fact": "StopRequested", "time": 1, "cause": "boredom", "source": ""},
            "StopRequested.cause: 'boredom'",
        ),
        ({"fact": "AttemptStarted"}, "no line of a journal"),
    ],
)
def test_a_wrong_line_says_what_is_wrong(plain: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(json.dumps(plain).encode())


def test_a_kind_of_fact_from_the_future_is_passed_over() -> None:
    assert decode(b'{"v": 1, "fact": "Thawed", "time": 3}') is None


def test_a_missing_field_takes_its_default() -> None:
    plain = {
        name: value
        for name, value in to_plain(Progress(time=1.0, attempt=2, step=3)).items()
        if name != "metrics"
    }
    assert from_plain(Progress, plain) == Progress(time=1.0, attempt=2, step=3)


class TestReading:
    def test_nothing_there(self, tmp_path: Path) -> None:
        assert read(tmp_path / "journal") == []

    def test_nodes_are_merged_by_time_and_each_keeps_its_order(self, tmp_path: Path) -> None:
        a = [started(1), started(5), started(4, 1), started(9)]  # the clock of a was set back once
        b = [WorkersReady(time=time, attempt=0, world_size=2) for time in (2, 4.5, 7)]
        (tmp_path / "a.jsonl").write_bytes(b"".join(map(encode, a)))
        (tmp_path / "b.jsonl").write_bytes(b"".join(map(encode, b)))
        facts = read(tmp_path)
        assert [fact for fact in facts if isinstance(fact, AttemptStarted)] == a
        assert [fact.time for fact in facts] == [1, 2, 4.5, 5, 4, 7, 9]

    def test_a_torn_end_is_dropped_in_silence_and_garbage_in_the_middle_reported(
        self, tmp_path: Path
    ) -> None:
        told, path = Told(), tmp_path / "a.jsonl"
        path.write_bytes(
            encode(started(1)) + b"\x00garbage\n" + encode(started(2, 1)) + encode(started(3, 2))[:-9]
        )
        assert read(tmp_path, told) == [started(1), started(2, 1)]
        assert told.lines == [f"{path} line 2 is skipped: no JSON"]

    def test_a_newer_version_is_reported_as_such(self, tmp_path: Path) -> None:
        told = Told()
        (tmp_path / "a.jsonl").write_bytes(b'{"v": 9, "fact": "AttemptStarted"}\n' + encode(started(2)))
        assert read(tmp_path, told) == [started(2)]
        assert "newer everstep (journal version 9" in told.lines[0]

    def test_a_file_that_cannot_be_read(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").mkdir()
        with pytest.raises(JobError, match=r"cannot read the journal .*a\.jsonl"):
            read(tmp_path)


class TestWriting:
    def test_what_is_appended_is_there_at_once_and_durable_after_a_flush(self, tmp_path: Path) -> None:
        written = Journal(tmp_path / "journal" / "node.jsonl")
        facts = [started(float(n), n) for n in range(50)]
        for fact in facts:
            written.append(fact)
        assert read(tmp_path / "journal") == facts
        assert written.flush()
        written.close()

    def test_an_append_never_waits_for_the_disk(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        slow, asked = threading.Event(), threading.Event()

        def never_done(fd: int) -> None:
            asked.set()
            slow.wait(30)

        monkeypatch.setattr(os, "fdatasync", never_done)
        written = Journal(tmp_path / "node.jsonl")
        written.append(started(1))
        assert asked.wait(30)
        written.append(started(2, 1))  # while the first is still on its way to the disk
        assert read(tmp_path) == [started(1), started(2, 1)]
        assert not written.flush(0.01)
        slow.set()
        assert written.flush()
        written.close()

    def test_a_predecessors_torn_line_swallows_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "node.jsonl").write_bytes(encode(started(1)) + b'{"v":1,"fa')
        written = Journal(tmp_path / "node.jsonl")
        written.append(started(2, 1))
        written.close()
        assert read(tmp_path, Told()) == [started(1), started(2, 1)]

    def test_a_directory_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "journal").write_text("a file")
        with pytest.raises(JobError, match="cannot write the journal"):
            Journal(tmp_path / "journal" / "node.jsonl")

    @pytest.mark.may_skip(reason="a machine without /dev/full")
    def test_a_full_disk_is_told_once_and_takes_nothing_down(self) -> None:
        if not Path("/dev/full").exists():
            pytest.skip("no /dev/full")
        told = Told()
        written = Journal(Path("/dev/full"), told)
        for number in range(10):
            written.append(started(float(number), number))
        assert not written.flush()
        written.close()
        assert told.lines == [
            "the journal /dev/full cannot be written (No space left on device); the run goes on without"
        ]

    def test_what_a_full_disk_refused_is_written_when_there_is_room(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        told, room, real = Told(), [30], os.write

        def short_write(fd: int, data: bytes) -> int:
            if room[0] == 0:
                raise OSError(28, "No space left on device")
            taken = real(fd, bytes(data[: room[0]]))
            room[0] -= taken
            return taken

        monkeypatch.setattr(os, "write", short_write)
        written = Journal(tmp_path / "node.jsonl", told)
        facts = [started(float(n), n) for n in range(4)]
        for fact in facts[:3]:
            written.append(fact)
        assert read(tmp_path) == []  # one torn line
        room[0] = 1 << 20
        written.append(facts[3])
        assert written.flush()
        assert read(tmp_path) == facts
        assert len(told.lines) == 1
        written.close()
