"""``everstep run`` on one of several nodes: join the others, then lead or follow, until the job is over."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final

from supervisor import background
from supervisor.charge import Charge
from supervisor.company import Team
from supervisor.config import Options
from supervisor.decide.membership import Size
from supervisor.decide.restart import EXIT_AGAIN
from supervisor.edge import clock, jobdir, processes, runtimes, secret
from supervisor.edge.console import Console
from supervisor.edge.store import address as addresses
from supervisor.edge.store.address import StoreAddress
from supervisor.edge.store.memory import MemoryStore
from supervisor.edge.store.protocol import Store
from supervisor.edge.store.server import Server
from supervisor.edge.store.tcp import TcpStore
from supervisor.engine import Engine
from supervisor.errors import JobError, LeadershipLostError, LeadGivenUpError, StoreError, UsageError
from supervisor.fleet import Final as FinalOrder
from supervisor.fleet import Order, Report
from supervisor.follower import Follower
from supervisor.joining import Joining, Roll, new_life
from supervisor.model import StopCause
from supervisor.node import Node
from supervisor.noticing import Source
from supervisor.program import Program
from supervisor.warden import Warden

SAID_AFTER: Final = 5.0  # seconds without the store until that is said
GOODBYE: Final = 20.0  # seconds that a leader of a finished job waits for others to come, and leave, at most
MORE: Final = 5.0  # … once as many have as the job takes at least
LOOK: Final = 0.5


class Several:
    """One node's supervisor."""

    def __init__(
        self,
        options: Options,
        program: Program,
        job: jobdir.JobDirectory,
        engine: Engine,
        source: Source | None,
    ) -> None:
        if options.store is None or options.nnodes is None:
            raise UsageError(
                f"--nnodes {options.nnodes}: where do the nodes meet? --store tcp://HOST:PORT with the host of one of them, "
                "or torchrun's --rdzv-endpoint or --master-addr and --master-port"
            )
        self._options, self._program, self._job = options, program, job
        self._engine = engine
        self._size: Size = options.nnodes
        self._address: StoreAddress = options.store
        self._name = options.node_name or socket.gethostname()
        self._console = Console(quiet=options.quiet)
        self._was_follower = self._took_part = False
        self._warden = Warden(self._console, source, self._name)
        self._secret = secret.of_job(job.path)

    async def run(self) -> int:
        """The exit code of ``everstep run``. Raises EverstepError."""
        with background.watched():
            return await self._run()

    async def _run(self) -> int:
        processes.become_subreaper()
        self._warden.listen()
        try:
            async with self._store() as (store, serves):
                report = Report(
                    name=self._name, life=new_life(), host=socket.gethostname(), pid=os.getpid(),
                    address=towards(self._address), port=0, rank=self._options.node_rank,
                )  # fmt: skip
                joining = Joining(store, report, self._options.lease)
                self._warden.changed = joining.changed.set
                joining.start()
                try:
                    return await self._take_part(
                        Team(joining, store, self._size, self._address.is_embedded, self._secret), serves
                    )
                finally:
                    await joining.close()
        finally:
            self._console.close()

    @contextlib.asynccontextmanager
    async def _store(self) -> AsyncIterator[tuple[Store, bool]]:
        """The store, and whether this node serves it."""
        key = self._secret
        address = self._address
        if not address.is_embedded:
            from supervisor.edge.store.etcd import EtcdStore, access

            etcd = EtcdStore(access(address, self._job.path.name), key)
            try:
                yield etcd, False
            finally:
                await etcd.close()
            return
        host, port = address.hosts[0]
        if self._options.node_rank in (None, 0) and addresses.is_ours(host):
            async with MemoryStore() as memory:
                server = Server(memory, key, self._console.say)
                try:
                    await server.open(addresses.listening_host(host), port)
                except StoreError:
                    if self._options.node_rank == 0:
                        raise
                else:
                    try:
                        yield memory, True
                    finally:
                        await server.close()
                    return
        client = TcpStore(host, port, key)
        try:
            yield client, False
        finally:
            await client.close()

    async def _take_part(self, team: Team, serves: bool) -> int:
        joining = team.joining
        began, said = clock.monotonic(), False
        while True:
            joining.changed.clear()
            if (notice := self._warden.must_leave) is not None:
                stops_all = notice.cause is StopCause.USER
                if not self._took_part:
                    await self._warden.acknowledge()
                if not stops_all or not self._took_part:  # else the next leader is to hear of it
                    return 130 if stops_all else EXIT_AGAIN
            if joining.has_joined and joining.leader is None and (serves or not team.is_embedded):
                with contextlib.suppress(StoreError):
                    await joining.campaign()
            if joining.leads:
                self._took_part = True
                code = await self._lead(team)
                if code is not None:
                    return code
                began, said = clock.monotonic(), False
                continue
            order = joining.order
            leader = order.leader.partition(" ")[0] if order is not None else self._name
            # an earlier life of this node leads only until the store says that it is over
            if joining.has_joined and order and order.leader == joining.leader and leader != self._name:
                self._was_follower = self._took_part = True
                if not said or order.run_id:
                    self._console.say(f"node {self._name} follows {leader}")
                code = await Follower(
                    self._options,
                    self._program,
                    self._job,
                    team,
                    order,
                    self._console,
                    self._warden,
                    self._engine.name,
                ).run()
                if code is not None:
                    return code
                began, said = clock.monotonic(), False
                continue
            waited = clock.monotonic() - began
            if waited > SAID_AFTER and not said:
                said = True
                why = joining.problem or "nobody leads yet"
                self._console.say(f"waiting for the job's other nodes at {self._address}: {why}")
            if waited > self._options.node_timeout:
                raise StoreError(f"{self._address}: {joining.problem or 'nobody leads'} for {waited:.0f} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(joining.changed.wait(), LOOK)

    # ------------------------------------------------------------------ leading

    async def _lead(self, team: Team) -> int | None:
        """Own the job as long as this node leads; None when another one does."""
        with self._claimed():
            charge = Charge(self._options, self._program, self._job, self._console, self._name)
            if (finished := charge.finished) is not None:
                self._console.say(finished)
                await self._send_home(team, finished)
                await charge.bring_home()
                return 0
            with charge.taken(self._engine.name) as (file, ledger):
                node = Node(
                    self._options, self._program, self._job, file, ledger, self._console, self._engine, self._warden,
                    team,
                )  # fmt: skip
                try:
                    return await node.run()
                except LeadGivenUpError as error:
                    self._console.say(str(error))
                    if error.saved:
                        runtimes.remove(Path(file.runtime))
                        await self._warden.acknowledge()
                    return EXIT_AGAIN
                except LeadershipLostError as error:
                    self._console.say(str(error))
                    return None
                finally:
                    self._warden.attend(None)

    @contextlib.contextmanager
    def _claimed(self) -> Iterator[None]:
        """The job's lock. Whoever had it before may be cut off and keep it: then the lead and the epoch have to do."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._job.claim())
            except JobError:
                if not self._was_follower:
                    raise
            yield

    async def _send_home(self, team: Team, reason: str) -> None:
        """Tell the others, and wait a while for them to come and leave."""
        joining, before, file = team.joining, team.joining.order, self._job.read()
        order = Order(
            serial=(before.serial if before else 0) + 1, leader=joining.own, epoch=0,
            run_id=file.run_id if file else "", final=FinalOrder(exit_code=0, reason=reason),
        )  # fmt: skip
        roll, left, began = Roll(team.store), {joining.report.name}, clock.monotonic()
        with contextlib.suppress(StoreError):
            await joining.command(order)
            while (waited := clock.monotonic() - began) < GOODBYE:
                left |= await roll.look(LOOK) - roll.reports.keys()
                wanted = self._size.most if waited < MORE else self._size.least
                if len(left) >= wanted and roll.reports.keys() <= {joining.report.name}:
                    return


def towards(address: StoreAddress) -> str:
    """The address of this host on the way to the store: by it the others reach this node. Raises StoreError."""
    host, port = address.hosts[0]
    try:
        family, kind, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise StoreError(f"{address}: {error.strerror or error}") from None
