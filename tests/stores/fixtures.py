"""Fixtures over the real server: one for a whole test process, every test with a prefix and a proxy of its own."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from tests.stores import proxy as proxies
from tests.stores import seaweed

#: its tests share one server, in one process of several
WITH_S3 = pytest.mark.xdist_group("s3")


@pytest.fixture(scope="session")
def s3() -> Iterator[seaweed.Server]:
    with seaweed.running() as server:
        yield server


@pytest.fixture
def proxy(s3: seaweed.Server) -> Iterator[proxies.Proxy]:
    with proxies.before(s3.port) as one:
        yield one


@pytest.fixture
def url() -> str:
    return f"s3://ckpt/{uuid.uuid4().hex[:8]}/run"


@pytest.fixture
def reached(s3: seaweed.Server, proxy: proxies.Proxy, monkeypatch: pytest.MonkeyPatch) -> proxies.Proxy:
    """The environment leads to the server, through the proxy."""
    for name, value in s3.environment(proxy.endpoint).items():
        monkeypatch.setenv(name, value)
    return proxy
