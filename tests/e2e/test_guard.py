"""Numbers that go wrong: the job goes back, leaves out what it is told to, gives up where that is in vain, ends exactly."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from supervisor.checkpoint.catalog import list_checkpoints
from supervisor.decide import restart
from supervisor.decide.rollback import is_condemned
from supervisor.model import Action, AttemptEnded, Decided, Fact, FailureKind, Resumed, Skip, StatesCondemned
from supervisor.record import JobRecord
from tests.e2e.harness import BIN, DEADLINE, PROGRAMS, Job, digests, environment, torchrun

GONE_WRONG = str(PROGRAMS / "gone_wrong.py")
OFTEN = ("--snapshot-every", "5steps", "--checkpoint-every", "5steps")


def reference(out: Path, *arguments: object, ranks: int = 2) -> dict[str, str]:
    """Digests of the final weights of the script under plain torchrun, without a Session."""
    words = [
        "--standalone",
        f"--nproc-per-node={ranks}",
        GONE_WRONG,
        "--no-session",
        "--out",
        out,
        *arguments,
    ]
    result = subprocess.run(
        [str(BIN / "torchrun"), *map(str, words)],
        env=environment(), timeout=DEADLINE, capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = digests(out)
    assert len(found) == ranks, result.stdout + result.stderr
    return found


def rollbacks(job: Job) -> list[Decided]:
    return [fact for fact in job.facts(Decided) if fact.action is Action.ROLL_BACK]


def is_replayed(facts: list[Fact]) -> bool:
    """Whether the journal, folded up to each verdict on a failure, yields that verdict again."""
    from supervisor.decide import lifecycle

    record, verdicts = JobRecord(), 0
    for fact in facts:
        if (
            isinstance(fact, Decided)
            and record.last_failure is not None
            and fact.action is not Action.COMPLETE
        ):
            again = restart.decide(record, record.last_failure)
            assert (again.action, again.reason) == (fact.action, fact.reason)
            assert (again.skip, again.level) == (fact.skip, fact.level)
            verdicts += 1
        record = lifecycle.apply(record, fact)
    return verdicts > 0


def test_what_went_wrong_once_is_done_again_and_what_comes_again_is_a_new_level(
    job: Job, tmp_path: Path
) -> None:
    """A nan on one rank, which does not come again, then a jump on both, which does; and it ends exactly."""
    command = torchrun(
        "--out",
        tmp_path / "out",
        "--steps",
        120,
        "--bad",
        "22:nan:1:0",
        "--bad",
        "83:spike:all:all",
        script=GONE_WRONG,
    )
    assert job.run(command, *OFTEN, "--guard", "spike", "--guard-times", "1") == 0, job.output
    failures = [fact.failure for fact in job.facts(AttemptEnded) if fact.failure is not None]
    assert [failure.kind for failure in failures] == [FailureKind.NUMERIC] * 3, job.output
    assert [failure.step for failure in failures] == [22, 83, 83]
    assert failures[0].rank == 1
    assert "loss is nan in step 22 (rank 1)" in failures[0].reason
    assert "loss has jumped to" in failures[1].reason
    assert [fact.level for fact in rollbacks(job)] == [None, None, 83]
    assert "to go on with the new level" in job.output
    _, first, *later = (fact.step for fact in job.facts(Resumed))
    assert first < 22
    assert max(later) < 83
    assert [fact.step for fact in job.facts(StatesCondemned)][:2] == [22, 83]
    bad = ("--bad", "83:spike:all:all")
    assert digests(tmp_path / "out") == reference(tmp_path / "plain", "--steps", 120, *bad)
    status = job.status()
    guard = {"mode": "spike", "rollbacks": 3, "rollbacks_left": 0, "left_out": [], "levels": [83]}
    assert status["guard"] == guard
    assert is_replayed(job.facts())
    for record in list_checkpoints(job.folder / "checkpoints"):
        assert record.manifest is not None
        assert not is_condemned(job.record, record.manifest.origin.attempt, record.step)


def test_what_is_left_out_takes_its_batches_with_it(job: Job, tmp_path: Path) -> None:
    """Of a loader that draws as it fetches, two for each step; across the end of an epoch, and the end of the training."""
    bad = [word for step in (8, 39) for word in ("--bad", f"{step}:nan:0:all")]
    shape = ("--loader", "--two-each", "--steps", 40)
    command = torchrun("--out", tmp_path / "out", *shape, *bad, script=GONE_WRONG)
    assert job.run(command, *OFTEN, "--guard", "nan", "--guard-skip", "3steps") == 0, job.output
    assert [fact.skip for fact in rollbacks(job)] == [
        Skip(first=6, stop=9, batches={"loader": 2}),
        Skip(first=34, stop=40, batches={"loader": 2}),  # so soon after the other, it may be the same trouble
    ]
    plain = reference(tmp_path / "plain", *shape, "--omit", "6,7,8,34,35,36,37,38,39")
    assert digests(tmp_path / "out") == plain
    assert "steps 6 to 8 are left out" in job.output
    assert is_replayed(job.facts())


def test_what_comes_again_each_time_is_given_up_and_can_be_left_out_then(job: Job, tmp_path: Path) -> None:
    command = torchrun("--out", tmp_path / "out", "--bad", "22:nan:all:all", script=GONE_WRONG, ranks=1)
    options = (*OFTEN, "--keep-last", "10", "--guard", "nan")
    assert job.run(command, *options, "--guard-times", "1") == 1, job.output
    resumed = [fact.step for fact in job.facts(Resumed)]
    assert len(resumed) == 2
    assert max(resumed) <= 22  # how far back depends on what was saved in time: tests/decide/test_rollback.py
    reason = job.facts(Decided)[-1].reason
    assert reason.startswith("giving up: loss is nan in step 22")
    assert "1 rollback did not get past it" in reason
    assert "--guard-skip" in reason
    assert job.run(command, *options, "--guard-skip", "1step") == 0, job.output
    assert job.facts(Resumed)[-1].step <= 22
    assert digests(tmp_path / "out") == reference(tmp_path / "plain", "--omit", "22", ranks=1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--guard", "maybe"), "--guard 'maybe'; allowed: off, nan, spike"),
        (("--guard-skip", "5m"), "--guard-skip: '5m' is no number of steps; allowed: off, 1step, 50steps"),
        (("--guard-factor", "1"), "--guard-factor 1: 2 or more is required"),
        (("--guard-times", "-1"), "--guard-times -1: at least 0"),
    ],
)
def test_bad_input(job: Job, words: tuple[str, ...], said: str) -> None:
    assert job.run(["python", "x.py"], *words) == 78
    assert said in job.output
    assert not job.folder.exists()
