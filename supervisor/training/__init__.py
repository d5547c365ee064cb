"""What runs inside a worker: ``Session`` keeps a training's state, so that it can be killed and resumed bit for bit."""

from __future__ import annotations

from supervisor.training.keeper import Stopped
from supervisor.training.session import Session

__all__ = ["Session", "Stopped"]
