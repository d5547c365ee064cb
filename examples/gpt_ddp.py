"""A small GPT learns to write Python, one character at a time, from the standard library's own source. DDP.

    everstep run torchrun --nproc-per-node=2 examples/gpt_ddp.py --steps 2000
    torchrun --nproc-per-node=2 examples/gpt_ddp.py          # works as well: nothing is saved then
    python examples/gpt_ddp.py                               # and so does a single process

The three lines that make it resumable are marked ``# everstep``. What is read at a step follows from the step and the
*global* batch alone, so a job that comes back with another number of workers goes on with the right data.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from supervisor.training import Session  # everstep

VOCABULARY = 128  # ASCII
CONTEXT = 64  # characters


class Block(nn.Module):
    """One transformer layer: causal self-attention, then a two-layer perceptron, each on a residual branch."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm_perceptron = nn.LayerNorm(width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width) → the same."""
        batch, time, width = x.shape
        qkv = self.query_key_value(self.norm_attention(x)).view(
            batch, time, 3, self.heads, width // self.heads
        )
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        rate = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=rate, is_causal=True)
        attended = self.project(attended.transpose(1, 2).reshape(batch, time, width))
        x = x + F.dropout(attended, self.dropout, self.training)
        return x + F.dropout(self.perceptron(self.norm_perceptron(x)), self.dropout, self.training)


class GPT(nn.Module):
    """A decoder-only transformer with learned positions."""

    def __init__(self, width: int = 96, layers: int = 3, heads: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, characters: Tensor) -> Tensor:
        """(batch, time) of character codes → (batch, time, vocabulary) of logits."""
        positions = torch.arange(characters.shape[1], device=characters.device)
        return self.head(self.norm(self.blocks(self.token(characters) + self.position(positions))))


def corpus(limit: int = 2_000_000) -> Tensor:
    """The standard library's top-level modules as character codes, in the order of their names, cut at ``limit``."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
    return torch.frombuffer(bytearray(text.encode("ascii", "replace")[:limit]), dtype=torch.uint8).long()


def batch_of(text: Tensor, step: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """This rank's share of the global batch of ``step``: inputs and targets, each (size / world size, CONTEXT)."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(text) - CONTEXT, (size,), generator=generator)
    mine = starts[dist.get_rank() :: dist.get_world_size()]
    windows = text[mine[:, None] + torch.arange(CONTEXT + 1)]
    return windows[:, :-1], windows[:, 1:]


def digest(weights: Mapping[str, Any]) -> str:
    """One line that two runs share only if every bit of their weights is the same."""
    total = hashlib.sha256()
    for name in sorted(weights):
        total.update(name.encode())
        total.update(weights[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:32]


def train(arguments: argparse.Namespace, device: torch.device) -> None:
    """The training itself, as one would write it without everstep, but for the marked lines."""
    torch.manual_seed(arguments.seed)  # the same weights on every rank …
    model = DistributedDataParallel(GPT().to(device))
    torch.manual_seed(arguments.seed + 1 + dist.get_rank())  # … and dropout of its own on each
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 0.55 + 0.45 * math.cos(math.pi * step / arguments.steps))
    )
    text = corpus()

    def train_step(step: int) -> Tensor:
        inputs, targets = (
            part.to(device) for part in batch_of(text, step, arguments.batch_size, arguments.seed)
        )
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % arguments.print_every == 0 and dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
        return loss.detach()

    if arguments.no_session:  # the same training with nothing of everstep in it, to compare with
        for step in range(arguments.steps):
            train_step(step)
    else:
        with Session(model=model, optimizer=optimizer, scheduler=scheduler) as session:  # everstep
            for step in session.steps(arguments.steps):  # everstep
                loss = train_step(step)
                session.log(loss=loss)  # shown in the progress line and kept with each checkpoint

    if dist.get_rank() == 0:
        print(f"final weights {digest(model.module.state_dict())} after {arguments.steps} steps", flush=True)


def main() -> None:
    """Read the arguments, join the other workers, train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=16, help="of all workers together")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--print-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--no-session", action="store_true", help="train without everstep, for comparison")
    arguments = parser.parse_args()

    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:  # plain python: a group of one
        dist.init_process_group(backend, init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    train(arguments, device)
    dist.barrier()  # leave together: torch's gloo threads may abort a process that ends while they still hold work
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
