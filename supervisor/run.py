"""``everstep run``: take the job, replay its journal, and supervise it to its end."""

from __future__ import annotations

import asyncio
import signal

from supervisor.charge import Charge
from supervisor.config import Options
from supervisor.edge import jobdir
from supervisor.edge.console import Console
from supervisor.engine import Alone, Engine
from supervisor.errors import UsageError
from supervisor.node import Node
from supervisor.noticing import Source
from supervisor.program import Program
from supervisor.warden import SIGNALS, Warden


def run(
    options: Options, program: Program, engine: Engine | None = None, source: Source | None = None
) -> int:
    """Run the job to its end; returns the exit code of ``everstep run``. Raises EverstepError before it starts.

    ``engine``: who may end it beside signals; ``source``: who gives notice of that; None: nobody.
    """
    if options.dir is None:
        raise UsageError("the job needs a directory: --dir D")
    job = jobdir.JobDirectory(options.dir)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the node can do something about them
    try:
        if options.nnodes is not None and options.nnodes.most > 1:
            from supervisor.several import Several

            code = asyncio.run(Several(options, program, job, engine or Alone(), source).run())
        else:
            code = asyncio.run(_run_alone(options, program, job, engine or Alone(), source))
        for signum in SIGNALS:  # a requeue that was asked for ends us, too: the exit code stands
            signal.signal(signum, signal.SIG_IGN)
        return code
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


async def _run_alone(
    options: Options, program: Program, job: jobdir.JobDirectory, engine: Engine, source: Source | None
) -> int:
    with job.claim():
        console = Console(quiet=options.quiet)
        try:
            charge = Charge(options, program, job, console)
            if (finished := charge.finished) is not None:
                await charge.bring_home()
                console.say(finished)
                return 0
            with charge.taken(engine.name) as (file, ledger):
                warden = Warden(console, source)
                return await Node(options, program, job, file, ledger, console, engine, warden).run()
        finally:
            console.close()
