"""``everstep run``: take the job, replay its journal, and supervise it to its end."""

from __future__ import annotations

import asyncio
import signal
import socket
from pathlib import Path

from supervisor.bringing import bring, is_left_behind
from supervisor.config import Options
from supervisor.edge import jobdir, journal
from supervisor.edge.console import Console
from supervisor.engine import Alone, Engine
from supervisor.errors import UsageError
from supervisor.ledger import Ledger
from supervisor.model import State
from supervisor.node import Node
from supervisor.noticing import Source
from supervisor.program import Program
from supervisor.replay import Replay
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
            code = _claim(options, program, job, engine or Alone(), source)
        for signum in SIGNALS:  # a requeue that was asked for ends us, too: the exit code stands
            signal.signal(signum, signal.SIG_IGN)
        return code
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _claim(
    options: Options, program: Program, job: jobdir.JobDirectory, engine: Engine, source: Source | None
) -> int:
    with job.claim():
        console = Console(quiet=options.quiet)
        try:
            folded = Replay(job.journal)
            folded.advance()
            for problem in folded.problems:
                console.say(f"journal: {problem}")
            job.check(program.identity)
            if folded.record.state is State.COMPLETED and not options.continue_:
                if is_left_behind(options, job, folded.record):
                    file, ledger = _take_charge(program, job, folded, console)
                    try:
                        bring(options, job, file, ledger, console)
                    finally:
                        ledger.close()
                console.say(f"{job.path} is finished (step {folded.record.step}); --continue runs it on")
                return 0
            return _own(options, program, job, folded, console, engine, source)
        finally:
            console.close()


def _own(
    options: Options,
    program: Program,
    job: jobdir.JobDirectory,
    folded: Replay,
    console: Console,
    engine: Engine,
    source: Source | None,
) -> int:
    if folded.record.command and folded.record.command != program.command:
        console.say(f"the command line has changed; it was: {' '.join(folded.record.command)}")
    file, ledger = _take_charge(program, job, folded, console)
    runtime = Path(file.runtime)
    jobdir.lay_out_runtime(runtime, job.path, file.epoch, engine.name)
    try:
        jobdir.sweep_runtimes(runtime)
        warden = Warden(console, source)
        return asyncio.run(Node(options, program, job, file, ledger, console, engine, warden).run())
    finally:
        ledger.close()


def _take_charge(
    program: Program, job: jobdir.JobDirectory, folded: Replay, console: Console
) -> tuple[jobdir.JobFile, Ledger]:
    """Become the job's supervisor, whose epoch is higher than that of any other; write to its journal."""
    file = job.open_epoch(program.identity, list(program.command))
    written = journal.Journal(job.journal / f"{socket.gethostname()}.jsonl", console.say)
    folded.advance()  # a torn last line has its newline now
    return file, Ledger(written, folded)
