"""Nodes that must leave a job on several: what is begun for them, called off again, and when they may go."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from supervisor.decide import membership
from supervisor.decide.membership import Size
from supervisor.decide.notices import Plan
from supervisor.edge import clock
from supervisor.fleet import Member
from supervisor.model import ProposalFlag
from supervisor.reshaping import Reshaping

STOP = ProposalFlag.STOP | ProposalFlag.CHECKPOINT


def member(name: str) -> Member:
    return Member(name=name, life="1")


class Lead:
    """What goes to the other nodes is put down in order."""

    def __init__(self, *names: str) -> None:
        self.done: list[Any] = []
        self.heard = False  # whether a rank has heard of the stop
        self.here = {name: member(name) for name in names}
        self.roster = Roster(self)
        self.rounds = SimpleNamespace(recall_stop=lambda: not self.heard)
        self.standby = SimpleNamespace(drop=lambda: None, arm=lambda: self.done.append("standby"))

    def want(self, flags: ProposalFlag) -> None:
        assert flags == STOP
        self.done.append("want")

    def stop(self, stop: None) -> None:
        self.done.append("go on")

    def stop_for(self, why: str) -> None:
        self.done.append(why)

    def release(self, members: list[Member], *, saved: bool) -> None:
        self.done.append(("free", *(one.name for one in members), saved))


class Roster:
    """The nodes that are there: two of them are part of the attempt, three in all."""

    own = member("h1")
    members = (member("h1"), member("h2"))
    leaving: frozenset[str] = frozenset()

    def __init__(self, lead: Lead) -> None:
        self._lead = lead

    def member(self, name: str) -> Member | None:
        return self._lead.here.get(name)

    def goes_on_without(self, names: set[str], *, others_lead: bool) -> bool:
        size = Size(least=2, most=2)
        return membership.goes_on_without(
            names, here=self._lead.here, size=size, leader="h1", others_lead=others_lead
        )


class Case:
    """A leader of two nodes, with a spare."""

    def __init__(self, *, others_lead: bool = True, in_session: bool = True, plan: Plan = Plan.SAVE) -> None:
        self.lead = Lead("h1", "h2", "h3")
        self.patience = 60.0
        self.stopping = SimpleNamespace(requested=None, afford=lambda _deadline: (self.patience, plan))
        self.said: list[str] = []
        self.attempt = SimpleNamespace(
            in_session=in_session, has_session=True, seats={0: SimpleNamespace(pid=os.getpid(), end=None)}, stopping=False,
            ended=SimpleNamespace(is_set=lambda: self.called_off), call_off=self._call_off,
        )  # fmt: skip
        self.called_off = False
        self.reshaping = Reshaping(
            self.lead, self.stopping, SimpleNamespace(say=self.said.append), others_lead=others_lead,  # type: ignore[arg-type]
        )  # fmt: skip
        self.reshaping.begin(self.attempt)  # type: ignore[arg-type]
        assert self.stopping.fellows is self.reshaping

    def _call_off(self) -> None:
        self.called_off = True


def test_all_save_and_a_node_may_go_once_that_is_durable() -> None:
    case = Case()
    assert case.reshaping.go_on_without("h2", "a cloud on h2", None)
    case.reshaping.look()
    assert case.lead.done == ["without h2 (a cloud on h2)", "want"], "once"
    assert case.attempt.stopping
    assert case.lead.roster.leaving == {"h2"}
    assert case.reshaping.takes_along
    case.reshaping.ended()
    assert not case.reshaping.let_go(saved=True)
    assert case.lead.done[2:] == [("free", "h2", True)]
    assert not case.reshaping.takes_along
    assert case.reshaping.keep("h2", "a cloud on h2") is False, "too late: it leaves"
    del case.lead.here["h2"]
    case.reshaping.look()
    assert case.lead.roster.leaving == set()


def test_too_few_would_stay() -> None:
    case = Case()
    assert case.reshaping.go_on_without("h2", "SIGTERM on h2", None)
    assert not case.reshaping.go_on_without("h3", "SIGTERM on h3", None)
    assert not Case(others_lead=False).reshaping.go_on_without("h1", "SIGTERM on h1", None)
    assert not case.reshaping.go_on_without("h9", "nobody's", None)


def test_a_spare_may_go_at_once_and_nobody_stops_for_it() -> None:
    case = Case()
    assert case.reshaping.go_on_without("h3", "a cloud on h3", None)
    assert case.lead.done == [("free", "h3", True)]
    assert not case.attempt.stopping


def test_two_notices_of_a_node_are_withdrawn_one_by_one() -> None:
    case = Case(in_session=False)
    assert case.reshaping.go_on_without("h2", "SIGTERM on h2", None)
    assert case.reshaping.go_on_without("h2", "a cloud on h2", clock.now() + 60)
    assert case.reshaping.reason == "SIGTERM on h2, a cloud on h2"
    assert case.reshaping.keep("h2", "a cloud on h2") is None, "the other one stands"
    assert case.reshaping.keep("h2", "a cloud on h2") is None
    assert case.reshaping.leaving == {"h2"}
    assert case.reshaping.keep("h2", "SIGTERM on h2") is True
    assert not case.reshaping.leaving


@pytest.mark.parametrize("heard", [False, True])
def test_what_no_rank_has_heard_of_is_called_off(heard: bool) -> None:
    case = Case()
    assert case.reshaping.go_on_without("h2", "a cloud on h2", None)
    case.lead.heard = heard
    assert case.reshaping.keep("h2", "a cloud on h2") is not heard
    assert case.lead.done[2:] == ([] if heard else ["go on", "standby"])
    assert case.attempt.stopping is heard
    assert case.reshaping.why == ("without h2 (a cloud on h2)" if heard else None)
    assert not case.lead.roster.leaving, "it is part of what comes then, in any case"


def test_nothing_is_waited_for_beyond_the_time_that_is_left() -> None:
    case = Case(in_session=False)
    case.patience = 0.0
    assert case.reshaping.go_on_without("h2", "a cloud on h2", clock.now())
    assert case.called_off
    assert case.reshaping.why == "without h2 (a cloud on h2)"
    short = Case(plan=Plan.DRAIN)
    assert short.reshaping.go_on_without("h2", "a cloud on h2", clock.now() + 30)
    assert short.called_off
    assert "too short for a new snapshot; the snapshot in memory is made durable" in short.said[0]
    waiting = Case(in_session=False)
    assert waiting.reshaping.go_on_without("h2", "a cloud on h2", None)
    assert not waiting.called_off, "its ranks restore: there is time to have them save"


def test_a_script_without_a_session_is_asked_when_half_of_the_time_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []
    monkeypatch.setattr("supervisor.edge.processes.send", lambda pids, signum: asked.extend([*pids, signum]))
    case = Case(in_session=False)
    case.attempt.has_session = False
    assert case.reshaping.go_on_without("h2", "a cloud on h2", None)
    assert asked == [], "it may open one yet"
    leaver = case.reshaping._leavers["h2"]
    case.reshaping._leavers["h2"] = replace(leaver, half=0.0)
    case.reshaping.look()
    case.reshaping.look()
    assert asked == [os.getpid(), signal.SIGTERM]
    assert case.lead.done == ["without h2 (a cloud on h2)"]
    assert case.attempt.stopping
    assert not case.called_off


def test_the_leader_goes_between_two_attempts() -> None:
    case = Case()
    assert case.reshaping.go_on_without("h1", "SIGTERM on h1", None)
    assert case.lead.done == ["without h1 (SIGTERM on h1)", "want"]
    assert case.reshaping.own_leave.is_set()
    case.reshaping.ended()
    assert case.reshaping.let_go(saved=True)
    assert len(case.lead.done) == 2, "nobody needs to let it go"


def test_once_the_whole_job_stops_nobody_is_done_without() -> None:
    case = Case(in_session=False)
    assert case.reshaping.go_on_without("h2", "SIGTERM on h2", None)
    case.stopping.requested = "a stop"
    case.attempt.in_session = True
    case.reshaping.look()
    assert case.lead.done == []
    assert case.reshaping.keep("h2", "SIGTERM on h2") is True
    assert case.lead.done == [], "the stop of the job is another matter"
