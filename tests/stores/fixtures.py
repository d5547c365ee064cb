"""Fixtures over the real server: one for a whole test process, every test with a prefix and a proxy of its own."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from tests.stores import azurite, seaweed
from tests.stores import proxy as proxies

#: its tests share one server, in one process of several
WITH_S3 = pytest.mark.xdist_group("s3")
ON_EVERY_CLOUD = pytest.mark.parametrize("cloud", ["s3", "az"], indirect=True)


@pytest.fixture(scope="session")
def s3() -> Iterator[seaweed.Server]:
    with seaweed.running() as server:
        yield server


@pytest.fixture(scope="session")
def az() -> Iterator[azurite.Server]:
    with azurite.running() as server:
        yield server


@pytest.fixture
def cloud(request: pytest.FixtureRequest) -> str:
    """Whose store it is: that of S3 unless a test is run for others, too (``ON_EVERY_CLOUD``)."""
    return getattr(request, "param", "s3")


@pytest.fixture
def server(cloud: str, request: pytest.FixtureRequest) -> seaweed.Server | azurite.Server:
    server: seaweed.Server | azurite.Server = request.getfixturevalue(cloud)
    return server


@pytest.fixture
def proxy(server: seaweed.Server | azurite.Server) -> Iterator[proxies.Proxy]:
    with proxies.before(server.port) as one:
        yield one


@pytest.fixture
def url(cloud: str) -> str:
    return f"{cloud}://ckpt/{uuid.uuid4().hex[:8]}/run"


@pytest.fixture
def reached(
    server: seaweed.Server | azurite.Server, proxy: proxies.Proxy, monkeypatch: pytest.MonkeyPatch
) -> proxies.Proxy:
    """The environment leads to the server, through the proxy."""
    for name, value in server.environment(proxy.endpoint).items():
        monkeypatch.setenv(name, value)
    return proxy
