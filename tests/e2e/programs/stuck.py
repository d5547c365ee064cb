"""A small training on two or more ranks in which a rank gets stuck, or only seems to.

``--strike [ATTEMPT/]RANK:STEP:KIND[:SECONDS]`` (any number; in attempt 0 if none is given, in the body of that step). Kinds that hang: ``sleep`` (the main
thread), ``gil`` (C code that holds the interpreter's lock), ``barrier`` (a collective that nobody else enters), ``stop``
(SIGSTOP). Kinds that do not: ``nap`` (a sleep), ``busy`` (Python code at work), ``evaluate`` (a sleep in its phase).
"""

import argparse
import ctypes
import math
import os
import signal
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def busy(seconds: float) -> float:
    """As an evaluation would: ever other places in the code."""
    end, total = time.monotonic() + seconds, 0.0
    while time.monotonic() < end:
        total += sum(math.sqrt(number) for number in range(1000))
        total += float(torch.randn(64, 64).relu().sum())
    return total


def strike(kind: str, seconds: float, session) -> None:
    if kind in ("sleep", "nap"):
        time.sleep(seconds)
    elif kind == "gil":
        library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
        library.pthread_mutex_lock(mutex)
        library.pthread_mutex_lock(mutex)
    elif kind == "barrier":
        dist.barrier()
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif kind == "busy":
        busy(seconds)
    elif kind == "evaluate":
        with session.phase("evaluate"):
            time.sleep(seconds)
    else:
        raise ValueError(kind)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--pause", type=float, default=0.01)
    parser.add_argument("--own", type=float, default=0.0, help="seconds of sleep a step more on rank 1")
    parser.add_argument("--strike", action="append", default=[])
    parser.add_argument("--no-session", action="store_true")
    parser.add_argument("--until", help="more steps until this file is there")
    options = parser.parse_args()
    rank, attempt = int(os.environ["RANK"]), int(os.environ["EVERSTEP_ATTEMPT"])
    strikes = {}
    for text in options.strike:
        when, _, what = text.rpartition("/")
        who, step, kind, *seconds = what.split(":")
        if int(who) == rank and int(when or 0) == attempt:
            strikes[int(step)] = (kind, float(seconds[0]) if seconds else 3600.0)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def one(step: int, session) -> None:
        time.sleep(options.pause)
        if rank == 1:
            time.sleep(options.own)
        if step in strikes:
            print(f"rank {rank} strikes at step {step}", flush=True)
            strike(*strikes[step], session)
        optimizer.zero_grad()
        model(torch.randn(4, 8)).sum().backward()
        optimizer.step()

    if options.no_session:
        for step in range(options.steps):
            one(step, None)
    else:
        from supervisor.training import Session

        with Session(model=model, optimizer=optimizer) as session:
            for step in session.steps(options.steps):
                one(step, session)
    print(f"rank {rank} is done", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
