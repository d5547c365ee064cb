"""One unbroken curve in TensorBoard, however often the job was killed.

    pip install tensorboard
    everstep run --snapshot-every 20steps python examples/tensorboard_curve.py
    tensorboard --logdir everstep-runs/tensorboard_curve/tensorboard

Two things make it so. What is logged is on disk before a state of that step is: the Session asks every object that it keeps for
its state at each save point, and this one flushes then. And what a dead attempt has logged beyond that state is taken back:
``purge_step`` is the step that this attempt goes on from.

Other trackers go on by the name of the run, which is the same in every attempt, and by the step that is passed to them:

    wandb.init(id=os.environ["EVERSTEP_RUN_ID"], resume="allow");   wandb.log({"loss": loss}, step=step)
    run = mlflow.start_run(run_id=session.state.get("mlflow"));     mlflow.log_metric("loss", loss, step=step)
    session.state["mlflow"] = run.info.run_id

``EVERSTEP_ATTEMPT`` is the number of the attempt, ``EVERSTEP_STEP`` (once the Session is entered) where it goes on from.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from supervisor.training import Session


class Curve:
    """A writer of TensorBoard's, to be kept by a Session; ``begin`` it once the Session is entered."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: SummaryWriter | None = None

    def begin(self, step: int) -> None:
        """Go on at ``step``: what was logged of it and later ones counts no more."""
        self.writer = SummaryWriter(str(self.folder), purge_step=step)

    def add(self, step: int, **values: float) -> None:
        """Log values of one step."""
        assert self.writer is not None
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        assert self.writer is not None
        self.writer.close()

    def state_dict(self) -> dict[str, Any]:
        """Nothing; but whatever was logged is on disk now, before the state is."""
        if self.writer is not None:
            self.writer.flush()
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do: ``begin`` is told the step."""


def main() -> None:
    """Fit a small network to a noisy curve."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds a step, to have time to kill it")
    parser.add_argument("--folder", type=Path, help="default: tensorboard in the job directory")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Dropout(0.05), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    curve = Curve(arguments.folder or Path(os.environ.get("EVERSTEP_DIR", "runs")) / "tensorboard")
    with Session(model=model, optimizer=optimizer, curve=curve) as session:
        curve.begin(session.step)
        for step in session.steps(arguments.steps):
            x = torch.rand(64, 1) * 6 - 3
            loss = (model(x) - torch.sin(x) - 0.1 * torch.randn(64, 1)).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            curve.add(step, loss=loss.item(), grad_norm=norm.item())
            session.log(loss=loss, grad_norm=norm)
            time.sleep(arguments.pause)
    curve.close()


if __name__ == "__main__":
    main()
