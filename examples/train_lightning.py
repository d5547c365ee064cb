"""Lightning: a perceptron learns a polynomial. DDP.

everstep run torchrun --nproc-per-node=2 examples/train_lightning.py
torchrun --nproc-per-node=2 examples/train_lightning.py    # works as well: nothing is saved then
"""

from __future__ import annotations

import argparse
import os

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from supervisor.training.integrations.lightning import EverstepCallback  # everstep


class Polynomial(LightningModule):  # type: ignore[misc]
    """Fits y = x³ − x."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Dropout(0.05), nn.Linear(64, 1))

    def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
        """The mean squared error of a batch."""
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main() -> None:
    """Read the arguments, train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()

    seed_everything(0)
    x = torch.linspace(-1.5, 1.5, 2048)[:, None]
    loader = DataLoader(TensorDataset(x, x**3 - x), batch_size=32, shuffle=True)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = Trainer(
        accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", max_epochs=arguments.epochs,
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[EverstepCallback()],  # everstep
    )  # fmt: skip
    trainer.fit(Polynomial(), loader)
    if trainer.is_global_zero:
        print(f"loss {trainer.callback_metrics['loss']:.4f} after {trainer.global_step} steps", flush=True)


if __name__ == "__main__":
    main()
