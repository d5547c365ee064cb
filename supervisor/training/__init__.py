"""What runs inside a worker: ``Session`` keeps a training's state, so that it can be killed and resumed bit for bit."""

from __future__ import annotations

from supervisor.training.session import Session, Stopped

__all__ = ["Session", "Stopped"]
