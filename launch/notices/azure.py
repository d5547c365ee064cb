"""Microsoft Azure: scheduled events that concern this machine, acknowledged once the job has saved and left.

Events for other machines of the same set are seen, too: ``Resources`` says whose they are. An event that is withdrawn
simply is not listed any more. Acknowledging one (a StartRequest) begins it at once for *all* of its machines, so only an
event that is for this machine alone is acknowledged.
"""

from __future__ import annotations

import email.utils
import json
from collections.abc import Callable
from typing import Any, Final

from launch.notices.metadata import MetadataError, Service
from launch.notices.polling import Look, Trouble, poll
from supervisor.decide.notices import Notice
from supervisor.model import Effect
from supervisor.noticing import Standing

PERIOD: Final = 1.0  # seconds, as Azure's documentation advises: evictions come half a minute ahead
FIRST: Final = 130.0  # seconds: the first request switches the service on, which takes up to two minutes
HEADERS: Final = {"Metadata": "true"}
NAME_PATH: Final = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
EVENTS_PATH: Final = "/metadata/scheduledevents?api-version=2020-07-01"
_EFFECTS: Final = {
    "Freeze": Effect.WARN,
    "Reboot": Effect.LEAVE,
    "Redeploy": Effect.LEAVE,
    "Terminate": Effect.LEAVE,
    "Preempt": Effect.STOP,
}


def parse(value: Any, machine: str, skew: float) -> tuple[Notice, ...]:
    """The events of a document that concern ``machine``. Raises ValueError, TypeError, KeyError, AttributeError."""
    mine = machine.lower()
    return tuple(
        _notice(event, skew)
        for event in value["Events"]
        if event["EventStatus"] in ("Scheduled", "Started")
        and mine in (str(name).lower() for name in event["Resources"])
    )


def alone(value: Any) -> frozenset[str]:
    """The ids of those events that wait to be begun and are for one machine only."""
    return frozenset(
        str(event["EventId"])
        for event in value["Events"]
        if event["EventStatus"] == "Scheduled" and len(event["Resources"]) == 1
    )


def _notice(event: Any, skew: float) -> Notice:
    kind, time = str(event["EventType"]), event.get("NotBefore")
    # a kind that is not known yet is taken for a warning
    effect = _EFFECTS.get(kind, Effect.WARN)
    if effect is Effect.LEAVE and (event["EventStatus"] == "Started" or not time):
        effect = Effect.STOP
    return Notice(
        source=f"Azure {kind}",
        key=str(event["EventId"]),
        effect=effect,
        deadline=email.utils.parsedate_to_datetime(time).timestamp() + skew if time else None,
        revocable=True,
    )


class Azure:
    """A ``Source``."""

    name = "Azure"

    def __init__(self, service: Service, period: float = PERIOD, first: float = FIRST) -> None:
        self._service, self._period = service, period
        self._machine: str | None = None
        self._patience: float | None = first
        self._seen: tuple[Notice, ...] = ()
        self._alone: frozenset[str] = frozenset()

    async def watch(self, standing: Standing, say: Callable[[str], None]) -> None:
        """Until cancelled."""
        await poll(self.look, self._period, standing, Trouble(self.name, say, lambda _problem: ""))

    async def look(self) -> Look:
        """The events as they are now; as they were, where the service fails."""
        try:
            if self._machine is None:
                self._machine = await self._name()
            reply = await self._service.ask(EVENTS_PATH, headers=HEADERS, patience=self._patience)
            if reply.status != 200:
                raise reply.refused()
            value = reply.json()
            try:
                self._seen, self._alone = parse(value, self._machine, reply.skew), alone(value)
            except (ValueError, TypeError, KeyError, AttributeError):
                raise MetadataError(f"an answer of no known form: {reply.text[:60]!r}", 200) from None
        except MetadataError as error:
            return Look(self._seen, error)
        self._patience = None
        return Look(self._seen)

    async def acknowledge(self, notice: Notice) -> str | None:
        """Have the event begin now."""
        if notice.key not in self._alone:
            return None
        body = json.dumps({"StartRequests": [{"EventId": notice.key}]}).encode()
        headers = {**HEADERS, "Content-Type": "application/json"}
        try:
            reply = await self._service.ask(EVENTS_PATH, method="POST", headers=headers, body=body)
        except MetadataError as error:
            return f"{notice.source} could not be acknowledged: {error}"
        if reply.status != 200:
            return f"{notice.source} could not be acknowledged: {reply.refused()}"
        return f"{notice.source} acknowledged: the machine may go"

    async def _name(self) -> str:
        reply = await self._service.ask(NAME_PATH, headers=HEADERS)
        if reply.status != 200:
            raise reply.refused()
        return reply.text
