"""A small training whose batches come from a StatefulDataLoader with worker processes.

Writes ``<out>/digest-<rank>`` at the end: a digest of the final weights and of every index in the order it came.
"""

import argparse
import contextlib
import hashlib
import os
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

ITEMS, BATCH = 64, 4


class Squares(Dataset):
    def __len__(self) -> int:
        return ITEMS

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        return index, torch.randn(8, generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--method", default="fork")
    parser.add_argument("--no-session", action="store_true")
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--pause-until", help="no more pauses once this file is there")
    options = parser.parse_args()
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(7)
    model = DistributedDataParallel(torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(100 + rank)
    loader = StatefulDataLoader(
        Squares(),
        batch_size=BATCH,
        shuffle=True,
        num_workers=options.workers,
        multiprocessing_context=options.method,
    )
    seen: list[int] = []
    batches = iter(())

    def train_step() -> None:
        nonlocal batches
        batch = next(batches, None)
        if batch is None:
            batches = iter(loader)
            batch = next(batches)
        indices, values = batch
        seen.extend(indices.tolist())
        optimizer.zero_grad()
        model(values).pow(2).mean().backward()
        optimizer.step()
        if not (options.pause_until and os.path.exists(options.pause_until)):
            time.sleep(options.pause)

    if options.no_session:
        for _ in range(options.steps):
            train_step()
    else:
        from supervisor.training import Session

        with Session(model=model, optimizer=optimizer, loader=loader) as session:
            seen = session.state.setdefault("seen", seen)
            for _ in session.steps(options.steps):
                train_step()
    digest = hashlib.sha256(repr(seen).encode())
    for value in model.state_dict().values():
        digest.update(value.detach().numpy().tobytes())
    os.makedirs(options.out, exist_ok=True)
    with open(os.path.join(options.out, f"digest-{rank}"), "w") as file:
        file.write(digest.hexdigest())
    with contextlib.suppress(RuntimeError):
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
