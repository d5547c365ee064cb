"""Kill after kill on one job, and nothing may be left behind or grow: processes, descriptors, shared memory, ports, threads.

The script of ``recovery.py`` trains on two ranks (``--ranks``) under ``everstep run``. A rank, torchrun or the standby itself is killed, an
exception is raised, or a rank is killed while the standby is not ready yet: drawn by ``--seed``. After each the job must make
steps again. At one moment of every attempt's life, when its standby is ready, it is counted what the supervisor holds:
descriptors, threads, memory; processes of the job and zombies among them; sockets that listen; files and bytes in its runtime
directory. The first counts are compared with the last. In the end the job is stopped, and nothing of it may be left. Exit code 1
when something has leaked, or the job did not come back.

``--light`` is for hundreds of kills in minutes: the worker is a single process without torch, which makes steps and writes snapshots
by the same protocol. What is left out is torchrun, and what torch does in a worker.

    python benchmarks/soak.py [--kills 500] [--seed 0] [--ranks 2] [--light] [--report FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.peers import EVERSTEP, Run
from benchmarks.recovery import SCRIPT
from supervisor.model import AttemptEnded, AttemptStarted, Fact, FirstStep, StandbyReady

LIGHT: Final = """
import os, shutil, time
from supervisor.edge.control import Phase, Word, offered_slot
from supervisor.edge.link import current
folder, link = os.environ["BENCH"], current()
page, kept = link.page, folder + "/state"
step = int(open(kept).read()) if os.path.exists(kept) else 0
def write(name, text):
    with open(folder + "/tmp", "w") as file:
        file.write(text)
    os.rename(folder + "/tmp", f"{folder}/{name}")
def save():
    slot = offered_slot(page[Word.FREE_SLOT])
    if slot is not None and os.path.exists(folder + "/checkpoint/.metadata"):
        shutil.rmtree(f"{link.runtime}/slots/{slot}", ignore_errors=True)
        shutil.copytree(folder + "/checkpoint", f"{link.runtime}/slots/{slot}")
        link.tell("saved", step=step, slot=slot, seconds=0.0, bytes=1, metrics={})
        write("state", str(step))
while True:
    step += 1
    page[Word.STEP], page[Word.PHASE], page[Word.HEARTBEAT_NS] = step, Phase.STEP, time.monotonic_ns()
    page[Word.FIRST_STEP_NS] = page[Word.FIRST_STEP_NS] or time.monotonic_ns()
    if step % 10 == 0:
        save()
    if os.path.exists(folder + "/raise"):
        os.unlink(folder + "/raise")
        raise RuntimeError(f"at {time.time()}")
    time.sleep(0.01)
"""
OPTIONS: Final = ("--snapshot-every", "20steps", "--max-failures", "1000000")
DEADLINE: Final = 180.0  # seconds for anything that is waited for
WARM_UP: Final = 3  # recoveries before the first count: lazily imported modules, caches
#: anonymous memory that the supervisor may gain in the second half: by then it has imported what it imports now and then
MEMORY: Final = (2e6, 8e3)  # bytes, and bytes for each kill
EARLY: Final = "kill before the standby is ready"
FAULTS: Final = {
    "kill a rank": 8,
    "kill the launcher": 2,
    "raise": 2,
    "kill the standby": 1,
    EARLY: 3,
}


@dataclass(frozen=True)
class Count:
    """What there is of a job at one moment."""

    descriptors: int
    threads: int
    processes: int
    zombies: int
    listening: int  # TCP sockets of all its processes
    shared_files: int
    shared_bytes: int
    sockets: int  # of the supervisor
    memory: int  # of the supervisor, anonymous bytes


def count(run: Run) -> Count:
    """Count it all."""
    tree = run.tree()
    supervisor = tree[0]
    runtime = run.runtime
    # slots come and go while they are counted: os.walk passes over what has gone, rglob raises
    files = [Path(parent, name) for parent, _, names in os.walk(runtime) for name in names] if runtime else []
    with supervisor.oneshot():
        kinds = Counter(
            os.path.basename(_target(supervisor.pid, fd)).partition(":")[0]
            for fd in _descriptors(supervisor.pid)
        )
        return Count(
            descriptors=supervisor.num_fds(),
            threads=supervisor.num_threads(),
            processes=len(tree),
            zombies=sum(_is_zombie(process) for process in tree),
            listening=sum(_listening(process) for process in tree),
            shared_files=len(files),
            shared_bytes=sum(_size(path) for path in files),
            sockets=kinds["socket"],
            memory=supervisor.memory_info().rss - supervisor.memory_info().shared,
        )


def _descriptors(pid: int) -> list[str]:
    return os.listdir(f"/proc/{pid}/fd")


def _target(pid: int, fd: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/fd/{fd}")
    return ""


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_blocks * 512
    return 0


def _is_zombie(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.status() == psutil.STATUS_ZOMBIE
    return False


def _listening(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error):
        return sum(one.status == psutil.CONN_LISTEN for one in process.net_connections("tcp"))
    return 0


class Soak:
    """One job under one fault after another."""

    def __init__(self, seed: int, ranks: int, *, light: bool) -> None:
        self._random = random.Random(seed)
        torchrun = ("torchrun", f"--nproc-per-node={ranks}")
        program = (sys.executable, "SCRIPT") if light else (*torchrun, "SCRIPT")
        self.run = Run((*EVERSTEP, *OPTIONS, *program), LIGHT if light else SCRIPT)
        if light:
            _save_something(self.run.folder / "checkpoint")
        self.struck: Counter[str] = Counter()
        self.cold = 0

    # ------------------------------------------------------------------ what there is to see

    def until(self, found: Callable[[list[Fact]], bool], what: str) -> None:
        """Wait until the journal shows it. Raises SystemExit when it does not."""
        deadline = time.monotonic() + DEADLINE
        while not found(self.run.facts()):
            if self.run.process.poll() is not None or time.monotonic() > deadline:
                self.fail(what)
            time.sleep(0.02)

    def fail(self, what: str) -> NoReturn:
        """It was not to be seen."""
        sys.stderr.write(self.run.output[-5000:])
        raise SystemExit(f"after {self.struck.total()} faults {what} was not to be seen")

    def until_recovered(self, attempt: int) -> None:
        """The attempt has made its first step."""
        self.until(lambda facts: _has(facts, FirstStep, attempt), f"the first step of attempt {attempt}")

    def until_standby(self, attempt: int, after: float = 0.0) -> None:
        """The standby for it is ready, and so is the first one that is ready after some moment."""
        self.until(
            lambda facts: any(
                isinstance(fact, StandbyReady) and fact.attempt == attempt and fact.time > after
                for fact in facts
            ),
            f"the standby for attempt {attempt}",
        )

    def workers(self, attempt: int) -> dict[int, psutil.Process]:
        """The ranks of an attempt; -1 is its launcher, which may be rank 0 itself."""
        found = {}
        for process in self.run.tree():
            with contextlib.suppress(psutil.Error):
                environ = process.environ()
                if environ.get("EVERSTEP_ATTEMPT") == str(attempt):
                    found[int(environ.get("RANK", "-1"))] = process
        if not found:
            self.fail(f"no process of attempt {attempt}")
        return found

    def kill(self, attempt: int) -> None:
        """SIGKILL to one of its ranks."""
        workers = self.workers(attempt)
        ranks = [rank for rank in workers if rank >= 0] or [-1]  # a single process is both
        workers[self._random.choice(ranks)].kill()

    # ------------------------------------------------------------------ what is done to it

    def strike(self, attempt: int) -> bool:
        """Something fails in this attempt; whether that ends it."""
        faults = {name: weight for name, weight in FAULTS.items() if name != EARLY}
        fault = self._random.choices(list(faults), list(faults.values()))[0]
        self.struck[fault] += 1
        if fault == "kill the standby":
            now = time.time()
            self.kill(attempt + 1)
            self.until_standby(attempt + 1, after=now)
            return False
        if fault == "raise":
            (self.run.folder / "raise").touch()
        elif fault == "kill the launcher":
            self.workers(attempt)[-1].kill()
        else:
            self.kill(attempt)
        return True

    def until_ripe(self, attempt: int) -> bool:
        """Wait for the standby of the next attempt, or now and then not; whether it is there."""
        if self._random.random() < FAULTS[EARLY] / sum(FAULTS.values()):
            time.sleep(self._random.uniform(0.0, 2.5))
            return False
        self.until_standby(attempt + 1)
        return True

    def go(self, kills: int) -> list[Count]:
        """Strike so often; the counts after each recovery, once warm."""
        counts: list[Count] = []
        attempt = 0
        self.until_recovered(0)
        while self.struck.total() < kills:
            if self.until_ripe(attempt):
                if attempt >= WARM_UP:
                    counts.append(count(self.run))
                ends = self.strike(attempt)
            else:
                self.struck[EARLY] += 1
                self.kill(attempt)
                ends = True
            if ends:
                attempt += 1
                self.until_recovered(attempt)
            if self.struck.total() % 25 == 0:
                print(
                    f"{self.struck.total()} faults, {attempt} attempts; {counts[-1] if counts else ''}",
                    file=sys.stderr,
                )
        self.until_standby(attempt + 1)
        counts.append(count(self.run))
        starts = [fact for fact in self.run.facts() if isinstance(fact, AttemptStarted)]
        self.cold = sum(not fact.standby for fact in starts[1:])
        return counts

    def stop(self) -> list[str]:
        """Stop the job; what is left of it."""
        run_id = json.loads((self.run.job / "job.json").read_text())["run_id"]
        runtime, attempts = self.run.runtime, self.run.job / "attempts"
        self.run.process.send_signal(signal.SIGTERM)
        left = []
        if (code := self.run.process.wait(DEADLINE)) != 75:
            left.append(f"exit code {code}, not 75")
        with contextlib.suppress(psutil.TimeoutExpired):
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error):
                    if process.environ().get("EVERSTEP_RUN_ID") == run_id:
                        process.wait(20)
        left += [f"process {process.pid}" for process in psutil.process_iter() if _is_of(process, run_id)]
        if runtime is not None and runtime.exists():
            left.append(f"the runtime directory {runtime}")
        ended = sum(isinstance(fact, AttemptEnded) for fact in self.run.facts())
        if (folders := len(list(attempts.iterdir()))) > ended + self.struck["kill the standby"]:
            left.append(f"{folders} folders of {ended} attempts")
        return left


def _save_something(folder: Path) -> None:
    """A stock DCP checkpoint."""
    import torch
    import torch.distributed.checkpoint

    dcp: Any = torch.distributed.checkpoint
    dcp.save({"weight": torch.ones(1000)}, checkpoint_id=folder, no_dist=True)


def _has(facts: list[Fact], kind: type[FirstStep], attempt: int) -> bool:
    return any(isinstance(fact, kind) and fact.attempt == attempt for fact in facts)


def _is_of(process: psutil.Process, run_id: str) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.environ().get("EVERSTEP_RUN_ID") == run_id
    return False


def leaks(counts: list[Count], kills: int) -> list[str]:
    """What has grown from the first to the last count; nothing when all is well.

    A number that goes up and down (a thread that looks at a checkpoint, a connection that is being closed) has leaked when it was lower in
    all of the first tenth of the counts than it is in any of the last.
    """
    tenth, half = max(1, len(counts) // 10), len(counts) // 2
    first, middle, last = (
        [asdict(one) for one in part] for part in (counts[:tenth], counts[half:][:tenth], counts[-tenth:])
    )
    grown = []
    for name in first[0]:
        before = max(one[name] for one in (middle if name == "memory" else first))
        after = min(one[name] for one in last)
        allowed = before + (MEMORY[0] + MEMORY[1] * kills / 2 if name == "memory" else 0)
        if name == "shared_bytes":
            allowed = max(allowed * 1.02, allowed + 2 * mmap.PAGESIZE)  # small files
        if after > allowed:
            grown.append(f"{name}: {before} → {after}")
    return grown


def main() -> int:
    """Strike, count, stop; 0 when nothing has leaked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2, help="with one, a cycle is half as long")
    parser.add_argument("--light", action="store_true", help="without torch and torchrun")
    parser.add_argument("--report", type=Path, help="write every count there, one JSON object a line")
    arguments = parser.parse_args()
    began = time.monotonic()
    soak = Soak(arguments.seed, arguments.ranks, light=arguments.light)
    try:
        counts = soak.go(arguments.kills)
        found = leaks(counts, arguments.kills) + soak.stop()
    finally:
        soak.run.close()
    if arguments.report:
        arguments.report.write_text("".join(f"{json.dumps(asdict(one))}\n" for one in counts))
    print(
        f"{arguments.kills} faults in {time.monotonic() - began:.0f} s, seed {arguments.seed}: {dict(soak.struck)}"
    )
    print(f"every one was recovered from, {soak.cold} times by a cold start")
    print(f"first count: {counts[0]}\nlast count:  {counts[-1]}")
    print(f"left or leaked: {'; '.join(found) or 'nothing'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
