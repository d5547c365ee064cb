"""A Keras 3 model learns two spirals apart. ``fit`` as ever, with one callback more.

    everstep run python examples/train_keras.py
    KERAS_BACKEND=tensorflow everstep run python examples/train_keras.py
    python examples/train_keras.py                     # works as well: nothing is saved then

Kill it as often as you like: the digest of the final weights is the same.
"""

from __future__ import annotations

import argparse
import hashlib
import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np

from supervisor.training.integrations.keras import EverstepCallback  # everstep


def spirals(points: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Points on two noisy spirals, (points, 2), and which spiral each is on, (points,)."""
    generator = np.random.default_rng(seed)
    angle = 3 * np.pi * np.sqrt(generator.random(points))
    which = generator.integers(0, 2, points)
    radius = angle * (2 * which - 1)
    x = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return (x / 9 + generator.normal(0, 0.02, x.shape)).astype("float32"), which.astype("float32")


def make_model() -> keras.Model:
    """A perceptron with dropout and batch normalisation: both have a state of their own."""
    model = keras.Sequential(
        [
            keras.Input((2,)),
            keras.layers.Dense(32, activation="tanh"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.1),
            keras.layers.Dense(32, activation="tanh"),
            keras.layers.Dense(1),
        ]
    )
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(3e-3, 2000)),
        loss=keras.losses.BinaryCrossentropy(from_logits=True),
        metrics=[keras.metrics.BinaryAccuracy(threshold=0.0, name="accuracy")],
    )
    return model


def digest(model: keras.Model) -> str:
    """One line that two runs share only if every bit of their weights is the same."""
    total = hashlib.sha256()
    for weights in model.get_weights():
        total.update(np.ascontiguousarray(weights).tobytes())
    return total.hexdigest()[:32]


def main() -> None:
    """Read the arguments, train, print a digest."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-session", action="store_true", help="train without everstep, for comparison")
    arguments = parser.parse_args()

    keras.utils.set_random_seed(arguments.seed)
    model = make_model()
    callbacks = [] if arguments.no_session else [EverstepCallback(monitor="val_loss", save_best_only=True)]
    history = model.fit(
        *spirals(1024, seed=1), validation_data=spirals(256, seed=2),
        epochs=arguments.epochs, batch_size=32, shuffle=True, verbose=0, callbacks=callbacks,
    )  # fmt: skip
    print(f"val_accuracy {history.history['val_accuracy'][-1]:.3f} after {len(history.epoch)} epochs")
    print(f"final weights {digest(model)}", flush=True)


if __name__ == "__main__":
    main()
