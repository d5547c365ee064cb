"""A script that a promoted standby must not change: it sets its surroundings before it imports, and looks at itself.

Writes ``<out>/seen-<attempt>.json`` and then makes steps until it is killed, or stops by itself where ``<out>/enough`` lies.
"""

import json
import multiprocessing
import os
import pickle
import sys
import time

before = [name for name in ("torch", "keras_like", "multiprocessing") if name in sys.modules]
os.environ["OMP_NUM_THREADS"] = "2"  # the harness sets 1
os.environ["KERAS_BACKEND"] = "torch"
os.environ["CUDA_VISIBLE_DEVICES"] = "0"

import torch  # noqa: E402


class Point:
    x = 4


def in_child(point: Point, queue: "multiprocessing.Queue[object]") -> None:
    queue.put(
        [
            point.x,
            os.environ["KERAS_BACKEND"],
            os.environ["CUDA_VISIBLE_DEVICES"],
            sys.modules["__main__"].__name__,
        ]
    )


if __name__ == "__main__":
    out, attempt = sys.argv[1], os.environ["EVERSTEP_ATTEMPT"]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=in_child, args=(Point(), queue))
    child.start()
    seen = {
        "before": before, "threads": torch.get_num_threads(), "omp": os.environ["OMP_NUM_THREADS"],
        "argv": sys.argv, "path": sys.path, "main": sys.modules["__main__"].__dict__ is globals(),
        "pickled": pickle.loads(pickle.dumps(Point())).x, "spec": getattr(__spec__, "name", None),
        "child": queue.get(), "inductor": "TORCHINDUCTOR_CACHE_DIR" in os.environ, "policy": os.sched_getscheduler(0),
        "policies": sorted({os.sched_getscheduler(int(task)) for task in os.listdir("/proc/self/task")}),
        "affinity": sorted(os.sched_getaffinity(0)), "cuda": torch.cuda.is_initialized(),
        "restart count": os.environ.get("TORCHELASTIC_RESTART_COUNT"),
    }  # fmt: skip
    child.join()
    with open(f"{out}/seen-{attempt}.tmp", "w") as file:
        json.dump(seen, file)
    os.rename(f"{out}/seen-{attempt}.tmp", f"{out}/seen-{attempt}.json")
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    while not os.path.exists(f"{out}/enough"):
        weight.sum().backward()
        optimizer.step()
        time.sleep(0.01)
