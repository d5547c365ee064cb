"""What every store promises (``supervisor/edge/store/protocol.py``), held against all of them."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator

import pytest

from supervisor.edge.store.etcd import Access, EtcdStore
from supervisor.edge.store.memory import MemoryStore
from supervisor.edge.store.protocol import Store
from supervisor.edge.store.server import Server
from supervisor.edge.store.tcp import TcpStore
from supervisor.errors import LeaseLostError, StoreError
from tests.store import etcd

SECRET = b"a secret of the job"
DEADLINE = 30.0

#: two stores that see the same
Opening = Callable[[], contextlib.AbstractAsyncContextManager[tuple[Store, Store]]]


@contextlib.asynccontextmanager
async def fake() -> AsyncIterator[tuple[Store, Store]]:
    async with MemoryStore() as store:
        yield store, store


@contextlib.asynccontextmanager
async def tcp() -> AsyncIterator[tuple[Store, Store]]:
    async with MemoryStore() as store:
        server = Server(store, SECRET)
        port = await server.open("127.0.0.1", 0)
        one, other = (TcpStore("127.0.0.1", port, SECRET) for _ in range(2))
        try:
            yield one, other
        finally:
            await one.close()
            await other.close()
            await server.close()


@pytest.fixture(scope="module")
def etcd_port() -> Iterator[int]:
    with etcd.running() as port:
        yield port


@pytest.fixture(params=["fake", "tcp", "etcd"])
def opening(request: pytest.FixtureRequest) -> Opening:
    if request.param == "fake":
        return fake
    if request.param == "tcp":
        return tcp
    if not etcd.is_installed():
        pytest.skip("etcd is not installed (apt: etcd-server)")
    port = request.getfixturevalue("etcd_port")
    prefix = f"/{uuid.uuid4().hex}/"

    @contextlib.asynccontextmanager
    async def real() -> AsyncIterator[tuple[Store, Store]]:
        access = Access(hosts=[("127.0.0.1", port)], prefix=prefix)
        yield EtcdStore(access, SECRET), EtcdStore(access, SECRET)

    return real


def on(opening: Opening, test: Callable[[Store, Store], Coroutine[None, None, None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(DEADLINE), opening() as (one, other):
            await test(one, other)

    asyncio.run(main())


def test_what_is_put_is_read_by_all(opening: Opening) -> None:
    async def test(one: Store, other: Store) -> None:
        assert (await other.read("node/")).entries == {}
        first = await one.put("node/a", "1")
        second = await one.put("node/b", "ü\n")
        await one.put("nodes/b", "another directory")
        assert first is not None
        assert second is not None
        assert second > first
        view = await other.read("node/")
        assert view.whole
        assert view.revision >= second
        assert {key: (e.value, e.revision) for key, e in view.entries.items()} == {
            "node/a": ("1", first),
            "node/b": ("ü\n", second),
        }

    on(opening, test)


def test_compare_and_set(opening: Opening) -> None:
    async def test(one: Store, other: Store) -> None:
        first = await one.put("job/leader", "a", expected=0)
        assert first
        assert await other.put("job/leader", "b", expected=0) is None
        second = await other.put("job/leader", "b", expected=first)
        assert second
        assert await one.put("job/leader", None, expected=first) is None
        assert await one.put("job/leader", None, expected=second)
        assert (await one.read("job/")).entries == {}
        assert await one.put("job/leader", "c", expected=second) is None
        assert await one.put("job/leader", "c", expected=0)

    on(opening, test)


def test_one_of_many_wins(opening: Opening) -> None:
    async def test(one: Store, other: Store) -> None:
        stores = [one, other] * 8
        won = await asyncio.gather(
            *(store.put("job/leader", str(i), expected=0) for i, store in enumerate(stores))
        )
        assert sum(revision is not None for revision in won) == 1
        (entry,) = (await one.read("job/")).entries.values()
        assert won[int(entry.value)] == entry.revision

    on(opening, test)


def test_changes_are_all_seen_in_order_and_deletions_too(opening: Opening) -> None:
    async def test(one: Store, other: Store) -> None:
        await one.put("node/a", "1")
        seen = await other.read("node/")
        await one.put("node/b", "1")
        await one.put("other/x", "1")
        await one.put("node/a", None)
        state = {key: e.value for key, e in seen.entries.items()}
        revision = seen.revision
        while state != {"node/b": "1"}:
            view = await other.changes("node/", revision, 10.0)
            assert not view.is_empty, state
            assert view.revision > revision
            if view.whole:
                state = {}
            state = {k: v for k, v in state.items() if k not in view.gone}
            state |= {key: e.value for key, e in view.entries.items()}
            revision = view.revision
        assert (await other.changes("node/", revision, 0.05)).is_empty

    on(opening, test)


def test_a_change_wakes_who_waits(opening: Opening) -> None:
    async def test(one: Store, other: Store) -> None:
        revision = await one.put("job/order", "1")
        assert revision
        waiting = asyncio.ensure_future(other.changes("job/", revision, 20.0))
        await other.changes("elsewhere/", revision, 0.01)  # it has been asked by now
        await one.put("job/order", "2")
        view = await waiting
        assert view.entries["job/order"].value == "2"
        again = await other.changes("job/", revision, 20.0)
        assert again.entries["job/order"].value == "2", "also who asks late"

    on(opening, test)


def test_a_lease_that_is_not_renewed_takes_its_keys_along(opening: Opening) -> None:
    async def test(one: Store, other: Store) -> None:
        lease, kept = await one.grant(2.0), await one.grant(2.0)
        await one.put("node/a", "1", lease=lease)
        await one.put("node/b", "1", lease=kept)
        await one.put("node/c", "1")
        seen = await other.read("node/")
        assert len(seen.entries) == 3
        gone: set[str] = set()
        while not gone:
            assert await one.renew(kept)
            view = await other.changes("node/", seen.revision, 0.5)
            gone |= view.gone
        assert gone == {"node/a"}
        assert not await one.renew(lease)
        with pytest.raises(LeaseLostError):
            await one.put("node/a", "2", lease=lease)
        assert set((await other.read("node/")).entries) == {"node/b", "node/c"}

    on(opening, test)


def test_a_key_leaves_the_lease_that_it_was_under(opening: Opening) -> None:
    async def test(one: Store, other: Store) -> None:
        lease = await one.grant(1.0)
        await one.put("node/a", "1", lease=lease)
        await one.put("node/marker", "1", lease=lease)
        await one.put("node/a", "2")
        seen = await other.read("node/")
        while "node/marker" not in (view := await other.changes("node/", seen.revision, 5.0)).gone:
            assert not view.is_empty
        assert (await other.read("node/")).entries["node/a"].value == "2"

    on(opening, test)


def test_a_large_value(opening: Opening) -> None:
    async def test(one: Store, other: Store) -> None:
        value = "x" * 1_000_000
        await one.put("node/a", value)
        assert (await other.read("node/")).entries["node/a"].value == value

    on(opening, test)


@pytest.mark.parametrize("kind", ["tcp", "etcd"])
def test_no_call_waits_for_ever(kind: str) -> None:
    """A server that takes connections and says nothing."""

    async def main() -> None:
        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()

        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        store: Store
        if kind == "tcp":
            store = TcpStore("127.0.0.1", port, SECRET, answer=0.3)
        else:
            store = EtcdStore(Access(hosts=[("127.0.0.1", port)], prefix="/x/"), SECRET, answer=0.3)
        for call in (
            store.read("node/"),
            store.put("node/a", "1"),
            store.renew(1),
            store.changes("node/", 0, 0.1),
        ):
            with pytest.raises(StoreError):
                await call
        await store.close()
        server.close()

    asyncio.run(asyncio.wait_for(main(), DEADLINE))


@pytest.mark.parametrize("kind", ["tcp", "etcd"])
def test_nobody_there_is_an_error_of_one_line(kind: str) -> None:
    port = etcd.free_port()
    store: Store
    if kind == "tcp":
        store = TcpStore("127.0.0.1", port, SECRET)
    else:
        store = EtcdStore(Access(hosts=[("127.0.0.1", port)], prefix="/x/"), SECRET)
    with pytest.raises(StoreError) as caught:
        asyncio.run(store.read("node/"))
    assert f"127.0.0.1:{port}" in str(caught.value)
    assert "\n" not in str(caught.value)
