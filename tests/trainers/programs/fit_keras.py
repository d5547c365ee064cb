"""A fit with EverstepCallback, then the same fit without anything of everstep."""

from __future__ import annotations

import os
import sys

os.environ["KERAS_BACKEND"] = sys.argv[1]

import keras
import numpy as np
import torch

from supervisor.training.integrations.keras import EverstepCallback
from tests.trainers.programs import striking

EPOCHS, BATCHES, SIZE = 4, 12, 8


class Strike(keras.callbacks.Callback):
    def __init__(self, everstep: EverstepCallback) -> None:
        super().__init__()
        self.everstep = everstep

    def on_train_batch_end(self, batch: int, logs: object = None) -> None:
        if self.everstep.session.step > 0 and not self.everstep.is_passing_over:
            striking.strike(self.everstep.session)


def fit(everstep: bool) -> dict[str, object]:
    keras.utils.set_random_seed(3)
    generator = np.random.default_rng(0)
    x = generator.normal(size=(BATCHES * SIZE, 4)).astype("float32")
    y = (x.sum(axis=1) > 0).astype("float32")
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(8, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(1),
        ]
    )
    model.compile(
        keras.optimizers.Adam(0.01), loss=keras.losses.BinaryCrossentropy(from_logits=True),
        metrics=[keras.metrics.BinaryAccuracy(name="accuracy")],
    )  # fmt: skip
    plateau = keras.callbacks.ReduceLROnPlateau("val_loss", factor=0.5, patience=1, min_delta=0.1)
    callbacks: list[keras.callbacks.Callback] = [plateau]
    if everstep:
        ours = EverstepCallback(monitor="val_loss", save_best_only=True, keep=[plateau])
        callbacks += [Strike(ours), ours]
    history = model.fit(
        x, y, validation_data=(x[:16], y[:16]), epochs=EPOCHS, batch_size=SIZE, verbose=0, callbacks=callbacks,
        shuffle=keras.backend.backend() == "torch",  # TensorFlow's order has no state that could be kept
    )  # fmt: skip
    weights = [torch.from_numpy(np.ascontiguousarray(w)) for w in model.get_weights()]
    optimizer = [torch.from_numpy(np.array(keras.ops.convert_to_numpy(v))) for v in model.optimizer.variables]
    return {
        "weights": striking.digest(weights),
        "optimizer": striking.digest(tensor.reshape(-1) for tensor in optimizer if tensor.numel()),
        "history": {name: [float(v) for v in values] for name, values in history.history.items()},
    }


if __name__ == "__main__":
    kept = fit(everstep=True)
    striking.tell(kept=kept, plain=fit(everstep=False), backend=keras.backend.backend())
