"""What is worth telling somebody who is not looking: events of a job, who wants which, and what each says.

An event follows from a verdict and from nothing else, so a run tells each once. A failed attempt is a ``failure``; if it was the
last one, ``gave-up`` follows.
"""

from __future__ import annotations

import enum
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from supervisor.errors import ConfigError
from supervisor.model import Action, Decided, StopCause
from supervisor.record import JobRecord

FORMS: Final = "COMMAND [ARGUMENT …] or http(s)://…, with EVENT,EVENT= in front for some events only"
_EVENTS: Final = re.compile(r"([a-z][a-z_-]*(?:,[a-z][a-z_-]*)*)=(.*)", re.DOTALL)
_URL: Final = re.compile(r"https?://[^/\s]+\S*")


class Event(enum.StrEnum):
    """What a hook can be told of."""

    FAILURE = "failure"  # an attempt failed
    PREEMPTED = "preempted"  # state saved, to be run again
    STOPPED = "stopped"  # by its user
    COMPLETED = "completed"
    GAVE_UP = "gave-up"


@dataclass(frozen=True, kw_only=True)
class Hook:
    """A command (words, no shell) or a URL that some events are told to."""

    events: tuple[Event, ...] = tuple(Event)
    argv: tuple[str, ...] = ()
    url: str | None = None

    @classmethod
    def parse(cls, text: str) -> Hook:
        """From ``[EVENT,EVENT=]COMMAND …`` or ``[EVENT,EVENT=]URL``. Raises ConfigError."""
        found = _EVENTS.fullmatch(text.strip())
        events = tuple(Event) if found is None else _events(found[1].split(","))
        rest = (text if found is None else found[2]).strip()
        if "://" in rest.split(" ")[0]:
            return cls(events=events, url=_url(rest))
        try:
            argv = tuple(shlex.split(rest))
        except ValueError as error:
            raise ConfigError(f"{text!r}: {error}; allowed: {FORMS}") from None
        if not argv:
            raise ConfigError(f"{text!r} is no hook; allowed: {FORMS}")
        return cls(events=events, argv=argv)

    @classmethod
    def of(cls, plain: object) -> Hook:
        """From a text, or from a mapping with ``run`` (a list of words) or ``post`` (a URL), and ``on`` (events)."""
        if isinstance(plain, str):
            return cls.parse(plain)
        if not isinstance(plain, dict) or not plain.keys() <= {
            True,
            "on",
            "run",
            "post",
        }:  # YAML reads on as true
            raise ConfigError(f"{plain!r} is no hook; allowed: a text, or a mapping of on, and run or post")
        on, run, post = plain.get("on", plain.get(True)), plain.get("run"), plain.get("post")
        events = tuple(Event) if on is None else _events([on] if isinstance(on, str) else on)
        if isinstance(post, str) and run is None:
            return cls(events=events, url=_url(post))
        if isinstance(run, list) and run and all(isinstance(word, str) for word in run) and post is None:
            return cls(events=events, argv=tuple(run))
        raise ConfigError(
            f"{plain!r} is no hook: run is a list of words, post is a URL, and there is one of them"
        )

    def __str__(self) -> str:
        """For people and journals: a URL's path and query, where tokens are, are left out."""
        what = (
            shlex.join(self.argv)
            if self.url is None
            else re.sub(r"(https?://)(?:[^/@\s]*@)?([^/?\s]+).*", r"\1\2/…", self.url)
        )
        return what if self.events == tuple(Event) else f"{','.join(self.events)}={what}"


def _events(names: object) -> tuple[Event, ...]:
    if not isinstance(names, list) or not names:
        raise ConfigError(f"{names!r}: a list of events; allowed: {', '.join(Event)}")
    words = [str(name).replace("_", "-") for name in names]
    for name in words:
        if name not in set(Event):
            raise ConfigError(f"unknown event {name!r}; allowed: {', '.join(Event)}")
    return tuple(event for event in Event if event in words)


def _url(text: str) -> str:
    if not _URL.fullmatch(text):
        raise ConfigError(f"{text!r} is no address of a webhook; allowed: http://… and https://…")
    return text


def hooks(value: object) -> tuple[Hook, ...]:
    """One hook or a list of them. Raises ConfigError."""
    return tuple(Hook.of(one) for one in (value if isinstance(value, list | tuple) else [value]))


def events(record: JobRecord, verdict: Decided) -> list[Event]:
    """What a verdict is to be told as; ``record``: the job after it."""
    failure = record.last_failure
    found = (
        [Event.FAILURE]
        if failure is not None and failure.attempt == verdict.attempt and record.stop is None
        else []
    )
    match verdict.action:
        case Action.COMPLETE:
            found.append(Event.COMPLETED)
        case Action.GIVE_UP:
            found.append(Event.GAVE_UP)
        case Action.STOP:
            by_user = record.stop is not None and record.stop.cause is StopCause.USER
            found.append(Event.STOPPED if by_user else Event.PREEMPTED)
    return found


def message(event: Event, record: JobRecord, verdict: Decided, about: Mapping[str, object]) -> dict[str, Any]:
    """What a hook is told, as JSON has it. ``about``: what names the job. Times are Unix seconds."""
    failure, point = record.last_failure, record.checkpoint
    failed = (
        event in (Event.FAILURE, Event.GAVE_UP) and failure is not None and failure.attempt == verdict.attempt
    )
    return {
        "event": event.value,
        "time": verdict.time,
        **about,
        "attempt": verdict.attempt,
        "step": record.step,
        "total_steps": record.total_steps,
        "action": verdict.action.value,
        "reason": verdict.reason,
        "failure": {**asdict(failure), "kind": failure.kind.value}
        if failed and failure is not None
        else None,
        "checkpoint": None if point is None else {"step": point.step, "time": point.time, "path": point.path},
        "restarts": record.restarts,
        "preemptions": record.preemptions,
        "goodput": round(record.spent.goodput, 6),
    }
