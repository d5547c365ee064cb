"""Google Compute Engine: preemption and host maintenance, by two requests that wait for a change and are asked anew.

A machine without GPUs is told of its maintenance a minute ahead, one with GPUs an hour. That word comes only to machines
that have asked for the key since the last time, which the first request does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Final
from urllib.parse import quote

from launch.notices.metadata import MetadataError, Service
from launch.notices.polling import Trouble
from supervisor.decide.notices import Notice
from supervisor.edge import clock
from supervisor.model import Effect
from supervisor.noticing import Standing

ROOT: Final = "/computeMetadata/v1/instance/"
FLAVOR: Final = {"Metadata-Flavor": "Google"}
PREEMPTED, MAINTENANCE = "preempted", "maintenance-event"
WAIT: Final = 60  # seconds that the service may keep one request
PREEMPTION: Final = 30.0  # seconds from the notice to the end
WARNING, GPU_WARNING = 60.0, 3600.0  # seconds from the notice to the maintenance
_NO_FASTER: Final = 1.0  # seconds, for a service that does not wait


def parse(key: str, value: str, since: float, warning: float = WARNING) -> tuple[Notice, ...]:
    """What a key's value means that was first seen at ``since``. Raises MetadataError for a value that is unknown."""
    match key, value:
        case ("preempted", "FALSE") | ("maintenance-event", "NONE"):
            return ()
        case "preempted", "TRUE":
            return (
                Notice(
                    source="GCP preemption",
                    key=key,
                    effect=Effect.STOP,
                    deadline=since + PREEMPTION,
                ),
            )
        case "maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE":
            return (
                Notice(source="GCP live migration", key=key, effect=Effect.WARN, deadline=since + warning, revocable=True),
            )  # fmt: skip
        case "maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE":
            return (
                Notice(source="GCP host maintenance", key=key, effect=Effect.LEAVE, deadline=since + warning, revocable=True),
            )  # fmt: skip
    raise MetadataError(f"{key} has the value {value[:60]!r}", 200)


class Gcp:
    """A ``Source``."""

    name = "GCP"

    def __init__(self, service: Service, wait: int = WAIT, warning: float | None = None) -> None:
        self._service, self._wait = service, wait
        self._warning = warning if warning is not None else warning_time()
        self._values: dict[str, tuple[str, float]] = {}  # what each key says, and since when
        self._notices: dict[str, tuple[Notice, ...]] = {}

    async def watch(self, standing: Standing, say: Callable[[str], None]) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            for key in (PREEMPTED, MAINTENANCE):
                trouble = Trouble(f"{self.name} ({key})", say, lambda _problem: "")
                group.create_task(self._follow(key, standing, trouble))

    @property
    def notices(self) -> tuple[Notice, ...]:
        """Those that stand, as far as is known."""
        return tuple(notice for notices in self._notices.values() for notice in notices)

    async def acknowledge(self, notice: Notice) -> str | None:
        """Google waits for nobody."""
        return None

    async def _follow(self, key: str, standing: Standing, trouble: Trouble) -> None:
        etag: str | None = None
        while True:
            asked = clock.monotonic()
            try:
                before, etag = etag, await self.look(key, etag)
            except MetadataError as problem:
                etag = None  # whatever has changed meanwhile is answered at once
                await asyncio.sleep(trouble.failed(problem))
                continue
            trouble.over()
            standing(self.notices)
            if etag == before or etag is None:
                await asyncio.sleep(max(0.0, asked + _NO_FASTER - clock.monotonic()))

    async def look(self, key: str, etag: str | None) -> str | None:
        """The key's value, after a change if ``etag`` says what is known; returns its own. Raises MetadataError."""
        path, patience = ROOT + key, self._service.patience
        if etag is not None:
            path += f"?wait_for_change=true&timeout_sec={self._wait}&last_etag={quote(etag)}"
            patience += self._wait
        reply = await self._service.ask(path, headers=FLAVOR, patience=patience)
        if reply.status != 200:
            raise reply.refused()
        if reply.headers.get("metadata-flavor") != "Google":
            raise MetadataError("it is not Google's", reply.status)
        value, since = self._values.get(key, (None, 0.0))
        if reply.text != value:
            since = clock.now()
        self._notices[key] = parse(key, reply.text, since, self._warning)
        self._values[key] = reply.text, since
        return reply.headers.get("etag")


def warning_time() -> float:
    """How long before its maintenance this machine is told."""
    return GPU_WARNING if Path("/proc/driver/nvidia").exists() else WARNING
