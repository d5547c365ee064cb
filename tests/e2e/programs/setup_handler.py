"""A script with a SIGTERM handler of its own that is asked to stop while it is still setting up, before its Session."""

import os
import signal
import sys
import time

import torch

from supervisor.training import Session

signal.signal(signal.SIGTERM, lambda *_: print("heard SIGTERM", flush=True))
print("setting up", flush=True)
while not os.path.exists(sys.argv[1]):
    time.sleep(0.01)
model = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with Session(model=model, optimizer=optimizer) as session:
    for _ in session.steps(100_000):
        optimizer.zero_grad()
        model(torch.ones(2)).sum().backward()
        optimizer.step()
        time.sleep(0.01)
