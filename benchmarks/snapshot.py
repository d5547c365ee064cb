"""What a snapshot costs the training: ours and stock PyTorch's, side by side in one run.

A model trains under AdamW; at the end of every step its whole state (weights, two moments, step counters) is saved to
tmpfs. The *stall* is the time for which the training stands because of it: the call, which all ranks begin together, and what is
waited for before the next ``optimizer.step()``. Stock savers get their state dict ready made, which does not count; ours gathers its own. A *step*
is a whole one with its snapshot, including what has to be finished before the next snapshot can be taken; beside it stands one
*without*, by the same process: every saver takes turns with none. The limit is one ``memcpy`` of the same bytes into memory
that was touched before. *CPU* is what a rank's process used for a step, its threads included (a saver that has a process of its
own for the writing uses more than that).

Every row is measured by processes of its own, under a deadline: one that fails or hangs is said to, and the rest goes on; so
does what there is no time left for, and torchsnapshot unless it is installed. Medians over the rounds, worst rank. Below each table stands which goals are met.

    python benchmarks/snapshot.py [--quick] [--gb 0.25 1 2] [--rounds 5] [--only 1|2|small|frozen]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
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
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.multiprocessing
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from benchmarks.training import (
    Found,
    Training,
    World,
    copied,
    free_port,
    in_turn,
    ours,
    restored,
    timed,
    together,
)

dcp: Any = torch.distributed.checkpoint  # neither is typed to the end
mp: Any = torch.multiprocessing


@dataclass(frozen=True)
class Case:
    """A state to save. ``gigabytes`` of all ranks together, or 5,000 small tensors."""

    ranks: int
    gigabytes: float
    small: bool
    rounds: int
    frozen: bool = False  # all but one layer

    def __str__(self) -> str:
        what = "5,000 small tensors" if self.small else f"{self.gigabytes:g} GB"
        what += ", all but one layer frozen" if self.frozen else ""
        return f"{what}, {self.ranks} rank{'s: FSDP2' if self.ranks > 1 else ''}"


def stock(training: Training, rounds: int, save: Callable[[dict[str, Any]], Any]) -> Found:
    """A saver that returns None, or what is to be waited for: before the optimizer steps, and before the next save."""
    state = training.state()
    pending: Any = None

    def step(saves: bool) -> tuple[float, float]:
        nonlocal pending
        training.gradients()
        staged = getattr(pending, "staging_completion", None)
        waited = timed(staged.result) if staged is not None else 0.0
        training.optimizer.step()
        if pending is not None:
            getattr(pending, "upload_completion", pending).result()
        pending = None
        together()
        if not saves:
            return 0.0, waited
        started = time.perf_counter()
        pending = save(state)
        return time.perf_counter() - started, waited

    return in_turn(step, rounds, warm_up=2)


def asynchronous(training: Training, case: Case, folder: Path, kind: Any, *, shared: bool) -> Found:
    """``dcp.async_save``."""
    group = dist.new_group(backend="gloo")
    options: dict[str, Any] = {"async_checkpointer_type": kind, "process_group": group}
    if shared:  # the best there is: shared memory, kept between saves
        options["async_stager"] = DefaultStager(StagingOptions(False, True, False, False))
    return stock(training, case.rounds, lambda state: dcp.async_save(state, checkpoint_id=folder, **options))


def torchsnapshots(training: Training, case: Case, folder: Path) -> Found:
    """``torchsnapshot.Snapshot.async_take``."""
    peer: Any = importlib.import_module("torchsnapshot")

    def save(state: dict[str, Any]) -> Any:
        taken = peer.Snapshot.async_take(str(folder), {"state": peer.StateDict(**state)})
        return SimpleNamespace(result=taken.wait)

    return stock(training, case.rounds, save)


def own(training: Training, case: Case, root: Path) -> dict[str, Found]:
    """Ours, its limits, and reading back what it wrote."""
    rounds = case.rounds * (10 if case.small else 1)  # of short steps
    rows: dict[str, Found] = {"memcpy, touched memory": {"stall": copied(training, rounds)}}
    world = World()
    rows["ours, behind the step"], first = ours(training, world, root / "behind", rounds, behind=True)
    if world.group is not None:
        dist.barrier()
    shutil.rmtree(root / "behind", ignore_errors=True)  # three slots are memory
    rows["ours, at once"], _ = ours(training, world, root / "once", rounds, behind=False)
    rows["ours, the first one"] = {"stall": first}
    reads = restored(training, world, root / "once" / "0", rounds)
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
    if row == PEER:
        return {row: torchsnapshots(training, case, folder)}
    kind = AsyncCheckpointerType.THREAD if row.endswith("thread") else process
    return {row: asynchronous(training, case, folder, kind, shared="shared" in row)}


OURS = "ours"
BEST = "dcp.async_save, process, shared memory"  # of the stock ones, by far
ROWS = [OURS, BEST, "dcp.save", "torch.save", "dcp.async_save, thread", "dcp.async_save, process"]
FEW = ROWS[:3]  # of what takes long
PEER = "torchsnapshot, async_take"  # where it is installed
LARGE = 1  # gigabytes


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
        batch = (
            round(256 * min(1, 0.25 / case.gigabytes)) if case.gigabytes else 256
        )  # as many operations a step
        training = Training(case.gigabytes, small=case.small, frozen=case.frozen, batch=batch)
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
    print(f"\n{case}; medians of {case.rounds} or more, worst rank")
    print(
        f"{'':40}{'stall, ms':>10}{'min':>9}{'max':>9}{'ours is':>11}{'step, ms':>10}{'without':>9}{'steps/s':>9}"
        f"{'CPU, ms':>9}{'without':>9}"
    )
    for name, values in rows.items():
        if isinstance(values, str):
            print(f"{name:40}{values}")
            continue
        line = f"{name:40}"
        if stalls := values.get("stall"):
            middle = statistics.median(stalls)
            less = f"{middle / best:.0f}× less" if best and name in (*ROWS, PEER) else ""
            line += f"{middle * 1e3:10.2f}{min(stalls) * 1e3:9.2f}{max(stalls) * 1e3:9.2f}{less:>11}"
        if values.get("step"):
            step, plain, cpu, least = (
                statistics.median(values[figure]) * 1e3 for figure in ("step", "plain", "cpu", "plain cpu")
            )
            line = f"{line:79}{step:10.1f}{plain:9.1f}{plain / step:8.2f}×{cpu:9.1f}{least:9.1f}"
        print(line)
    print_goals(case, {name: found for name, found in rows.items() if isinstance(found, dict)})
    sys.stdout.flush()


def print_goals(case: Case, rows: dict[str, Found]) -> None:
    """What was aimed at, and what came out."""

    def middle(name: str, figure: str = "stall") -> float | None:
        values = rows.get(name, {}).get(figure)
        return statistics.median(values) if values else None

    def goal(text: str, found: float | None, aim: float, *, least: bool) -> None:
        if found is None:
            print(f"  {text:58} not measured")
            return
        met = found >= aim if least else found <= aim
        print(f"  {text:58}{found:8.2f}   goal {'≥' if least else '≤'} {aim:g}: {'met' if met else 'missed'}")

    def ratio(a: float | None, b: float | None) -> float | None:
        return a / b if a is not None and b else None

    behind, copy = middle("ours, behind the step"), middle("memcpy, touched memory")
    stock = [found for name in ROWS[1:] if (found := middle(name)) is not None]
    without, step = middle("ours, behind the step", "plain"), middle("ours, behind the step", "step")
    restore = middle("restore, ours")
    if not case.small:
        per_gb = None if behind is None else behind * 1e3 / (case.gigabytes / case.ranks)
        goal("stall behind the step, ms for each GB of a rank", per_gb, 2, least=False)
        goal("copied at once, times memcpy", ratio(middle("ours, at once"), copy), 1.15, least=False)
        goal("restore, parts of memcpy's speed", ratio(copy, restore), 0.7, least=True)
    goal("the best stock stall, times ours", ratio(min(stock, default=None), behind), 50, least=True)
    goal("steps/s with a snapshot at every step, parts of without", ratio(without, step), 0.97, least=True)
    goal("restore, times faster than dcp.load", ratio(middle("restore, dcp.load"), restore), 2, least=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--gb", type=float, nargs="+", default=[0.25, 1, 2], help="state of all ranks together"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--deadline",
        type=float,
        default=90,
        help="seconds for each row, and for each GB more; ours is several rows",
    )
    parser.add_argument("--limit", type=float, default=1800, help="seconds in all: rows beyond are left out")
    parser.add_argument(
        "--only",
        choices=["1", "2", "small", "frozen"],
        help="1 rank; 2 ranks; 5,000 small tensors; 1 GB of which little is trained",
    )
    parser.add_argument("--quick", action="store_true", help="3 rounds; 0.25 GB, 1 rank only")
    options = parser.parse_args()
    rounds = 3 if options.quick else options.rounds
    sizes = [0.25] if options.quick else options.gb
    cases = [(str(ranks), Case(ranks, size, False, rounds)) for size in sizes for ranks in (1, 2)]
    # seconds each, where they are saved one by one
    cases.insert(2, ("small", Case(1, 0, True, min(rounds, 3))))
    cases.append(("frozen", Case(1, 1, False, rounds, frozen=True)))
    only = options.only or ("1" if options.quick else None)
    chosen = [case for kind, case in cases if only in (None, kind)]
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {platform.machine()}")
    end = time.monotonic() + options.limit
    for case in chosen:
        rows: dict[str, Found | str] = {}
        load = os.getloadavg()[0]
        for row in [*(FEW if case.gigabytes >= LARGE else ROWS), PEER]:
            if row == PEER and importlib.util.find_spec("torchsnapshot") is None:
                rows[row] = "left out: pip install torchsnapshot"
                continue
            print(f"  {case}: {row} …", file=sys.stderr, flush=True)
            patience = options.deadline * max(1, case.gigabytes) * (3 if row == OURS else 1)
            left = min(patience, end - time.monotonic())
            found = run(row, case, left) if left > 0 else "left out: no time"
            rows |= found if isinstance(found, dict) else {row: found}
        report(case, rows)
        print(f"  (load of the machine before and after: {load:.1f}, {os.getloadavg()[0]:.1f})", flush=True)


if __name__ == "__main__":
    main()
