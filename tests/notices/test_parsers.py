"""What each cloud says, as its documentation has it, and what it means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch.notices import aws, azure, found, gcp
from launch.notices.metadata import MetadataError, Service
from supervisor.decide.notices import Notice
from supervisor.errors import ConfigError
from supervisor.model import Effect

NOON = 1_795_694_400.0  # 2026-11-26 12:00:00 UTC


def short(notices: tuple[Notice, ...]) -> list[tuple[str, Effect, float | None, bool]]:
    return [(n.source, n.effect, n.deadline, n.revocable) for n in notices]


@pytest.mark.parametrize(
    ("value", "source", "deadline"),
    [
        ({"action": "terminate", "time": "2026-11-26T12:00:00Z"}, "AWS spot: terminate", NOON),
        ({"action": "stop", "time": "2026-11-26T12:00:00Z"}, "AWS spot: stop", NOON),
        ({"action": "hibernate", "time": "2026-11-26T14:00:00+02:00"}, "AWS spot: hibernate", NOON),
        ({"action": "stop", "time": "2026-11-26T12:00:00"}, "AWS spot: stop", NOON),
    ],
)
def test_aws_spot(value: Any, source: str, deadline: float) -> None:
    assert short(aws.parse_spot(value, 0)) == [(source, Effect.STOP, deadline, False)]
    assert aws.parse_spot(value, 100)[0].deadline == deadline + 100, "by our clock, which is ahead"


def test_aws_rebalance_is_a_warning() -> None:
    value = {"noticeTime": "2026-11-26T12:00:00Z"}
    assert short(aws.parse_rebalance(value, 0)) == [
        ("AWS rebalance recommendation", Effect.WARN, None, False)
    ]


@pytest.mark.parametrize(
    ("code", "state", "effect"),
    [
        ("instance-stop", "active", Effect.LEAVE),
        ("instance-retirement", "active", Effect.LEAVE),
        ("instance-reboot", "active", Effect.LEAVE),
        ("system-reboot", "active", Effect.LEAVE),
        ("system-maintenance", "active", Effect.WARN),
        ("system-reboot", "canceled", None),
        ("system-reboot", "completed", None),
    ],
)
def test_aws_scheduled_events(code: str, state: str, effect: Effect | None) -> None:
    event = {
        "NotBefore": "26 Nov 2026 12:00:00 GMT", "NotAfter": "26 Nov 2026 14:00:00 GMT", "Code": code,
        "Description": "scheduled reboot", "EventId": "instance-event-0d59937288b749b32", "State": state,
    }  # fmt: skip
    expected = [] if effect is None else [(f"AWS scheduled event: {code}", effect, NOON, True)]
    assert short(aws.parse_scheduled([event], 0)) == expected


@pytest.mark.parametrize(
    "value", [{}, {"action": "stop"}, {"action": "stop", "time": "soon"}, [], None, "stop", {"time": 7}]
)
def test_what_aws_would_not_say(value: Any) -> None:
    for parse in (aws.parse_spot, aws.parse_rebalance):
        with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
            parse(value, 0)
    for event in ([value], value):
        if event != []:
            with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
                aws.parse_scheduled(event, 0)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("preempted", "FALSE", []),
        ("maintenance-event", "NONE", []),
        ("preempted", "TRUE", [("GCP preemption", Effect.STOP, NOON + 30, False)]),
        ("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE", [("GCP live migration", Effect.WARN, NOON + 60, True)]),
        ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE", [("GCP host maintenance", Effect.LEAVE, NOON + 60, True)]),
    ],
)  # fmt: skip
def test_gcp(key: str, value: str, expected: list[object]) -> None:
    assert short(gcp.parse(key, value, NOON)) == expected


def test_gcp_gives_machines_with_gpus_an_hour() -> None:
    notice = gcp.parse("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE", NOON, gcp.GPU_WARNING)[0]
    assert notice.deadline == NOON + 3600


@pytest.mark.parametrize(
    ("key", "value"), [("preempted", "MAYBE"), ("preempted", ""), ("maintenance-event", "TRUE")]
)
def test_what_gcp_would_not_say(key: str, value: str) -> None:
    with pytest.raises(MetadataError, match=key):
        gcp.parse(key, value, NOON)


def event(kind: str, **changes: object) -> dict[str, object]:
    return {
        "EventId": "E1", "EventStatus": "Scheduled", "EventType": kind, "ResourceType": "VirtualMachine",
        "Resources": ["FrontEnd_IN_0"], "NotBefore": "Thu, 26 Nov 2026 12:00:00 GMT", **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (event("Preempt"), ("Azure Preempt", Effect.STOP, NOON, True)),
        (event("Terminate"), ("Azure Terminate", Effect.LEAVE, NOON, True)),
        (event("Reboot"), ("Azure Reboot", Effect.LEAVE, NOON, True)),
        (event("Redeploy"), ("Azure Redeploy", Effect.LEAVE, NOON, True)),
        (event("Redeploy", EventStatus="Started", NotBefore=""), ("Azure Redeploy", Effect.STOP, None, True)),
        (event("Freeze"), ("Azure Freeze", Effect.WARN, NOON, True)),
        (event("Levitate"), ("Azure Levitate", Effect.WARN, NOON, True)),
        (event("Preempt", Resources=["other"]), None),
        (event("Preempt", Resources=["other", "frontend_in_0"]), ("Azure Preempt", Effect.STOP, NOON, True)),
        (event("Preempt", EventStatus="Canceled"), None),
        (event("Preempt", EventStatus="Completed"), None),
    ],
)
def test_azure(one: dict[str, object], expected: tuple[object, ...] | None) -> None:
    document = {"DocumentIncarnation": 1, "Events": [one]}
    assert short(azure.parse(document, "FrontEnd_IN_0", 0)) == ([] if expected is None else [expected])


def test_azure_events_for_others_too_are_not_begun_for_them() -> None:
    events = [event("Reboot"), event("Reboot", EventId="E2", Resources=["FrontEnd_IN_0", "other"])]
    events.append(event("Reboot", EventId="E3", EventStatus="Started"))
    assert azure.alone({"Events": events}) == {"E1"}


@pytest.mark.parametrize("value", [None, [], {}, {"Events": None}, {"Events": [{}]}, {"Events": ["x"]}])
def test_what_azure_would_not_say(value: Any) -> None:
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
        azure.parse(value, "me", 0)


@pytest.mark.parametrize(
    ("file", "content", "cloud"),
    [
        ("sys_vendor", "Amazon EC2\n", "aws"),
        ("product_name", "Google Compute Engine\n", "gcp"),
        ("chassis_asset_tag", "7783-7084-3265-9085-8269-3286-77\n", "azure"),
        ("sys_vendor", "Microsoft Corporation\n", None),  # Hyper-V on somebody's desk
        ("sys_vendor", "QEMU\n", None),
    ],
)
def test_the_cloud_is_told_by_the_firmware(
    tmp_path: Path, file: str, content: str, cloud: str | None
) -> None:
    (tmp_path / file).write_text(content)
    assert found.cloud(tmp_path, tmp_path / "none") == cloud


def test_the_cloud_of_older_instances_and_of_nobody(tmp_path: Path) -> None:
    (tmp_path / "uuid").write_text("ec2e1916-9099-7caf-fd21-012345abcdef\n")
    assert found.cloud(tmp_path, tmp_path / "uuid") == "aws"
    assert found.cloud(tmp_path / "none", tmp_path / "none") is None


def test_whose_notices_are_watched() -> None:
    kinds = {"aws": aws.Aws, "gcp": gcp.Gcp, "azure": azure.Azure}
    for option, kind in kinds.items():
        assert type(found.source(option, {})) is kind
    assert found.source("none", {}) is found.source("slurm", {}) is None


@pytest.mark.parametrize(
    "url", ["https://x", "x:80", "http://", "http://x/y", "http://x:99999", "http://x:0"]
)
def test_a_wrong_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="EVERSTEP_METADATA_URL=.*http://HOST:PORT"):
        Service(url)
