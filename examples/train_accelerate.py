"""Accelerate: a perceptron learns a polynomial. DDP, without ``accelerate launch``.

everstep run torchrun --nproc-per-node=2 examples/train_accelerate.py
torchrun --nproc-per-node=2 examples/train_accelerate.py    # works as well: nothing is saved then
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from supervisor.training.integrations.accelerate import batches, session_of  # everstep


def main() -> None:
    """Read the arguments, train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()

    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),  # an order that can be resumed
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Dropout(0.05), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x = torch.linspace(-1.5, 1.5, 2048)[:, None]
    loader = DataLoader(TensorDataset(x, x**3 - x), batch_size=32, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    with session_of(accelerator, model=model, optimizer=optimizer) as session:  # everstep
        for _, (inputs, targets) in batches(session, loader, epochs=arguments.epochs):  # everstep
            loss = nn.functional.mse_loss(model(inputs), targets)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            session.log(loss=loss)
    accelerator.print(f"loss {loss.item():.4f} after {session.step} steps")
    accelerator.end_training()


if __name__ == "__main__":
    main()
