from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from supervisor import ledger, replay
from supervisor.decide import lifecycle
from supervisor.edge import journal
from supervisor.edge.journal import Journal, encode
from supervisor.errors import ProtocolError
from supervisor.ledger import Ledger
from supervisor.model import (
    CheckpointCommitted,
    CheckpointRejected,
    Fact,
    Progress,
    Resumed,
    RunStarted,
    Tier,
)
from supervisor.replay import FILE, Replay
from tests.journals import journals
from tests.test_status import finished, running


def whole(directory: Path) -> tuple[object, list[str]]:
    """What the journal says when it is read from its beginning."""
    return lifecycle.replay(journal.read(directory))


def advanced(directory: Path) -> Replay:
    folded = Replay(directory)
    folded.advance()
    return folded


def append(path: Path, *facts: Fact) -> None:
    with path.open("ab") as file:
        file.write(b"".join(map(encode, facts)))


def save(directory: Path, folded: Replay, name: str) -> bool:
    path = directory / name
    content = folded.to_save(name, path.stat().st_size if path.exists() else 0)
    if content is not None:
        (directory / FILE).write_bytes(content)
    return content is not None


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])  # each example writes files
@given(journals(), st.data())
def test_folding_from_any_point_is_folding_the_whole(facts: list[Fact], data: st.DataObject) -> None:
    """Runs alternate between two nodes, the clock of one of which may lag; a watcher looks, and saves, now and then."""
    lag = data.draw(st.sampled_from([0, 0, 1, 50, 20_000]))
    cuts = data.draw(st.sets(st.integers(0, len(facts)), max_size=4))
    with tempfile.TemporaryDirectory() as folder:
        directory, watcher, node = Path(folder), Replay(Path(folder)), "a.jsonl"
        for number, fact in enumerate([*facts, None]):
            if number in cuts or fact is None:
                watcher.advance()
                assert (watcher.record, list(watcher.problems)) == whole(directory)
                fresh = advanced(directory)
                assert (fresh.record, list(fresh.problems)) == whole(directory)
                assert (fresh.verdicts, fresh.checkpoints) == (watcher.verdicts, watcher.checkpoints)
                assert save(directory, watcher, node)
                assert advanced(directory).unsaved == 0
            if isinstance(fact, RunStarted):
                node = data.draw(st.sampled_from(["a.jsonl", "b.jsonl"]))
            if fact is not None:
                append(directory / node, replace(fact, time=fact.time - lag) if node[0] == "b" else fact)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])  # each example writes files
@given(journals())
def test_what_an_owner_leaves_is_the_whole(facts: list[Fact]) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger, "SAVE_EVERY", 7)
        directory = Path(folder)
        runs = [number for number, fact in enumerate(facts) if isinstance(fact, RunStarted)]
        for start, end in zip(runs, [*runs[1:], len(facts)], strict=True):
            owner = Ledger(Journal(directory / "node.jsonl"), advanced(directory))
            for fact in facts[start:end]:
                owner.add(fact)
            owner.close()
        fresh = advanced(directory)
        assert fresh.unsaved == 0
        assert (fresh.record, list(fresh.problems)) == whole(directory)
        assert fresh.record == owner.record


def test_a_killed_owners_successor_reads_only_what_came_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "SAVE_EVERY", 10)
    written = Journal(tmp_path / "node.jsonl")
    owner = Ledger(written, advanced(tmp_path))
    for fact in finished():
        owner.add(fact)
    assert written.flush()  # and no close
    successor = advanced(tmp_path)
    assert successor.unsaved == len(finished()) - 10
    assert successor.record == owner.record == lifecycle.fold(finished())
    written.close()


def _truncate(directory: Path) -> None:
    path = directory / "node.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-3]))


def _rewrite(directory: Path) -> None:
    path = directory / "node.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"step":100', b'"step":101'))


def _change(name: str, value: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        plain = json.loads((directory / FILE).read_bytes())
        (directory / FILE).write_text(json.dumps({**plain, name: value}))

    return change


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        _rewrite,
        _change("rules", 1),
        _change("record", {"state": "asleep"}),
        _change("record", None),
        _change("places", {"gone.jsonl": {"offset": 0}}),
        _change("places", {"node.jsonl": {"offset": 10, "last_bytes": 99}}),
        lambda directory: (directory / FILE).write_bytes(b""),
        lambda directory: (directory / FILE).write_bytes(b"[]"),
        lambda directory: (directory / FILE).write_bytes((directory / FILE).read_bytes()[:-40]),
        lambda directory: (directory / FILE).write_bytes(b"\xff\x00"),
    ],
)
def test_what_does_not_fit_is_not_trusted(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    append(tmp_path / "node.jsonl", *running())
    assert save(tmp_path, advanced(tmp_path), "node.jsonl")
    assert advanced(tmp_path).unsaved == 0
    damage(tmp_path)
    folded = advanced(tmp_path)
    assert folded.unsaved == len(journal.read(tmp_path))
    assert (folded.record, list(folded.problems)) == whole(tmp_path)


def test_a_journal_that_shrinks_while_it_is_watched_is_read_anew(tmp_path: Path) -> None:
    append(tmp_path / "node.jsonl", *running())
    watcher = advanced(tmp_path)
    _truncate(tmp_path)
    watcher.advance()
    assert (watcher.record, []) == whole(tmp_path)


def test_problems_are_remembered(tmp_path: Path) -> None:
    append(tmp_path / "node.jsonl", *finished())
    with (tmp_path / "node.jsonl").open("ab") as file:
        file.write(b"garbage\n" + encode(Progress(time=1300, attempt=1, step=3)))
    assert save(tmp_path, advanced(tmp_path), "node.jsonl")
    again = advanced(tmp_path)
    assert again.unsaved == 0
    assert "line 19 is skipped: no JSON" in again.problems[0]
    assert "Progress cannot happen to a job that is completed" in again.problems[1]


def test_an_impossible_fact_changes_nothing_and_is_not_written(tmp_path: Path) -> None:
    owner = Ledger(Journal(tmp_path / "node.jsonl"), advanced(tmp_path))
    with pytest.raises(ProtocolError, match="Progress cannot happen"):
        owner.add(Progress(time=1, attempt=0, step=1))
    owner.close()
    assert journal.read(tmp_path) == []


def test_an_owner_whose_clock_lags_behind_an_earlier_nodes_saves_nothing(tmp_path: Path) -> None:
    append(tmp_path / "a.jsonl", *running())
    owner = Ledger(Journal(tmp_path / "b.jsonl"), advanced(tmp_path))
    first = running()[0]
    owner.add(replace(first, time=500.0))
    owner.close()
    assert not (tmp_path / FILE).exists()
    assert (advanced(tmp_path).record, list(advanced(tmp_path).problems)) == whole(tmp_path)


def test_an_owner_whose_disk_refused_a_line_saves_nothing(tmp_path: Path) -> None:
    append(tmp_path / "node.jsonl", *running()[:-1])
    folded = advanced(tmp_path)
    last = running()[-1]
    folded.add(last)
    folded.wrote("node.jsonl", last, encode(last))
    assert not save(tmp_path, folded, "node.jsonl")
    append(tmp_path / "node.jsonl", last)  # when there is room again
    assert save(tmp_path, folded, "node.jsonl")
    assert advanced(tmp_path).unsaved == 0


def test_a_torn_last_line_counts_once_its_newline_is_there(tmp_path: Path) -> None:
    lines = [encode(fact) for fact in running()]
    (tmp_path / "node.jsonl").write_bytes(b"".join(lines)[:-1])
    folded = advanced(tmp_path)
    assert folded.record.step == 81
    written = Journal(tmp_path / "node.jsonl")
    folded.advance()
    assert folded.record.step == 100
    owner = Ledger(written, folded)
    owner.add(Progress(time=1131, attempt=1, step=110))
    owner.close()
    assert advanced(tmp_path).unsaved == 0
    assert (owner.record, []) == whole(tmp_path)


def test_a_fold_that_cannot_be_written_is_told_once_and_stops_nothing(tmp_path: Path) -> None:
    told: list[str] = []
    (tmp_path / FILE).mkdir()
    owner = Ledger(Journal(tmp_path / "node.jsonl", told.append), advanced(tmp_path))
    for fact in finished():
        owner.add(fact)
    owner.close()
    assert len(told) == 1
    assert "cannot be summed up in fold.json (Is a directory)" in told[0]
    assert journal.read(tmp_path) == finished()


def test_what_is_known_of_checkpoints_goes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST_VERDICTS", 3)

    def committed(step: int) -> Fact:
        return CheckpointCommitted(time=2000, attempt=1, step=step, path=f"/c/{step}", seconds=1, bytes=1)

    def compared(step: int, *, good: bool) -> Fact:
        if good:
            return Resumed(time=2000, attempt=1, step=step, tier=Tier.CHECKPOINT, path=f"/c/{step}")
        return CheckpointRejected(time=2000, path=f"/c/{step}", reason="damaged")

    append(tmp_path / "node.jsonl", *running(), committed(1), compared(1, good=True), compared(2, good=False))
    assert save(tmp_path, advanced(tmp_path), "node.jsonl")
    append(tmp_path / "node.jsonl", committed(2), compared(3, good=True))
    folded = advanced(tmp_path)
    assert folded.unsaved == 2
    assert folded.checkpoints == Path("/c")
    assert folded.verdicts == {Path("/c/1"): True, Path("/c/3"): True}
    append(tmp_path / "node.jsonl", *(compared(step, good=True) for step in (4, 5)))
    folded.advance()
    assert list(folded.verdicts) == [Path("/c/3"), Path("/c/4"), Path("/c/5")]
