"""Amazon EC2: spot interruptions, rebalance recommendations and scheduled events, by IMDSv2.

Every request bears a token, which a PUT fetches for six hours. The PUT's answer has a hop limit of its own (1 by
default), so in a container that has its own network it never arrives: that is what ``hint`` says.
"""

from __future__ import annotations

import email.utils
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

from launch.notices.metadata import MetadataError, Reply, Service
from launch.notices.polling import Look, Trouble, poll
from supervisor.decide.notices import Notice
from supervisor.model import Effect
from supervisor.noticing import Standing

PERIOD: Final = 5.0  # seconds, as EC2's documentation advises
TOKEN_PATH: Final = "/latest/api/token"
TOKEN_SECONDS: Final = 21600
SPOT_PATH: Final = "/latest/meta-data/spot/instance-action"
REBALANCE_PATH: Final = "/latest/meta-data/events/recommendations/rebalance"
SCHEDULED_PATH: Final = "/latest/meta-data/events/maintenance/scheduled"
#: the codes of scheduled events that end what runs here; the others disturb the network or the power for a while
ENDING: Final = frozenset({"instance-stop", "instance-retirement", "instance-reboot", "system-reboot"})


def parse_spot(value: Any, skew: float) -> tuple[Notice, ...]:
    """From ``{"action": "stop", "time": "2026-11-25T08:22:00Z"}``. Raises ValueError, TypeError, KeyError."""
    action, end = str(value["action"]), datetime.fromisoformat(value["time"])
    return (
        Notice(
            source=f"AWS spot: {action}",
            key="spot",
            effect=Effect.STOP,
            deadline=_unix(end) + skew,
        ),
    )


def parse_rebalance(value: Any, _skew: float) -> tuple[Notice, ...]:
    """From ``{"noticeTime": "2026-11-25T08:22:00Z"}``: an interruption is more likely now. Raises as above."""
    _unix(datetime.fromisoformat(value["noticeTime"]))
    return (Notice(source="AWS rebalance recommendation", key="rebalance", effect=Effect.WARN),)


def parse_scheduled(value: Any, skew: float) -> tuple[Notice, ...]:
    """From the list of scheduled events; those that are over or canceled are no notices. Raises as above."""
    if not isinstance(value, list):
        raise TypeError("a list is required")
    return tuple(_scheduled(event, skew) for event in value if str(event.get("State", "active")) == "active")


def _scheduled(event: Any, skew: float) -> Notice:
    code = str(event["Code"])
    return Notice(
        source=f"AWS scheduled event: {code}",
        key=str(event["EventId"]),
        effect=Effect.LEAVE if code in ENDING else Effect.WARN,
        deadline=email.utils.parsedate_to_datetime(event["NotBefore"]).timestamp() + skew,
        revocable=True,
    )


def _unix(time: datetime) -> float:
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


_RESOURCES: Final[tuple[tuple[str, Callable[[Any, float], tuple[Notice, ...]]], ...]] = (
    (SPOT_PATH, parse_spot),
    (REBALANCE_PATH, parse_rebalance),
    (SCHEDULED_PATH, parse_scheduled),
)


class Aws:
    """A ``Source``."""

    name = "AWS"

    def __init__(self, service: Service, period: float = PERIOD) -> None:
        self._service, self._period = service, period
        self._token: str | None = None
        self._seen: dict[str, tuple[Notice, ...]] = {}

    async def watch(self, standing: Standing, say: Callable[[str], None]) -> None:
        """Until cancelled."""
        await poll(self.look, self._period, standing, Trouble(self.name, say, hint))

    async def acknowledge(self, notice: Notice) -> str | None:
        """EC2 waits for nobody."""
        return None

    async def look(self) -> Look:
        """All three resources; one that fails keeps what it said last."""
        problem = None
        for path, parse in _RESOURCES:
            try:
                reply = await self._get(path)
                self._seen[path] = () if reply.status == 404 else _parsed(parse, reply)
            except MetadataError as error:
                problem = problem or error
                if not error.status:
                    break  # it does not answer at all
        return Look(tuple(notice for path, _ in _RESOURCES for notice in self._seen.get(path, ())), problem)

    async def _get(self, path: str) -> Reply:
        for _ in range(2):
            if self._token is None:
                self._token = await self._fetch_token()
            reply = await self._service.ask(path, headers={"X-aws-ec2-metadata-token": self._token})
            if reply.status != 401:
                break
            self._token = None  # expired, or of the instance's life before a hibernation
        if reply.status not in (200, 404):
            raise reply.refused()
        return reply

    async def _fetch_token(self) -> str:
        try:
            reply = await self._service.ask(
                TOKEN_PATH, method="PUT", headers={"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
            )
        except MetadataError as error:
            raise MetadataError(f"no token: {error}") from None
        if reply.status != 200:
            raise reply.refused()
        return reply.text


def _parsed(parse: Callable[[Any, float], tuple[Notice, ...]], reply: Reply) -> tuple[Notice, ...]:
    value = reply.json()
    try:
        return parse(value, reply.skew)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise MetadataError(f"an answer of no known form: {reply.text[:60]!r}", reply.status) from None


def hint(problem: MetadataError) -> str:
    """What may be done about it."""
    if str(problem).startswith("no token: no answer"):
        return (
            "in a container the answer needs a hop more: "
            "aws ec2 modify-instance-metadata-options --http-put-response-hop-limit 2"
        )
    return "is the metadata service switched off?" if problem.status == 403 else ""
