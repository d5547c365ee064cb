"""A job that is finished, but whose last checkpoint is an emergency copy: it is stored where it belongs, without running anything."""

from __future__ import annotations

import signal
from pathlib import Path

from supervisor.checkpoint.location import located
from supervisor.config import Options
from supervisor.edge import jobdir
from supervisor.edge.console import Console
from supervisor.errors import EverstepError
from supervisor.ledger import Ledger
from supervisor.record import JobRecord
from supervisor.stores import Stores, refuge
from supervisor.warden import SIGNALS


def is_left_behind(options: Options, job: jobdir.JobDirectory, record: JobRecord) -> bool:
    """Whether the newest checkpoint lies in the job directory, and belongs elsewhere."""
    last = record.checkpoint
    place = refuge(options, job)
    return (
        last is not None and last.path is not None and place is not None and Path(last.path).parent == place
    )


async def bring(
    options: Options, job: jobdir.JobDirectory, file: jobdir.JobFile, ledger: Ledger, console: Console
) -> None:
    """Store it there, as long as that takes, with every byte of it checked; what goes wrong is said.

    Precondition: the caller holds the job's lock. Signals are let through: it is safe to die at any point.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    last = ledger.record.checkpoint
    assert last is not None
    assert last.path is not None
    stores = Stores(options, job, file, ledger, console)

    try:
        await stores.sweep()
        if await stores.bring(located(str(last.path))):
            await stores.draining.secure(None, may_drain=True)
    except EverstepError as error:
        console.say(f"the emergency copy in {last.path} could not be stored elsewhere: {error}")
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
