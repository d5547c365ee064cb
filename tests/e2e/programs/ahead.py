"""A training that reads a file before ``init_process_group``: what it read and where it resumed goes to ``seen-<attempt>-<rank>``.

``ahead.py OUT [--fail-ahead]``: with the latter the first standby raises while it runs ahead.
"""

import os
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

out, attempt = sys.argv[1], os.environ["EVERSTEP_ATTEMPT"]
rank = os.environ["RANK"]
if "--fail-ahead" in sys.argv and os.environ.get("EVERSTEP_STANDBY") == "1":
    raise RuntimeError("too early for me")
with open(f"{out}/config") as file:
    config = file.read()
model = torch.nn.Linear(4, 1)
print("model built", flush=True)
dist.init_process_group("gloo")

from supervisor.training import Session  # noqa: E402

parallel = DistributedDataParallel(model)
optimizer = torch.optim.SGD(parallel.parameters(), lr=0.01)
with Session(model=parallel, optimizer=optimizer) as session:
    with open(f"{out}/tmp-{rank}", "w") as file:
        file.write(f"{config} {session.step} {os.environ.get('TORCHELASTIC_RESTART_COUNT')}")
    os.rename(f"{out}/tmp-{rank}", f"{out}/seen-{attempt}-{rank}")
    for _ in session.steps(1_000_000):
        parallel(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        time.sleep(0.02)
