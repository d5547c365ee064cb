"""Where a store is, as it is written on the command line."""

from __future__ import annotations

import socket

import pytest

from supervisor.edge.store import address
from supervisor.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "hosts", "prefix", "user"),
    [
        ("tcp://node0:29400", (("node0", 29400),), "", None),
        ("tcp://[::1]:29400", (("::1", 29400),), "", None),
        ("etcd://a:2379,b:2379", (("a", 2379), ("b", 2379)), "", None),
        ("etcds://me:pass%40word@a:2379/jobs/one", (("a", 2379),), "/jobs/one/", "me"),
    ],
)
def test_what_is_allowed(
    text: str, hosts: tuple[tuple[str, int], ...], prefix: str, user: str | None
) -> None:
    parsed = address.parse(text)
    assert (parsed.hosts, parsed.prefix, parsed.user) == (hosts, prefix, user)
    assert "pass" not in str(parsed)
    assert address.parse(str(parsed)).hosts == hosts


@pytest.mark.parametrize(
    "text",
    ["", "node0:29400", "tcp://", "tcp://node0", "tcp://node0:0", "tcp://node0:x", "tcp://a:1,b:2", "tcp://a:1/x",
     "http://a:1", "etcd://", "etcd://a", "etcd://a:70000"],
)  # fmt: skip
def test_what_is_not(text: str) -> None:
    with pytest.raises(ConfigError, match="allowed: tcp://host:port") as caught:
        address.parse(text)
    assert "\n" not in str(caught.value)


def test_a_tcp_store_knows_no_users() -> None:
    with pytest.raises(ConfigError, match="no users"):
        address.parse("tcp://me@a:1")


def test_a_password_is_not_shown_in_an_error() -> None:
    with pytest.raises(ConfigError) as caught:
        address.parse("etcd://me:topsecret@a")
    assert "topsecret" not in str(caught.value)


def test_which_host_serves_it() -> None:
    assert address.is_ours("127.0.0.1")
    assert address.is_ours("localhost")
    assert not address.is_ours("192.0.2.1")
    with pytest.raises(ConfigError, match=r"nobody\.invalid"):
        address.is_ours("nobody.invalid")


def test_a_host_whose_own_name_leads_to_its_loopback_listens_on_all_addresses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As Debian writes /etc/hosts."""
    assert address.listening_host("127.0.0.1") == "127.0.0.1"
    assert address.listening_host("localhost") == "localhost"
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_named: found)
    assert address.listening_host("node0") is None
