"""Trainer.fit with EverstepCallback, then the same without anything of everstep. DDP under torchrun."""

from __future__ import annotations

import logging
import os
import warnings

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from supervisor.training.integrations.lightning import EverstepCallback
from tests.trainers.programs import striking

warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
RANKS = int(os.environ.get("WORLD_SIZE", "1"))


class Module(LightningModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))
        self.seen: list[float] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> object:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Strike(Callback):  # type: ignore[misc]
    def __init__(self, everstep: EverstepCallback) -> None:
        self.everstep = everstep
        self.last = -1

    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        if trainer.global_step != self.last:  # the optimizer has stepped
            self.last = trainer.global_step
            striking.strike(self.everstep.session)


def fit(everstep: bool) -> dict[str, object]:
    seed_everything(7 + striking.RANK)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 4, generator=generator)
    data = TensorDataset(x, x.sum(dim=1, keepdim=True))
    torch.manual_seed(2)  # the same weights everywhere
    module = Module()
    torch.manual_seed(3 + striking.RANK)  # and dropout of its own
    ours = EverstepCallback()
    trainer = Trainer(
        accelerator="cpu", strategy="ddp" if RANKS > 1 else "auto", devices=RANKS, max_epochs=4,
        accumulate_grad_batches=2, val_check_interval=6, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Strike(ours), ours] if everstep else [],
    )  # fmt: skip
    loader = DataLoader(data, batch_size=4, shuffle=True)
    trainer.fit(module, loader, DataLoader(data, batch_size=48))
    return {
        "weights": striking.digest(module.state_dict().values()),
        "steps": trainer.global_step,
        "batches": trainer.fit_loop.epoch_loop.total_batch_idx,
        "stepped": trainer.fit_loop.epoch_loop._batches_that_stepped,
        "rate": trainer.lr_scheduler_configs[0].scheduler.get_last_lr(),
    }


if __name__ == "__main__":
    kept = fit(everstep=True)
    striking.tell(kept=kept, plain=fit(everstep=False))
