"""A small training whose numbers go wrong on schedule: the script under test in tests/e2e/test_guard.py.

``--bad STEP:KIND:RANKS:ATTEMPTS`` (several): in that step the data are no good. KIND ``nan`` is one step, ``spike`` is six of them;
RANKS and ATTEMPTS are numbers with commas, or ``all``. ``--omit 11,12`` with ``--no-session``: the same training without these
steps and their data. Writes ``<out>/digest-<rank>`` at the end: of the final weights, exact to the bit.
"""

import argparse
import hashlib
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

WIDTH, BATCH, ITEMS = 8, 4, 64
SPIKE = 6  # steps


class Noisy(Dataset):
    """Draws from the random state of the process that fetches: what is left out must draw as well."""

    def __len__(self) -> int:
        return ITEMS

    def __getitem__(self, index: int) -> torch.Tensor:
        fixed = torch.randn(WIDTH, generator=torch.Generator().manual_seed(index))
        return fixed + 0.1 * torch.randn(WIDTH)


def is_meant(numbers: str, number: int) -> bool:
    return numbers == "all" or str(number) in numbers.split(",")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--bad", action="append", default=[])
    parser.add_argument("--loader", action="store_true", help="else the data follow from the step")
    parser.add_argument("--two-each", action="store_true", help="two batches for a step")
    parser.add_argument("--no-session", action="store_true")
    parser.add_argument("--omit", default="")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, attempt = dist.get_rank(), int(os.environ.get("EVERSTEP_ATTEMPT", "0"))
    torch.manual_seed(7)
    net = torch.nn.Sequential(torch.nn.Linear(WIDTH, 16), torch.nn.Dropout(0.1), torch.nn.Linear(16, 1))
    model = DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(100 + rank)
    loader = StatefulDataLoader(Noisy(), batch_size=BATCH, shuffle=True)
    batches = iter(())
    bad = [one.split(":") for one in options.bad]

    def fetch(step: int) -> torch.Tensor:
        nonlocal batches
        if not options.loader:
            return torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(1000 * step + rank))
        batch = next(batches, None)
        if batch is None:
            batches = iter(loader)
            batch = next(batches)
        return batch

    def data_of(step: int) -> torch.Tensor:
        first = fetch(step)
        return torch.cat((first, fetch(step))) if options.two_each else first

    def train_step(step: int) -> torch.Tensor:
        values, scale = data_of(step), 1.0
        for first, kind, ranks, attempts in bad:
            steps = SPIKE if kind == "spike" else 1
            if 0 <= step - int(first) < steps and is_meant(ranks, rank) and is_meant(attempts, attempt):
                scale = float("nan") if kind == "nan" else 30.0
        loss = (model(values * scale) - scale).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    if options.no_session:
        omitted = {int(step) for step in options.omit.split(",") if step}
        for step in range(options.steps):
            if step in omitted:
                data_of(step)
            else:
                train_step(step)
    else:
        from supervisor.training import Session

        with Session(model=model, optimizer=optimizer, loader=loader) as session:
            print(f"rank {rank} attempt {attempt} begins at step {session.step}", flush=True)
            for step in session.steps(options.steps):
                session.log(loss=train_step(step))
    digest = hashlib.sha256()
    for value in net.state_dict().values():
        digest.update(value.numpy().tobytes())
    os.makedirs(options.out, exist_ok=True)
    with open(os.path.join(options.out, f"digest-{rank}"), "w") as file:
        file.write(digest.hexdigest())
    dist.barrier()  # gloo aborts now and then when a peer is torn down first
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
