"""What the integrations refuse, and what they take away: the libraries' own resuming, orders that cannot be resumed, signals."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from supervisor.checkpoint import catalog
from supervisor.errors import UsageError
from supervisor.training import Session

pytestmark = pytest.mark.xdist_group("trainers")
ROOT = Path(__file__).parent.parent.parent


def test_the_extra_is_named_where_it_is_missing() -> None:
    program = (
        "import importlib, sys\n"
        "from supervisor.errors import ConfigError\n"
        "for name in ('keras', 'lightning', 'transformers', 'accelerate'):\n"
        "    sys.modules[name] = None  # an import of it raises\n"
        "    try: importlib.import_module(f'supervisor.training.integrations.{name}')\n"
        "    except ConfigError as error: assert f'everstep[{name}]' in str(error), error\n"
        "    else: sys.exit(f'{name} is not refused')\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=120)


def data() -> TensorDataset:
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x.sum(dim=1, keepdim=True))


def test_accelerate_an_order_that_cannot_be_resumed(tmp_path: Path) -> None:
    from accelerate import Accelerator

    from supervisor.training.integrations.accelerate import batches

    loader = Accelerator(cpu=True).prepare(DataLoader(data(), batch_size=2, shuffle=True))
    with Session(dir=tmp_path) as session, pytest.raises(UsageError, match="use_seedable_sampler=True"):
        next(batches(session, loader, epochs=1))


def lightning_fit(callback: Any, seen: list[Any], stop: bool = False) -> Any:
    from lightning.pytorch import LightningModule, Trainer

    class Module(LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 1)

        def training_step(self, batch: Any, index: int) -> Any:
            seen.append((signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)))
            if stop and index == 2:
                self.trainer.should_stop = True
            return nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    from lightning.pytorch.plugins.environments import SLURMEnvironment

    environment = SLURMEnvironment(auto_requeue=True)
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback], plugins=[environment], num_nodes=1, devices=1,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(data(), batch_size=2))
    return environment


def test_lightning_leaves_signals_and_requeueing_to_a_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    from supervisor.training.integrations import lightning

    for name, value in {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "1", "SLURM_PROCID": "0",
                        "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)

    alone: list[Any] = []
    assert lightning_fit(lightning.EverstepCallback(), alone).auto_requeue
    assert all(one != before for one in alone)

    monkeypatch.setattr(lightning, "current", object)  # there is a supervisor
    supervised: list[Any] = []
    assert not lightning_fit(lightning.EverstepCallback(), supervised).auto_requeue
    assert supervised == [before] * 8
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before


def test_lightning_ends_early_goes_on_and_has_nothing_left(tmp_path: Path) -> None:
    from supervisor.training.integrations.lightning import EverstepCallback

    seen: list[Any] = []
    for stop, steps in ((True, 3), (False, 7), (False, 7)):
        lightning_fit(EverstepCallback(dir=tmp_path), seen, stop=stop)
        assert len(seen) == steps
    assert max(record.step for record in catalog.list_checkpoints(tmp_path / "checkpoints")) == 7


def test_transformers_two_that_say_where_to_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import Trainer, TrainingArguments

    from supervisor.training.integrations.transformers import EverstepCallback

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 1)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": nn.functional.mse_loss(self.net(x), labels)}

    def trainer(**given: Any) -> Any:
        arguments = TrainingArguments(
            str(tmp_path), max_steps=4, per_device_train_batch_size=2, report_to="none", use_cpu=True,
            disable_tqdm=True, **given,
        )  # fmt: skip
        rows = [{"x": x, "labels": y} for x, y in data()]
        return Trainer(Net(), arguments, train_dataset=rows)

    own = trainer(save_strategy="steps", save_steps=2)
    own.add_callback(EverstepCallback(own, own_saves=True, dir=tmp_path / "d"))
    own.train()
    assert (tmp_path / "checkpoint-2").exists()
    both = trainer(save_strategy="no")
    both.add_callback(EverstepCallback(both))
    with pytest.raises(UsageError, match="leave the former out"):
        both.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
