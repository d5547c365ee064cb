"""``everstep doctor``: is this host, this cluster, this storage fit to run on? Before the run finds out."""

from __future__ import annotations

import argparse
import os
import resource
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from launch.tables import columns, print_json
from supervisor.errors import EverstepError

if TYPE_CHECKING:
    from supervisor.checkpoint.location import Location
    from supervisor.config import Options
    from supervisor.decide.fitness import Finding
    from supervisor.edge.store.address import StoreAddress
    from supervisor.noticing import Source
    from supervisor.record import JobRecord

PATIENCE: Final = 20.0  # seconds for all checks, which are made side by side
REQUEST: Final = 5.0  # seconds for one request to an object store
RUNS: Final = Path("everstep-runs")
TEXT = """\
Looks at the host, the storage and, where there is SLURM, the cluster, and says what will not work before a run does: a table
with ok, warning or broken, and what to do about it. With a job (--dir) it compares with what that job's saves have taken
so far. It writes small files and removes them again.
"""

#: a check: yields findings, or raises what the report then says
Check = Callable[[], "Iterable[Finding]"]


def add_parser(commands: Any, add_job: Callable[[argparse.ArgumentParser], None]) -> Any:
    """The words of the command."""
    parser = commands.add_parser(
        "doctor", help="is this host, cluster, storage fit to run on?", description=TEXT,
        epilog="exit codes: 0 nothing is broken, 1 something is, 64 wrong usage, 78 wrong configuration",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoints",
        metavar="PATH|URL",
        default=argparse.SUPPRESS,
        help="where they are to go, if elsewhere",
    )
    parser.add_argument(
        "--store",
        metavar="URL",
        default=argparse.SUPPRESS,
        help="where several nodes are to meet (default: as `run`)",
    )
    parser.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help="file of options")
    add_job(parser)
    return parser


def answer(given: Mapping[str, Any], flags: Mapping[str, object], newest: Callable[[], Path]) -> int:
    """Print the report; 1 when anything is broken. ``newest``: the newest job's directory. Raises EverstepError."""
    from supervisor import config
    from supervisor.decide.fitness import Level

    options = config.load(flags)
    found = examine(_checks(options, _job(options, newest)), PATIENCE)
    if given["json"]:
        print_json([asdict(finding) for finding in found])
    else:
        print("\n".join(table(found)))
    return int(any(finding.level is Level.BROKEN for finding in found))


def examine(checks: Mapping[str, Check], patience: float) -> list[Finding]:
    """Make all checks side by side; one that does not end within ``patience`` seconds, or fails, is a finding itself.

    The threads are not joined: what a hung file system holds up must not hold up the report.
    """
    from supervisor.decide.fitness import broken
    from supervisor.edge import clock

    results: dict[str, list[Finding]] = {}

    def make(name: str, check: Check) -> None:
        try:
            results[name] = list(check())
        except (EverstepError, OSError, ImportError, ValueError) as error:
            results[name] = [broken(name, str(error).replace("\n", " "), "see docs/doctor.md")]

    threads = [
        threading.Thread(target=make, args=(name, check), daemon=True) for name, check in checks.items()
    ]
    for thread in threads:
        thread.start()
    limit = clock.monotonic() + patience
    for thread in threads:
        thread.join(max(0.0, limit - clock.monotonic()))
    late = "what does not answer now would hold up a job, too: mend it, or use another place"
    return [
        finding
        for name in checks
        for finding in results.get(name, [broken(name, f"no answer within {patience:g} s", late)])
    ]


def table(found: Sequence[Finding]) -> list[str]:
    """A line for each finding, and one for what to do about it where it is not ok."""
    rows = columns([(finding.level.value, finding.check, finding.found) for finding in found])
    lines: list[str] = []
    for row, finding in zip(rows, found, strict=True):
        lines.append(row)
        if finding.mend is not None:
            lines.append(f"{'':<9}→ {finding.mend}")
    return lines


# --------------------------------------------------------------------------- what is looked at


def _job(options: Options, newest: Callable[[], Path]) -> Path | None:
    """The job that is meant: it need not be there yet."""
    if options.dir is not None:
        return options.dir.absolute()
    try:
        return newest()
    except EverstepError:
        return None


def _checks(options: Options, job: Path | None) -> dict[str, Check]:
    from launch.slurm.client import Client
    from supervisor.checkpoint.location import Remote

    record = _record(job)
    needed = _needed(record)
    place: Location = options.checkpoints or _place(job, known=record is not None)
    checks: dict[str, Check] = {
        "/dev/shm": lambda: _memory(needed),
        "limits": _limits,
        "ports": _ports,
        "job directory": lambda: _directory("job directory", job or RUNS.absolute()),
        "torch": _torch,
    }
    if isinstance(place, Remote):
        checks["checkpoints"] = lambda: _bucket(place)
    elif options.checkpoints is not None or (job is not None and not place.is_relative_to(job)):
        checks["checkpoints"] = lambda: _directory("checkpoints", place.absolute())
    client = Client.found()
    store = _store(options)
    if store is not None:
        checks["store"] = lambda: _reach_store(store)
    cloud = _cloud(options)
    if cloud is not None:
        checks["notices"] = lambda: _reach_cloud(cloud)
    if client is not None:
        checks["slurm"] = lambda: _slurm(client, _save(record))
    return checks


def _record(job: Path | None) -> JobRecord | None:
    from supervisor.edge.jobdir import JobDirectory
    from supervisor.replay import Replay

    if job is None or not JobDirectory(job).journal.is_dir():
        return None
    folded = Replay(JobDirectory(job).journal)
    folded.advance()
    return folded.record


def _place(job: Path | None, *, known: bool) -> Location:
    """Where the job's checkpoints go; a job that is not there yet will have them in its directory."""
    from launch.stored import checkpoints_of

    if job is None:
        return RUNS.absolute()
    return checkpoints_of(job) if known else job / "checkpoints"


def _needed(record: JobRecord | None) -> int | None:
    """Bytes of memory that the job's snapshots take."""
    from supervisor.edge.control import SLOTS

    sizes = [point.bytes for point in (record.snapshot, record.checkpoint) if point] if record else []
    return max(sizes) * SLOTS if sizes else None


def _save(record: JobRecord | None) -> float | None:
    """Seconds from the order to save until the state was durable, as last measured."""
    if record is None or record.checkpoint is None or not record.checkpoint.seconds:
        return None
    return record.checkpoint.seconds + (record.snapshot.seconds if record.snapshot else 0.0)


def _memory(needed: int | None) -> Iterable[Finding]:
    from launch import probes
    from supervisor.decide import fitness
    from supervisor.edge import memory

    yield fitness.shared_memory(*probes.shared_memory(), needed)
    yield fitness.memory(memory.limit(os.getpid()), memory.available(), needed)


def _limits() -> Iterable[Finding]:
    from launch import probes
    from supervisor.decide import fitness

    yield fitness.open_files(*probes.limit(resource.RLIMIT_NOFILE))
    yield fitness.processes(probes.limit(resource.RLIMIT_NPROC)[0])
    yield fitness.locked_memory(probes.limit(resource.RLIMIT_MEMLOCK)[0], probes.has_infiniband())


def _ports() -> Iterable[Finding]:
    from launch import probes
    from supervisor.decide import fitness

    yield fitness.ports(*probes.ports())


def _directory(name: str, folder: Path) -> Iterable[Finding]:
    from launch import probes
    from supervisor.decide import fitness
    from supervisor.edge import clock

    place = probes.existing(folder)
    if name == "job directory":
        yield fitness.clock(clock.now(), probes.skew(place))
    yield fitness.directory(name, str(place), probes.directory(place))


def _bucket(where: Location) -> Iterable[Finding]:
    from launch import probes
    from supervisor.checkpoint.location import Remote
    from supervisor.decide import fitness

    assert isinstance(where, Remote)
    try:
        probe = probes.bucket(where, REQUEST)
    except ImportError:
        yield fitness.broken(
            "checkpoints", f"{where}: obstore is not installed", "pip install 'everstep[cloud]'"
        )
        return
    yield fitness.bucket(str(where), probe)


def _torch() -> Iterable[Finding]:
    from launch import probes
    from supervisor.decide import fitness

    yield fitness.torch(*probes.torch(), *probes.gpus())


def _store(options: Options) -> StoreAddress | None:
    from launch import nodes
    from launch.slurm.client import address_of

    return nodes.from_slurm(options, os.environ, address_of).store


def _reach_store(store: StoreAddress) -> Iterable[Finding]:
    from launch import reach

    return reach.store(store)


def _cloud(options: Options) -> Source | None:
    from launch.notices import found

    return found.source(options.notices)


def _reach_cloud(cloud: Source) -> Iterable[Finding]:
    from launch import reach

    return reach.notices(cloud)


def _slurm(client: Any, save: float | None) -> Iterable[Finding]:
    from launch.slurm import examining

    return examining.examine(client, os.environ, save)
