"""From a snapshot to a durable checkpoint, beside what the same bytes cost without us.

Local: the drain (copy, BLAKE3, fsync, manifest) against ``cp`` and ``fsync`` of the same files, to the same file system; and
against ``dd``, which has no goal.
S3: the drain (hash, upload, marker, manifest) against a plain multipart upload of the same files by the same client to the
same server, with the same part size and the same number of requests at once. The ways take turns, medians are compared;
the ratio is plain time / ours, so 1 is "for nothing". Exit code 1 when a goal is missed.

The S3 server is a SeaweedFS on this machine: it shares its cores with the client, so what is measured is the cost of the
work, not a network.

    python benchmarks/drain.py [--megabytes 256] [--rounds 7] [--to DIR] [--skip-s3]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the tests' server

from supervisor.checkpoint.bucket import PART, Limits, connect
from supervisor.checkpoint.location import Remote
from supervisor.checkpoint.manifest import Origin
from supervisor.checkpoint.objects import ObjectStorage
from supervisor.checkpoint.storage import CheckpointStorage, LocalStorage

GOAL = 0.9
RANKS = 2
LIMITS = Limits(timeout=60)
FILES_AT_ONCE = 2  # as the drain has it


def snapshot(folder: Path, size: int) -> Path:
    """Files as two ranks write them, in RAM where there is room."""
    folder.mkdir(parents=True)
    block = os.urandom(1 << 20)
    for rank in range(RANKS):
        with open(folder / f"__{rank}_0.distcp", "wb") as file:
            for number in range(size // RANKS // len(block)):
                file.write(number.to_bytes(8, "little") + block[8:])
    (folder / ".metadata").write_bytes(block[: 64 << 10])
    return folder


def origin(step: int) -> Origin:
    """Of a checkpoint that nobody will load."""
    return Origin(step=step, attempt=0, epoch=1, run_id="benchmark", world_size=RANKS, created=time.time())


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def copied(source: Path, target: Path) -> None:
    """``cp -r`` and fsync of what it wrote."""
    subprocess.run(["cp", "-r", source, target], check=True)
    for path in (*target.iterdir(), target, target.parent):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def dumped(source: Path, target: Path) -> None:
    """``dd`` of each file, in blocks of 8 MB and with fsync."""
    target.mkdir()
    for path in source.iterdir():
        command = ["dd", f"if={path}", f"of={target / path.name}", "bs=8M", "conv=fsync", "status=none"]
        subprocess.run(command, check=True)


def uploaded(source: Path, where: Remote) -> None:
    """The files as they are, by the client alone."""
    import obstore

    store = connect(where, LIMITS)

    async def work() -> None:
        limit = asyncio.Semaphore(FILES_AT_ONCE)

        async def one(path: Path) -> None:
            async with limit:
                await obstore.put_async(
                    store, path.name, path, chunk_size=PART, max_concurrency=LIMITS.parallel
                )

        await asyncio.gather(*map(one, source.iterdir()))

    asyncio.run(work())


def compare(
    rounds: int, ours: Callable[[int], float], plain: Callable[[int], float]
) -> tuple[list[float], list[float]]:
    """Both ways in turns, the first of each unmeasured."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        ways = [(0, ours), (1, plain)]
        for index, way in ways if number % 2 else reversed(ways):
            seconds = way(number)
            if number:
                times[index].append(seconds)
    return times


def report(name: str, against: str, times: tuple[Sequence[float], Sequence[float]], size: int) -> float:
    """One row; returns the ratio."""
    ours, plain = map(statistics.median, times)
    ratio = plain / ours
    spread = f"{min(times[0]):.2f}-{max(times[0]):.2f} / {min(times[1]):.2f}-{max(times[1]):.2f}"
    print(
        f"{name:<8} {ours:7.2f} s {size / ours / 1e6:6.0f} MB/s   {against:<24} {plain:7.2f} s {size / plain / 1e6:6.0f} MB/s"
        f"   ratio {ratio:.2f}   ({spread} s)"
    )
    return ratio


def local(
    source: Path, folder: Path, rounds: int, way: Callable[[Path, Path], None]
) -> tuple[list[float], list[float]]:
    """Each round into directories of its own, removed again outside the measurement."""
    storage = LocalStorage(folder / "checkpoints")

    def ours(step: int) -> float:
        os.sync()
        seconds = timed(lambda: storage.drain(source, origin(step)))
        shutil.rmtree(storage.where)
        return seconds

    def plain(step: int) -> float:
        target = folder / f"plain-{step}"
        os.sync()
        seconds = timed(lambda: way(source, target))
        shutil.rmtree(target)
        return seconds

    return compare(rounds, ours, plain)


def remote(source: Path, rounds: int) -> tuple[list[float], list[float]]:
    """Each round to a prefix of its own, deleted again outside the measurement."""
    import obstore

    from tests.stores import seaweed

    with seaweed.running() as server:
        os.environ.update(server.environment())
        base = Remote(f"s3://ckpt/{uuid.uuid4().hex[:8]}")

        def clear() -> None:
            store = connect(base, LIMITS)
            for entry in obstore.list(store).collect():
                obstore.delete(store, entry["path"])

        def ours(step: int) -> float:
            where = base / "ours"
            storage: CheckpointStorage = ObjectStorage(connect(where, LIMITS), where, None, LIMITS)
            seconds = timed(lambda: storage.drain(source, origin(step)))
            clear()
            return seconds

        def plain(step: int) -> float:
            seconds = timed(lambda: uploaded(source, base / f"plain-{step}"))
            clear()
            return seconds

        return compare(rounds, ours, plain)


def main() -> int:
    """Both comparisons; 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=256, help="size of the snapshot (default: 256)")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds (default: 7)")
    parser.add_argument(
        "--to", type=Path, default=Path(tempfile.gettempdir()), help="where the local one drains to"
    )
    parser.add_argument("--skip-s3", action="store_true", help="the local one only")
    options = parser.parse_args()
    size = options.megabytes << 20
    shm = Path("/dev/shm")
    print(
        f"{options.megabytes} MiB in {RANKS} files, medians of {options.rounds} rounds in turns; "
        f"{os.cpu_count()} cores, {platform.platform()}, load {os.getloadavg()[0]:.1f}"
    )
    with (
        tempfile.TemporaryDirectory(prefix="everstep-drain-", dir=shm if shm.is_dir() else None) as ram,
        tempfile.TemporaryDirectory(prefix="everstep-drain-", dir=options.to) as disk,
    ):
        source = snapshot(Path(ram) / "slot", size)
        ratios = [report("local", "cp + fsync", local(source, Path(disk), options.rounds, copied), size)]
        report("local", "dd, 8 MB, fsync", local(source, Path(disk), options.rounds, dumped), size)
        if not options.skip_s3:
            ratios.append(report("S3", "plain multipart upload", remote(source, options.rounds), size))
    missed = [f"{ratio:.2f}" for ratio in ratios if ratio < GOAL]
    print(f"goal: at least {GOAL}: " + (f"missed ({', '.join(missed)})" if missed else "met"))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
