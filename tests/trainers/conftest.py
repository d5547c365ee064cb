"""Whoever imports Keras first in a test process, of any library that looks whether it is there, settles its backend."""

from __future__ import annotations

import os

os.environ.setdefault("KERAS_BACKEND", "torch")
