"""One cause for an attempt that has ended on several nodes."""

from __future__ import annotations

import pytest

from supervisor.decide.causes import Departed, first_cause, unfinished
from supervisor.fleet import Ended
from supervisor.model import Failure, FailureKind


def failed(node: str, kind: FailureKind, noticed: float) -> Departed:
    failure = Failure(kind=kind, reason=f"{kind} there", attempt=3, time=noticed + 1)
    return Departed(name=node, ended=Ended(failure=failure, noticed=noticed))


WELL = Departed(name="well", ended=Ended(finished=True))
LOST = Departed(name="lost", ended=None)


@pytest.mark.parametrize(
    ("departed", "kind", "node"),
    [
        ([WELL, failed("b", FailureKind.CRASH, 5.0)], FailureKind.CRASH, "b"),
        # whoever lost its peer noticed first, and yet is an echo
        (
            [failed("a", FailureKind.COMMUNICATION, 4.0), failed("b", FailureKind.CRASH, 5.0)],
            FailureKind.CRASH,
            "b",
        ),
        ([failed("a", FailureKind.COMMUNICATION, 4.0), LOST], FailureKind.NODE_LOST, "lost"),
        ([LOST, failed("a", FailureKind.EXCEPTION, 4.0)], FailureKind.EXCEPTION, "a"),
        # ranks that hang wait for one that has died
        (
            [failed("a", FailureKind.HANG, 4.0), failed("b", FailureKind.HOST_OOM, 9.0)],
            FailureKind.HOST_OOM,
            "b",
        ),
        (
            [failed("a", FailureKind.COMMUNICATION, 4.0), failed("b", FailureKind.COMMUNICATION, 3.0)],
            FailureKind.COMMUNICATION,
            "b",
        ),
    ],
)
def test_the_first_cause(departed: list[Departed], kind: FailureKind, node: str) -> None:
    cause = first_cause(departed, attempt=3, lease=5.0, now=100.0)
    assert cause.failure is not None
    assert (cause.failure.kind, cause.node) == (kind, node)
    assert node in cause.failure.reason
    noticed = [
        one.ended.noticed for one in departed if one.ended is not None and one.ended.noticed is not None
    ]
    assert cause.noticed == min([*noticed, 100.0])


def test_no_cause() -> None:
    assert first_cause([WELL, WELL], attempt=3, lease=5.0, now=100.0).failure is None
    assert unfinished([WELL], attempt=3, now=100.0) is None
    left = unfinished([WELL, Departed(name="x", ended=Ended())], attempt=3, now=100.0)
    assert left is not None
    assert "x has left" in left.reason
