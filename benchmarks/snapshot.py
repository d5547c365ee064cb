"""What a snapshot costs the training: ours and stock PyTorch's, side by side in one run.

A model trains under AdamW; at the end of every step its whole state (weights, two moments, step counters) is saved to
tmpfs. The *stall* is the time for which the training stands because of it: the call, and what is waited for before the next
``optimizer.step()``. Stock savers get their state dict ready made, which does not count; ours gathers its own. A *step*
is a whole one with its snapshot, including what has to be finished before the next snapshot can be taken. The limit is one
``memcpy`` of the same bytes into memory that was touched before. *CPU* is what a rank's process used for a step, its
threads included (a saver that has a process of its own for the writing uses more than that).

Every row is measured by processes of its own, under a deadline: one that fails or hangs is said to, and the rest goes on.
Medians over the rounds, worst rank.

    python benchmarks/snapshot.py [--quick] [--gb 0.25] [--rounds 5] [--only 1|2|small]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import shutil
import signal
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.multiprocessing
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from benchmarks.training import Training, World, copied, free_port, ours, restored, timed

dcp: Any = torch.distributed.checkpoint  # neither is typed to the end
mp: Any = torch.multiprocessing
Found = dict[str, list[float]]


@dataclass(frozen=True)
class Case:
    """A state to save. ``gigabytes`` of all ranks together, or 5,000 small tensors."""

    ranks: int
    gigabytes: float
    small: bool
    rounds: int

    def __str__(self) -> str:
        what = "5,000 small tensors" if self.small else f"{self.gigabytes:g} GB"
        return f"{what}, {self.ranks} rank{'s: FSDP2' if self.ranks > 1 else ''}"


def stock(training: Training, rounds: int, save: Callable[[dict[str, Any]], Any]) -> Found:
    """A saver that returns None, or what is to be waited for: before the optimizer steps, and before the next save."""
    state = training.state()
    found: Found = {"stall": [], "step": [], "cpu": []}
    pending: Any = None
    for number in range(2 + rounds):
        begun, cpu = time.perf_counter(), time.process_time()
        training.gradients()
        staged = getattr(pending, "staging_completion", None)
        waited = timed(staged.result) if staged is not None else 0.0
        training.optimizer.step()
        if pending is not None:
            getattr(pending, "upload_completion", pending).result()
        started = time.perf_counter()
        pending = save(state)
        if number >= 2:
            found["stall"].append(time.perf_counter() - started + waited)
            found["step"].append(time.perf_counter() - begun)
            found["cpu"].append(time.process_time() - cpu)
    if pending is not None:
        getattr(pending, "upload_completion", pending).result()
    return found


def asynchronous(training: Training, case: Case, folder: Path, kind: Any, *, shared: bool) -> Found:
    """``dcp.async_save``."""
    group = dist.new_group(backend="gloo")
    options: dict[str, Any] = {"async_checkpointer_type": kind, "process_group": group}
    if shared:  # the best there is: shared memory, kept between saves
        options["async_stager"] = DefaultStager(StagingOptions(False, True, False, False))
    return stock(training, case.rounds, lambda state: dcp.async_save(state, checkpoint_id=folder, **options))


def own(training: Training, case: Case, root: Path) -> dict[str, Found]:
    """Ours, its limits, and reading back what it wrote."""
    rows: dict[str, Found] = {"memcpy, touched memory": {"stall": copied(training, case.rounds)}}
    plain: Found = {"step": [], "cpu": []}
    for _ in range(case.rounds):
        cpu = time.process_time()
        plain["step"].append(timed(training.step))
        plain["cpu"].append(time.process_time() - cpu)
    rows["(no snapshots)"] = plain
    world = World()
    rows["ours, behind the step"], first = ours(training, world, root / "behind", case.rounds, behind=True)
    rows["ours, at once"], _ = ours(training, world, root / "once", case.rounds, behind=False)
    rows["ours, the first one"] = {"stall": first}
    reads = restored(training, world, root / "once" / "0", case.rounds)
    return rows | {name: {"stall": times} for name, times in reads.items()}


def measured(row: str, training: Training, case: Case, root: Path, rank: int) -> dict[str, Found]:
    """The rows that ``row`` stands for."""
    folder, process = root / "stock", AsyncCheckpointerType.PROCESS
    if row == OURS:
        return own(training, case, root)
    if row == "torch.save":
        return {row: stock(training, case.rounds, lambda state: torch.save(state, root / f"{rank}.pt"))}
    if row == "dcp.save":
        save = dcp.save
        return {row: stock(training, case.rounds, lambda s: save(s, checkpoint_id=folder) and None)}
    kind = AsyncCheckpointerType.THREAD if row.endswith("thread") else process
    return {row: asynchronous(training, case, folder, kind, shared="shared" in row)}


OURS = "ours"
ROWS = [
    OURS,
    "torch.save",
    "dcp.save",
    "dcp.async_save, thread",
    "dcp.async_save, process",
    "dcp.async_save, process, shared memory",
]


def work(rank: int, row: str, case: Case, port: int, root: Path, results: Any) -> None:
    """One rank of one row."""
    os.setsid()  # so that whatever it starts can be ended with it
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(case.ranks),
    }  # fmt: skip
    with open(root / f"errors-{rank}", "w") as errors:
        os.dup2(errors.fileno(), 2)
    try:
        dist.init_process_group("gloo")
        training = Training(case.gigabytes, small=case.small)
        results.put((rank, measured(row, training, case, root, rank)))
        dist.barrier()
    except BaseException as error:
        results.put((rank, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"))
        raise


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A directory in tmpfs, which goes even if this process is told to end."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    root = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="everstep-benchmark-"))
    try:
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


def run(row: str, case: Case, deadline: float) -> dict[str, Found] | str:
    """The rows of the worst rank, or what went wrong."""
    context = mp.get_context("spawn")
    with scratch() as root:
        results = context.Queue()
        arguments = (row, case, free_port(), root, results)
        ranks = [context.Process(target=work, args=(rank, *arguments)) for rank in range(case.ranks)]
        for process in ranks:
            process.start()
        answers: dict[int, dict[str, Found]] = {}
        until = time.monotonic() + deadline
        try:
            while len(answers) < case.ranks:
                with contextlib.suppress(Exception):  # empty
                    rank, answer = results.get(timeout=0.2)
                    if isinstance(answer, str):
                        return f"failed: {answer}"
                    answers[rank] = answer
                    continue
                if time.monotonic() > until:
                    return f"hung: {deadline:.0f} s"
                if any(process.exitcode for process in ranks):
                    return f"failed: exit code {[process.exitcode for process in ranks]}"
        finally:
            for process in ranks:
                process.join(3 if len(answers) == case.ranks else 0)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()  # one that has no group yet
                process.join()
    return worst(list(answers.values()))


def worst(answers: list[dict[str, Found]]) -> dict[str, Found]:
    """Of each figure, the rank's whose median is largest."""
    return {
        name: {
            figure: max((answer[name][figure] for answer in answers), key=statistics.median)
            for figure in figures
        }
        for name, figures in answers[0].items()
    }


def report(case: Case, rows: dict[str, Found | str]) -> None:
    """One table."""
    best = (
        statistics.median(found["stall"])
        if isinstance(found := rows.get("ours, behind the step"), dict)
        else 0
    )
    base = rows.get("(no snapshots)")
    without = statistics.median(base["step"]) if isinstance(base, dict) else 0
    print(f"\n{case}; median of {case.rounds}, worst rank")
    print(
        f"{'':40}{'stall, ms':>10}{'min':>9}{'max':>9}{'ours is':>11}{'step, ms':>10}{'steps/s':>9}{'CPU, ms':>9}"
    )
    for name, values in rows.items():
        if isinstance(values, str):
            print(f"{name:40}{values}")
            continue
        line = f"{name:40}"
        if stalls := values.get("stall"):
            middle = statistics.median(stalls)
            less = f"{middle / best:.0f}× less" if best and "save" in name else ""
            line += f"{middle * 1e3:10.2f}{min(stalls) * 1e3:9.2f}{max(stalls) * 1e3:9.2f}{less:>11}"
        if steps := values.get("step"):
            step, cpu = statistics.median(steps), statistics.median(values["cpu"])
            line = f"{line:79}{step * 1e3:10.1f}{without / step if without else 0:8.2f}×{cpu * 1e3:9.1f}"
        print(line)
    sys.stdout.flush()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gb", type=float, default=0.25, help="state of all ranks together")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--deadline", type=float, default=60, help="seconds for each row")
    parser.add_argument("--limit", type=float, default=450, help="seconds in all: rows beyond are left out")
    parser.add_argument("--only", choices=["1", "2", "small"], help="1 rank; 2 ranks; 5,000 small tensors")
    parser.add_argument("--quick", action="store_true", help="3 rounds; 1 rank only")
    options = parser.parse_args()
    rounds = 3 if options.quick else options.rounds
    cases = {
        "1": Case(1, options.gb, False, rounds),
        "2": Case(2, options.gb, False, rounds),
        "small": Case(1, 0, True, min(rounds, 3)),  # seconds each, where they are saved one by one
    }
    chosen = [options.only] if options.only else ["1"] if options.quick else list(cases)
    print(
        f"torch {torch.__version__}, {os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f}"
    )
    end = time.monotonic() + options.limit
    for name in chosen:
        rows: dict[str, Found | str] = {}
        for row in ROWS:
            print(f"  {cases[name]}: {row} …", file=sys.stderr, flush=True)
            left = min(options.deadline, end - time.monotonic())
            found = run(row, cases[name], left) if left > 0 else "left out: no time"
            rows |= found if isinstance(found, dict) else {row: found}
        report(cases[name], rows)


if __name__ == "__main__":
    main()
