"""What ``everstep doctor`` looks at beyond this host: the store where several nodes meet, the cloud's metadata service."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from launch import probes
from launch.notices.aws import Aws, hint
from launch.notices.azure import Azure
from launch.notices.gcp import PREEMPTED, Gcp
from launch.notices.metadata import MetadataError
from supervisor.decide import fitness
from supervisor.decide.fitness import Finding
from supervisor.edge import clock
from supervisor.edge.store.address import StoreAddress
from supervisor.errors import StoreError

if TYPE_CHECKING:
    from supervisor.noticing import Source

PATIENCE: Final = 5.0  # seconds of one look


def store(address: StoreAddress) -> Iterable[Finding]:
    """Whether the nodes could meet there."""
    if address.is_embedded:
        yield fitness.door(str(address), *probes.door(*address.hosts[0], PATIENCE))
        return
    try:
        yield asyncio.run(_etcd(address))
    except ImportError:
        yield fitness.broken("store", f"{address}: etcd3gw is not installed", "pip install 'everstep[etcd]'")


async def _etcd(address: StoreAddress) -> Finding:
    from supervisor.edge.store.etcd import EtcdStore, access

    one = EtcdStore(access(address, "doctor"), b"", answer=PATIENCE)
    began = clock.monotonic()
    try:
        lease = await one.grant(1.0)  # a write: more than half of its members must be there
        await one.read("")
        if not await one.renew(lease):
            raise StoreError(f"{address}: a lease is gone at once")
    except StoreError as error:
        return fitness.broken(
            "store", str(error), "etcdctl endpoint health; the address, the user and the certificates"
        )
    finally:
        await one.close()
    return fitness.ok("store", f"{address}: healthy, {(clock.monotonic() - began) * 1000:.0f} ms for a lease")


def notices(source: Source) -> Iterable[Finding]:
    """Whether the cloud would be heard."""
    problem = asyncio.run(_look(source))
    if problem is None:
        yield fitness.ok("notices", f"{source.name}: the metadata service answers")
        return
    mend = (hint(problem) if isinstance(source, Aws) else "") or "allow 169.254.169.254, or --notices none"
    yield fitness.warning("notices", f"{source.name}: {problem}", mend)


async def _look(source: Source) -> MetadataError | None:
    try:
        match source:
            case Gcp():
                await source.look(PREEMPTED, None)
            case Aws() | Azure():
                return (await source.look()).problem
    except MetadataError as problem:
        return problem
    return None
