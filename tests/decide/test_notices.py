"""What notices ask for, and what can still be saved before a deadline."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.decide import notices
from supervisor.decide.notices import SAFETY, SAME, TEARDOWN, Means, Notice, Plan
from supervisor.model import Effect

SPOT = Notice(source="spot", key="spot", effect=Effect.STOP, deadline=120.0)
REBOOT = Notice(source="reboot", key="e1", effect=Effect.LEAVE, deadline=600.0, revocable=True)
FREEZE = Notice(source="freeze", key="e2", effect=Effect.WARN, deadline=60.0)


@pytest.mark.parametrize(
    ("known", "standing", "news", "withdrawn"),
    [
        ((), (), (), ()),
        ((), (SPOT,), (SPOT,), ()),
        ((SPOT,), (SPOT,), (), ()),
        ((REBOOT,), (), (), (REBOOT,)),
        ((REBOOT, FREEZE), (FREEZE, SPOT), (SPOT,), (REBOOT,)),
        ((REBOOT,), (replace(REBOOT, deadline=600.0 + SAME),), (), ()),
        ((REBOOT,), (replace(REBOOT, deadline=590.0),), (replace(REBOOT, deadline=590.0),), ()),
        ((REBOOT,), (replace(REBOOT, deadline=None),), (replace(REBOOT, deadline=None),), ()),
        ((REBOOT,), (replace(REBOOT, effect=Effect.STOP),), (replace(REBOOT, effect=Effect.STOP),), ()),
    ],
)
def test_what_has_changed(
    known: tuple[Notice, ...],
    standing: tuple[Notice, ...],
    news: tuple[Notice, ...],
    withdrawn: tuple[Notice, ...],
) -> None:
    change = notices.compare(known, standing)
    assert (change.news, change.withdrawn) == (news, withdrawn)


def test_the_nearest_end_counts_and_warnings_have_none() -> None:
    assert notices.deadline((REBOOT, SPOT, FREEZE)) == notices.Deadline(source="spot", end=120.0, kill=120.0)
    assert notices.deadline((FREEZE,)) is notices.deadline(()) is None
    assert notices.urgent((FREEZE, REBOOT)) is None
    assert notices.urgent((FREEZE, REBOOT, SPOT)) is SPOT


@pytest.mark.parametrize(
    ("notice", "began", "effect"),
    [
        (SPOT, 119.0, Effect.STOP),
        (SPOT, 120.0, Effect.WARN),
        (REBOOT, 700.0, Effect.WARN),
        (FREEZE, 700.0, Effect.WARN),
        (replace(REBOOT, deadline=None, effect=Effect.STOP), 1e9, Effect.STOP),
    ],
)
def test_what_was_over_before_the_run_began_does_not_stop_it(
    notice: Notice, began: float, effect: Effect
) -> None:
    assert notices.as_of(notice, began).effect is effect


#: a step of 1 s, a snapshot of 1 s, a checkpoint of 20 s: 1 + 1.25 × 22 = 28.5 s for a new one, 26 for the old one
MEASURED = Means(step=1.0, copy=1.0, drain=20.0)


@pytest.mark.parametrize(
    ("left", "means", "plan"),
    [
        (None, MEASURED, Plan.SAVE),
        (1.0, Means(), Plan.SAVE),  # nothing is known that speaks against it
        (28.5, MEASURED, Plan.SAVE),
        (28.0, replace(MEASURED, unsaved=True), Plan.DRAIN),
        (26.0, replace(MEASURED, unsaved=True), Plan.DRAIN),
        # nothing fits: what needs least is tried
        (25.0, replace(MEASURED, unsaved=True), Plan.DRAIN),
        (5.0, MEASURED, Plan.SAVE),
        # a drain under way comes first: its rest is on top
        (60.0, replace(MEASURED, under_way=5.0), Plan.SAVE),
        (30.0, replace(MEASURED, under_way=5.0, unsaved=True), Plan.FINISH),
        (46.0, replace(MEASURED, under_way=5.0, unsaved=True), Plan.DRAIN),
        (3.0, replace(MEASURED, under_way=19.0, unsaved=True), Plan.FINISH),
        (1.0, replace(MEASURED, under_way=0.0), Plan.FINISH),
        (
            30.0,
            replace(MEASURED, under_way=500.0),
            Plan.SAVE,
        ),  # it takes longer than the last one: any moment now
    ],
)
def test_the_newest_state_that_can_be_saved(left: float | None, means: Means, plan: Plan) -> None:
    assert notices.plan(left, means) is plan


seconds = st.floats(0, 1000)


@given(
    left=seconds,
    step=seconds,
    copy=seconds,
    drain=seconds,
    under_way=st.none() | seconds,
    unsaved=st.booleans(),
)
def test_a_plan_that_fits_is_kept_to_and_more_time_never_saves_less(
    left: float, step: float, copy: float, drain: float, under_way: float | None, unsaved: bool
) -> None:
    means = Means(step=step, copy=copy, drain=drain, under_way=under_way, unsaved=unsaved)
    plan = notices.plan(left, means)
    assert plan is not Plan.DRAIN or unsaved
    assert plan is not Plan.FINISH or under_way is not None
    if TEARDOWN + SAFETY * (step + copy + drain * (1 if under_way is None else 2)) <= left:
        assert plan is Plan.SAVE
    if TEARDOWN + SAFETY * drain <= left and under_way is not None:
        # something fits, so what is chosen does, and nothing newer would have
        order = list(Plan)
        assert order.index(notices.plan(left * 2, means)) <= order.index(plan)
