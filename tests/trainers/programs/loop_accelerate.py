"""A loop of Accelerate's with a Session, then the same without anything of everstep. DDP under torchrun."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from supervisor.training.integrations.accelerate import batches, session_of
from tests.trainers.programs import striking

EPOCHS = 3


def train(everstep: bool) -> dict[str, object]:
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.9)
    x = torch.randn(96, 4, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(x, x.sum(dim=1, keepdim=True)), batch_size=4, shuffle=True)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    torch.manual_seed(5 + striking.RANK)

    def step_on(batch: list[torch.Tensor]) -> torch.Tensor:
        loss = nn.functional.mse_loss(model(batch[0]), batch[1])
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        return loss

    if everstep:
        with session_of(accelerator, model=model, optimizer=optimizer, scheduler=scheduler) as session:
            for _, batch in batches(session, loader, epochs=EPOCHS):
                session.log(loss=step_on(batch))
                striking.strike(session)
    else:
        for _ in range(EPOCHS):
            for batch in loader:
                step_on(batch)
    return {"weights": striking.digest(model.state_dict().values()), "rate": scheduler.get_last_lr()}


if __name__ == "__main__":
    kept = train(everstep=True)
    striking.tell(kept=kept, plain=train(everstep=False))
