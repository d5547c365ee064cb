"""A small training that dies on schedule: the script under test in tests/e2e.

``FAULTS`` (environment, JSON): a list of {"attempt", "rank", "step", "kind", …}. A fault strikes in the middle of its
step (after backward, before the optimizer step; "step": null is the attempt's first) on its rank and in its attempt only. Kinds: a signal name with
"target" (self, torchrun, supervisor, tree), "raise", "exit" (code 0), "kill-in-save".
Writes ``<out>/digest-<rank>`` at the end: a digest of the final weights, exact to the bit.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import signal
import sys
import threading
import time

import psutil
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

WIDTH = 24


def build(hidden: int) -> torch.nn.Module:
    torch.manual_seed(7)
    return torch.nn.Sequential(
        torch.nn.Linear(WIDTH, hidden),
        torch.nn.BatchNorm1d(hidden),
        torch.nn.GELU(),
        torch.nn.Dropout(0.1),
        torch.nn.Linear(hidden, 1),
    )


def batch(step: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(8, WIDTH, generator=generator)


def supervisor_pid() -> int:
    with open(os.path.join(os.environ["EVERSTEP_DIR"], "lock")) as lock:
        found = re.search(r"pid (\d+)", lock.read())
    assert found
    return int(found[1])


def strike(fault: dict) -> None:
    kind = fault["kind"]
    if kind == "raise":
        raise RuntimeError(fault.get("message", "scripted failure"))
    if kind == "exit":
        sys.exit(0)
    if kind == "kill-in-save":
        kill_in_save(supervisor_pid() if fault.get("target") == "supervisor" else os.getpid())
        return
    signum = getattr(signal, kind)
    target = fault.get("target", "self")
    if target == "self":
        os.kill(os.getpid(), signum)
    elif target == "torchrun":
        os.kill(os.getppid(), signum)
    elif target == "supervisor":
        os.kill(supervisor_pid(), signum)
    elif target == "tree":
        root = psutil.Process(supervisor_pid())
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signum)
    if signum == signal.SIGKILL:
        time.sleep(60)  # it must be the signal that ends this step


def hold(folder: str, here: str, until: str) -> None:
    open(os.path.join(folder, f"at-{here}"), "w").close()
    while not os.path.exists(os.path.join(folder, until)):
        time.sleep(0.01)


def kill_in_save(victim: int) -> None:
    """Kill it in the next save: by a thread that runs as that begins, and at its end if the thread did not come to run."""
    from supervisor.edge.control import Phase
    from supervisor.training import saving

    set_phase, begun = saving.set_phase, threading.Event()

    def kill() -> None:
        begun.wait()
        os.kill(victim, signal.SIGKILL)

    def watched(words: memoryview, phase: Phase) -> Phase:
        if begun.is_set():
            os.kill(victim, signal.SIGKILL)
        before = set_phase(words, phase)
        if phase == Phase.SAVE:
            begun.set()
        return before

    saving.set_phase = watched
    sys.setswitchinterval(1e-5)
    threading.Thread(target=kill, daemon=True).start()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--no-session", action="store_true")
    parser.add_argument("--hidden", type=int, default=WIDTH)
    parser.add_argument(
        "--ballast", type=int, default=0, help="bytes of plain state, to make snapshots large"
    )
    parser.add_argument(
        "--pause", type=float, default=0.0, help="seconds of sleep a step, to be slow on purpose"
    )
    parser.add_argument("--pause-until", help="no more pauses once this file is there")
    parser.add_argument(
        "--hold", nargs="*", type=int, default=[], help="steps to wait in, for <out>/../go-<step>"
    )
    options = parser.parse_args()
    rank = int(os.environ.get("RANK", "0"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    attempt = int(os.environ.get("EVERSTEP_ATTEMPT", "0"))
    faults = [
        f for f in json.loads(os.environ.get("FAULTS", "[]")) if f["attempt"] == attempt and f["rank"] == rank
    ]
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo")
    model = build(options.hidden)
    wrapped = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.5)
    torch.manual_seed(100 + rank)

    def train_step(step: int) -> torch.Tensor:
        loss = (wrapped(batch(step, rank)) - 1).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        if step in options.hold:
            hold(os.path.dirname(options.out), f"{step}-{attempt}-{rank}", f"go-{step}")
        for fault in faults:
            if fault["step"] == step:
                strike(fault)
        optimizer.step()
        scheduler.step()
        if options.pause and not (options.pause_until and os.path.exists(options.pause_until)):
            time.sleep(options.pause)
        return loss

    if options.no_session:
        for step in range(options.steps):
            train_step(step)
    else:
        from supervisor.training import Session

        with Session(model=wrapped, optimizer=optimizer, scheduler=scheduler) as session:
            session.state["ballast"] = bytes(options.ballast)
            print(f"rank {rank} attempt {attempt} begins at step {session.step}", flush=True)
            for fault in faults:
                fault["step"] = session.step if fault["step"] is None else fault["step"]
            for step in session.steps(options.steps):
                session.log(loss=train_step(step))
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    os.makedirs(options.out, exist_ok=True)
    with open(os.path.join(options.out, f"digest-{rank}"), "w") as file:
        file.write(digest.hexdigest())
    if world > 1:
        dist.barrier()  # gloo aborts now and then when a peer is torn down first
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
