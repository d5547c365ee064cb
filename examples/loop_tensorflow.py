"""A TensorFlow loop (``tf.GradientTape``) of one's own: its variables are kept as arrays, and steps are counted by hand.

everstep run python examples/loop_tensorflow.py
python examples/loop_tensorflow.py                 # works as well: nothing is saved then
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow as tf
import torch

from supervisor.training import Session  # everstep

FEATURES = 16


class Variables:
    """TensorFlow variables by number, as a Session wants to see them."""

    def __init__(self, variables: Iterable[Any]) -> None:
        self.variables = list(variables)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copies."""
        return {str(i): torch.from_numpy(np.array(v.numpy())) for i, v in enumerate(self.variables)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Assign them."""
        for index, variable in enumerate(self.variables):
            variable.assign(state[str(index)].numpy())


def main() -> None:
    """Logistic regression by gradient descent with momentum; the batch follows from the step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()

    weights = tf.Variable(tf.zeros((FEATURES, 1)))
    velocity = tf.Variable(tf.zeros((FEATURES, 1)))

    @tf.function  # type: ignore[untyped-decorator]
    def train_step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(y, x @ weights))
        velocity.assign(0.9 * velocity - 0.1 * tape.gradient(loss, weights))
        weights.assign_add(velocity)
        return loss

    with Session(variables=Variables([weights, velocity])) as session:  # everstep
        session.begin(arguments.steps)  # everstep
        while session.step < arguments.steps:
            generator = np.random.default_rng(session.step)
            x = generator.normal(size=(32, FEATURES)).astype("float32")
            loss = train_step(x, (x.sum(axis=1, keepdims=True) > 0).astype("float32"))
            session.log(loss=float(loss))
            session.advance()  # everstep

    print(f"final weights {hashlib.sha256(weights.numpy().tobytes()).hexdigest()[:32]}", flush=True)


if __name__ == "__main__":
    main()
