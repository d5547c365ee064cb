"""Each source against its cloud's emulator: what it sees, and what it makes of a service that fails in every way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import pytest

from launch.notices import metadata
from launch.notices.aws import Aws, hint
from launch.notices.azure import Azure
from launch.notices.gcp import Gcp
from launch.notices.metadata import MetadataError, Service
from launch.notices.polling import Look, Trouble
from supervisor.decide.notices import Notice
from supervisor.edge import clock
from tests.notices.emulators import AwsEmulator, AzureEmulator, Emulator, GcpEmulator

E = TypeVar("E", bound=Emulator)
BROKEN = [403, 429, 500, 503, "garbage", "cut", "close", "hang", "drip"]


@pytest.fixture
def aws() -> Iterator[AwsEmulator]:
    yield from serving(AwsEmulator())


@pytest.fixture
def gcp() -> Iterator[GcpEmulator]:
    yield from serving(GcpEmulator())


@pytest.fixture
def azure() -> Iterator[AzureEmulator]:
    yield from serving(AzureEmulator())


def serving(emulator: E) -> Iterator[E]:
    with emulator.serving():
        yield emulator


def sources(notices: tuple[Notice, ...]) -> list[str]:
    return [notice.source for notice in notices]


async def until(
    watch: Callable[..., Awaitable[None]], steps: list[tuple[list[str], Callable[[], None]]]
) -> list[str]:
    """Watch until the notices that stand are those of each step in turn, doing the step's deed then; returns what was said."""
    reached, said = asyncio.Event(), list[str]()

    def standing(notices: tuple[Notice, ...]) -> None:
        if steps and sources(notices) == steps[0][0]:
            steps.pop(0)[1]()
            if not steps:
                reached.set()

    task = asyncio.ensure_future(watch(standing, said.append))
    await asyncio.wait(
        {task, asyncio.ensure_future(reached.wait())}, timeout=60, return_when="FIRST_COMPLETED"
    )
    assert not steps, f"not reached: {steps}, said: {said}"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return said


def nothing() -> None:
    return None


# ------------------------------------------------------------------ AWS


def test_aws_from_nothing_to_an_interruption(aws: AwsEmulator) -> None:
    def recommend() -> None:
        aws.rebalance = True

    asyncio.run(
        until(
            Aws(Service(aws.url), period=0.01).watch,
            [
                ([], recommend),
                (["AWS rebalance recommendation"], aws.interrupt),
                (["AWS spot: terminate", "AWS rebalance recommendation"], nothing),
            ],
        )
    )
    assert len(aws.tokens) == 1, "one token for all requests"


def test_aws_scheduled_events_come_and_are_canceled(aws: AwsEmulator) -> None:
    aws.schedule("system-reboot", 3600)
    event = "AWS scheduled event: system-reboot"
    steps = [([event], lambda: aws.schedule("system-reboot", 3600, "canceled")), ([], nothing)]
    asyncio.run(until(Aws(Service(aws.url), period=0.01).watch, steps))


def test_aws_an_expired_token_is_fetched_anew(aws: AwsEmulator) -> None:
    async def looks() -> Look:
        source = Aws(Service(aws.url))
        assert (await source.look()).problem is None
        aws.tokens.clear()
        aws.tokens.add("another's")
        aws.interrupt()
        return await source.look()

    look = asyncio.run(looks())
    assert look.problem is None
    assert sources(look.notices) == ["AWS spot: terminate"]


def test_aws_whose_tokens_never_hold(aws: AwsEmulator) -> None:
    async def looks() -> Look:
        source = Aws(Service(aws.url))
        await source.look()
        aws.faults.extend([401] * 20)
        return await source.look()

    problem = asyncio.run(looks()).problem
    assert problem is not None
    assert problem.status == 401


@pytest.mark.parametrize("skew", [-3600.0, 0.0, 3600.0])
def test_aws_deadline_is_by_our_clock(aws: AwsEmulator, skew: float) -> None:
    aws.skew = skew
    aws.interrupt("stop", 120)
    look = asyncio.run(Aws(Service(aws.url)).look())
    assert look.notices[0].deadline == pytest.approx(clock.now() + 120, abs=30)


@pytest.mark.parametrize(
    ("message", "status", "said"),
    [("no token: no answer within 5 s", 0, "hop-limit 2"), ("HTTP status 403", 403, "switched off"), ("HTTP status 500", 500, "")],
)  # fmt: skip
def test_aws_says_what_may_be_done(message: str, status: int, said: str) -> None:
    assert said in hint(MetadataError(message, status))


# ------------------------------------------------------------------ GCP


def test_gcp_long_polls_are_armed_again(gcp: GcpEmulator) -> None:
    asyncio.run(
        until(
            Gcp(Service(gcp.url), warning=60).watch,
            [
                ([], lambda: gcp.set("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE")),
                (["GCP live migration"], lambda: gcp.set("maintenance-event", "NONE")),
                ([], lambda: gcp.set("preempted", "TRUE")),
                (["GCP preemption"], nothing),
            ],
        )
    )
    waiting = [asked for asked in gcp.asked if "wait_for_change" in asked.query]
    assert waiting
    assert all(asked.query["last_etag"] for asked in waiting)
    assert all(asked.headers["metadata-flavor"] == "Google" for asked in gcp.asked)


def test_gcp_nothing_new_within_the_wait_keeps_the_notice(gcp: GcpEmulator) -> None:
    async def looks() -> tuple[object, object, float | None, float | None]:
        source = Gcp(Service(gcp.url), wait=0, warning=60)
        gcp.set("preempted", "TRUE")
        first = await source.look("preempted", None)
        before = source.notices[0].deadline
        again = await source.look("preempted", first)
        return first, again, before, source.notices[0].deadline

    first, again, before, after = asyncio.run(looks())
    assert first == again
    assert before == after, "it was first seen then"


def test_gcp_somebody_elses_service_is_not_believed(aws: AwsEmulator, gcp: GcpEmulator) -> None:
    async def look(url: str) -> None:
        await Gcp(Service(url)).look("preempted", None)

    with pytest.raises(MetadataError, match="401"):
        asyncio.run(look(aws.url))


# ------------------------------------------------------------------ Azure


def test_azure_an_eviction_for_this_machine_and_its_withdrawal(azure: AzureEmulator) -> None:
    azure.schedule("Preempt", 30, resources=("trainer_1",))

    def withdraw() -> None:
        azure.events = []

    steps = [
        ([], lambda: azure.schedule("Preempt", 30, resources=("trainer_1", "trainer_0"))),
        (["Azure Preempt"], withdraw),
        ([], nothing),
    ]
    asyncio.run(until(Azure(Service(azure.url), period=0.01).watch, steps))


def test_azure_is_acknowledged_where_nobody_else_is_concerned(azure: AzureEmulator) -> None:
    async def acknowledged(resources: tuple[str, ...]) -> str | None:
        azure.schedule("Preempt", 30, resources=resources)
        source = Azure(Service(azure.url))
        look = await source.look()
        assert look.problem is None
        return await source.acknowledge(look.notices[0])

    assert asyncio.run(acknowledged(("trainer_0", "trainer_1"))) is None
    assert azure.started == []
    assert asyncio.run(acknowledged(("trainer_0",))) == "Azure Preempt acknowledged: the machine may go"
    assert azure.started == [azure.events[0]["EventId"]]


@pytest.mark.parametrize("fault", [503, "close"])
def test_azure_that_does_not_take_the_acknowledgement(azure: AzureEmulator, fault: int | str) -> None:
    async def acknowledged() -> str | None:
        azure.schedule("Preempt", 30)
        source = Azure(Service(azure.url))
        notice = (await source.look()).notices[0]
        azure.faults.append(fault)
        return await source.acknowledge(notice)

    assert "Azure Preempt could not be acknowledged: " in (asyncio.run(acknowledged()) or "")


def test_azure_deadline_is_by_our_clock(azure: AzureEmulator) -> None:
    azure.skew = -900
    azure.schedule("Reboot", 600)
    look = asyncio.run(Azure(Service(azure.url)).look())
    assert look.notices[0].deadline == pytest.approx(clock.now() + 600, abs=30)


# ------------------------------------------------------------------ whatever goes wrong


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("cloud", ["aws", "gcp", "azure"])
def test_a_broken_service_takes_nothing_back_and_is_heard_again(
    request: pytest.FixtureRequest, cloud: str, fault: int | str
) -> None:
    emulator = request.getfixturevalue(cloud)
    # whoever never answers is not waited for as long as it could take
    service = Service(emulator.url, patience=0.3 if fault in ("hang", "drip") else 30.0)

    async def looks() -> None:
        look = looker(emulator, service)
        before = await look()
        assert (before.problem, len(before.notices)) == (None, 1)
        emulator.faults.append(fault)
        broken = await look()
        assert broken.problem is not None
        assert broken.notices == before.notices, "it still stands"
        after = await look()
        assert (after.problem, after.notices) == (None, before.notices)

    asyncio.run(looks())


def looker(emulator: Emulator, service: Service) -> Callable[[], Awaitable[Look]]:
    """A look at a service that has given notice."""
    if isinstance(emulator, AwsEmulator):
        emulator.interrupt()
        return Aws(service).look
    if isinstance(emulator, AzureEmulator):
        emulator.schedule("Preempt", 30)
        return Azure(service, first=service.patience).look
    assert isinstance(emulator, GcpEmulator)
    emulator.set("preempted", "TRUE")
    source = Gcp(service, wait=0, warning=60)

    async def look() -> Look:
        try:
            await source.look("preempted", None)
        except MetadataError as problem:
            return Look(source.notices, problem)
        return Look(source.notices)

    return look


def test_nobody_there() -> None:
    look = asyncio.run(Aws(Service("http://127.0.0.1:9")).look())
    assert (look.notices, look.problem is not None) == ((), True)


def test_a_body_without_a_length_ends_with_the_connection() -> None:
    async def asked() -> metadata.Reply:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nTRUE\r\n0\r\n\r\n")
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            return await Service(f"http://127.0.0.1:{port}").ask("/", headers={})

    assert asyncio.run(asked()).text == "TRUE"


def test_failures_in_a_row_are_said_once_and_waited_for_longer() -> None:
    said: list[str] = []
    trouble = Trouble("AWS", said.append, lambda problem: "try this")
    waits = [trouble.failed(MetadataError("no answer")) for _ in range(8)]
    assert waits == [1, 2, 4, 8, 10, 10, 10, 10]
    assert said == ["AWS: notices cannot be seen (no answer); try this; asking on"]
    assert trouble.failed(MetadataError("busy", 429, retry_after=45)) == 45
    assert trouble.failed(MetadataError("busy", 429, retry_after=1e9)) == 60
    trouble.over()
    assert said[1:] == ["AWS: notices are seen again"]
    trouble.failed(MetadataError("no answer"))
    trouble.over()
    assert len(said) == 2
