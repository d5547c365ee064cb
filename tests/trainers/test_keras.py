"""EverstepCallback's arguments, on the torch backend, as a plain library: what is saved when, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from supervisor.checkpoint import catalog
from supervisor.errors import ConfigError, StateMismatchError, UsageError

pytestmark = pytest.mark.xdist_group("keras")
BATCHES = 4


class InterruptedHereError(Exception):
    """The fault."""


@pytest.fixture(scope="module")
def keras() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "torch")
        import keras
    assert keras.backend.backend() == "torch"
    return keras


@pytest.fixture(scope="module")
def callback_type(keras: Any) -> Any:
    from supervisor.training.integrations.keras import EverstepCallback

    return EverstepCallback


def model_of(keras: Any, width: int = 3) -> Any:
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((2,)), keras.layers.Dense(width, name="hidden"), keras.layers.Dense(1, name="out")]
    )
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss="mse", metrics=["mae"])
    return model


def fit(model: Any, *callbacks: Any, epochs: int = 3) -> Any:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(BATCHES * 2, 2)).astype("float32")
    return model.fit(
        x, x.sum(axis=1), validation_data=(x, x.sum(axis=1)), epochs=epochs, batch_size=2, verbose=0,
        callbacks=list(callbacks),
    )  # fmt: skip


def saved(root: Path) -> list[int]:
    return sorted(record.step for record in catalog.list_checkpoints(root / "checkpoints"))


def stop_after(keras: Any, batches: int) -> Any:
    seen = []

    def count(batch: int, logs: object) -> None:
        seen.append(batch)
        if len(seen) == batches:
            raise InterruptedHereError

    return keras.callbacks.LambdaCallback(on_train_batch_end=count)


OPTIONS: dict[str, Any] = {"checkpoint_every": "never", "keep_last": 99}


@pytest.mark.parametrize(
    ("save_freq", "steps"), [("epoch", [4, 8, 12]), (5, [5, 10, 12]), (4, [4, 8, 12]), (99, [12])]
)
def test_save_freq(
    keras: Any, callback_type: Any, tmp_path: Path, save_freq: int | str, steps: list[int]
) -> None:
    fit(model_of(keras), callback_type(dir=tmp_path, save_freq=save_freq, **OPTIONS))
    assert saved(tmp_path) == steps


@pytest.mark.parametrize(
    ("mode", "threshold"), [("min", None), ("auto", None), ("max", None), ("min", 0.0), ("max", 0.0)]
)
def test_save_best_only(
    keras: Any, callback_type: Any, tmp_path: Path, mode: str, threshold: float | None
) -> None:
    """As it stands in the history; the last step is saved in any case."""
    ours = callback_type(
        dir=tmp_path, monitor="val_loss", mode=mode, save_best_only=True, initial_value_threshold=threshold,
        **OPTIONS,
    )  # fmt: skip
    best, expected = threshold, set()
    for epoch, loss in enumerate(fit(model_of(keras), ours, epochs=4).history["val_loss"], 1):
        if best is None or (loss > best if mode == "max" else loss < best):
            best = loss
            expected.add(epoch * BATCHES)
    assert saved(tmp_path) == sorted(expected | {4 * BATCHES})


def test_broken_off_in_an_epoch_it_goes_on_there(keras: Any, callback_type: Any, tmp_path: Path) -> None:
    undisturbed = model_of(keras)
    history = fit(undisturbed).history
    options = {"dir": tmp_path, "checkpoint_every": "1steps", "keep_last": 99}
    with pytest.raises(InterruptedHereError):
        fit(model_of(keras), callback_type(**options), stop_after(keras, 7))
    resumed = model_of(keras)
    again = fit(resumed, callback_type(**options)).history
    assert again == history
    assert all(map(np.array_equal, resumed.get_weights(), undisturbed.get_weights()))

    complete = model_of(keras)  # killed after its last step: nothing is left to train, and the script goes on
    assert fit(complete, callback_type(**options)).history == history
    assert all(map(np.array_equal, complete.get_weights(), undisturbed.get_weights()))

    undisturbed = model_of(keras)
    history = fit(undisturbed, epochs=5).history
    longer = model_of(keras)
    assert fit(longer, callback_type(**options), epochs=5).history == history
    assert all(map(np.array_equal, longer.get_weights(), undisturbed.get_weights()))


def test_other_callbacks_go_on_where_they_were(keras: Any, callback_type: Any, tmp_path: Path) -> None:
    """The rate falls after every epoch but the first: no improvement is large enough."""

    def plateau() -> Any:
        return keras.callbacks.ReduceLROnPlateau("val_loss", factor=0.5, patience=1, min_delta=1e6)

    history = fit(model_of(keras), plateau(), epochs=4).history
    assert len(set(history["learning_rate"])) == 3
    kept = plateau()
    ours = callback_type(dir=tmp_path, checkpoint_every="1steps", keep=[kept])
    with pytest.raises(InterruptedHereError):
        fit(model_of(keras), kept, ours, stop_after(keras, 7), epochs=4)
    kept = plateau()
    ours = callback_type(dir=tmp_path, checkpoint_every="1steps", keep=[kept])
    assert fit(model_of(keras), kept, ours, epochs=4).history == history


def test_an_early_end_is_an_end(keras: Any, callback_type: Any, tmp_path: Path) -> None:
    early = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: setattr(model, "stop_training", True)
    )
    model = model_of(keras)
    fit(model, early, callback_type(dir=tmp_path, save_freq=99, **OPTIONS))
    assert saved(tmp_path) == [4]


def test_weights_only(keras: Any, callback_type: Any, tmp_path: Path) -> None:
    fit(model_of(keras), callback_type(dir=tmp_path, save_weights_only=True, **OPTIONS))
    with pytest.raises(StateMismatchError, match="0 variables of the optimizer, here are "):
        fit(model_of(keras), callback_type(dir=tmp_path, **OPTIONS))
    model = model_of(keras)
    fit(model, callback_type(dir=tmp_path, save_weights_only=True, **OPTIONS))
    trained = model_of(keras)
    fit(trained)
    assert all(map(np.array_equal, model.get_weights(), trained.get_weights()))


def test_another_model_is_named(keras: Any, callback_type: Any, tmp_path: Path) -> None:
    fit(model_of(keras), callback_type(dir=tmp_path, **OPTIONS))
    with pytest.raises(
        StateMismatchError, match=r"hidden/kernel is \(2, 3\) in the checkpoint, here \(2, 5\)"
    ):
        fit(model_of(keras, width=5), callback_type(dir=tmp_path, **OPTIONS))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"save_freq": 0}, "'epoch' or a number of batches, 1 or more"),
        ({"save_freq": "batch"}, "'epoch' or a number of batches, 1 or more"),
        ({"mode": "most"}, "one of auto, min, max"),
        ({"save_every": 3}, "'save_every' is no option of this callback"),
        ({"checkpoint_every": "often"}, "50steps"),
    ],
)
def test_bad_arguments_are_refused(callback_type: Any, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises((UsageError, ConfigError), match=says):
        callback_type(**arguments)


def test_a_metric_that_is_not_there_is_named(keras: Any, callback_type: Any, tmp_path: Path) -> None:
    ours = callback_type(dir=tmp_path, monitor="val_f1", mode="max", save_best_only=True)
    with pytest.raises(UsageError, match=r"no 'val_f1': they have .*val_loss"):
        fit(model_of(keras), ours)


def test_a_direction_that_cannot_be_known_is_asked_for(
    keras: Any, callback_type: Any, tmp_path: Path
) -> None:
    named = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(score=1.0))
    ours = callback_type(dir=tmp_path, monitor="score", save_best_only=True)
    with pytest.raises(UsageError, match="mode='min' or mode='max' is required"):
        fit(model_of(keras), named, ours)
