"""``EverstepCallback`` for Keras 3: ``model.fit(…, callbacks=[…, EverstepCallback()])``, on the torch and TensorFlow backends.

    from supervisor.training.integrations.keras import EverstepCallback

    model.fit(x, y, epochs=20, callbacks=[EverstepCallback(monitor="val_loss", save_best_only=True)])

Every variable of the model, its optimizer and its metrics goes into the Session by its path, as a tensor: torch writes the
checkpoint whatever the backend. Seeds of layers (dropout) are variables of the model, so they go with it.

*Where a run resumes* is an epoch and a batch inside it. The epoch's data are iterated again up to that batch, with the random
state that the epoch began with, and those batches are not trained on. So the order of the data is that of the undisturbed run
where it follows from the random state of Python, NumPy and torch (the torch backend's ``shuffle=True``), or from the index and
the epoch. TensorFlow's own random operations have no state that could be asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal, Unpack

from supervisor.errors import UsageError
from supervisor.training import rng
from supervisor.training.integrations.hosted import Hosted, Options, missing
from supervisor.training.integrations.kerasstate import Variables, plain_attributes
from supervisor.training.session import Session

try:
    import keras
except ImportError as error:
    raise missing("keras (and a backend: torch or tensorflow)", "keras", error) from error

_BACKENDS: Final = ("torch", "tensorflow")


class EverstepCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Keeps the state of a ``fit``, and resumes it. Give it last; it may be used for one ``fit`` after the other.

    ``monitor``, ``mode``, ``save_freq``, ``save_best_only``, ``save_weights_only`` and ``initial_value_threshold`` mean what
    they mean for ``keras.callbacks.ModelCheckpoint``; what is saved is a checkpoint of everstep. They ask for checkpoints
    *beside* those that a supervisor (or ``checkpoint_every``) makes by itself.

    Args:
        monitor: The name of a metric in the logs.
        mode: ``min``, ``max``, or ``auto``: by the metric.
        save_freq: ``epoch``, or a number of batches.
        save_best_only: Ask only when ``monitor`` has improved. Which checkpoints are *kept* is ``keep_best``'s business.
        save_weights_only: Leave the optimizer out: smaller, and a resumed run is not exact.
        initial_value_threshold: ``monitor`` must be better than this to be the best.
        keep: Other callbacks whose plain attributes (numbers, text, arrays, lists and dicts of them) are part of the state:
            EarlyStopping, ReduceLROnPlateau.
        options: Those of Session: ``dir``, ``checkpoint_every``, ``keep_last``, ``keep_every``, ``keep_best``.

    Raises:
        UsageError: an argument that is not understood; another backend than torch and TensorFlow.
    """

    def __init__(
        self,
        *,
        monitor: str = "val_loss",
        mode: Literal["auto", "min", "max"] = "auto",
        save_freq: int | Literal["epoch"] = "epoch",
        save_best_only: bool = False,
        save_weights_only: bool = False,
        initial_value_threshold: float | None = None,
        keep: Iterable[Any] = (),
        **options: Unpack[Options],
    ) -> None:
        super().__init__()
        if keras.backend.backend() not in _BACKENDS:
            raise UsageError(
                f"the Keras backend is {keras.backend.backend()!r}: one of {', '.join(_BACKENDS)} is required"
            )
        if mode not in ("auto", "min", "max"):
            raise UsageError(f"mode={mode!r}: one of auto, min, max is required")
        given: object = save_freq
        if given != "epoch" and not (isinstance(given, int) and given > 0):
            raise UsageError(
                f"save_freq={save_freq!r}: 'epoch' or a number of batches, 1 or more, is required"
            )
        self.monitor, self.mode, self.save_freq = monitor, mode, save_freq
        self.save_best_only, self.save_weights_only = save_best_only, save_weights_only
        self._threshold = initial_value_threshold
        self._kept = list(keep)
        self._hosted = Hosted(options)
        self._skip = 0  # batches of the epoch resumed at that are still to be passed over
        self._resumed_epoch: int | None = None

    @property
    def session(self) -> Session:
        """The Session, while ``fit`` runs. Raises UsageError at other times."""
        return self._hosted.session

    @property
    def is_passing_over(self) -> bool:
        """Whether the present batch was trained on before: other callbacks are called for it, too."""
        return self._skip > 0

    # ------------------------------------------------------------------ fit begins and ends

    def on_train_begin(self, logs: Any = None) -> None:
        """Enter the Session: resume, if there is something to resume from."""
        if not self.model.built:
            raise UsageError("the model is not built: call it on a batch, or give it an Input, before fit()")
        optimizer = getattr(self.model, "optimizer", None)
        if optimizer is not None and not optimizer.built:
            optimizer.build(self.model.trainable_variables)
        self._variables = Variables(self.model, weights_only=self.save_weights_only)
        self._position: dict[str, Any] = {
            "epoch": None, "batch": 0, "first_epoch": None, "rng": None, "best": self._threshold,
            "batches_since": 0, "last_batch": None, "others": {},
        }  # fmt: skip
        session = self._hosted.enter({"keras": self._position}, keras_model=self._variables)
        self._position = session.state["keras"]
        self._skip = 0
        self._resumed_epoch = None
        if session.resumed:
            self._resumed_epoch = int(self._position["epoch"])
            self._skip = int(self._position["batch"])
            self.model._initial_epoch = self._resumed_epoch  # as BackupAndRestore does
        self._train = self.model.train_function

    def on_train_end(self, logs: Any = None) -> None:
        """The training is complete, or was stopped by a callback: save its end."""
        self.model._initial_epoch = None  # else the next fit would begin there
        if self._hosted.is_pending:
            self._position["others"] = self._others()
        elif self._resumed_epoch is not None:  # there was nothing left to train
            self._take_others()
        self._hosted.leave()

    # ------------------------------------------------------------------ epochs

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """End the step before; the random state of the epoch's begin is the one its data follow from."""
        position = self._position
        if position["first_epoch"] is None:
            position["first_epoch"] = epoch
        self._total = self._steps_in_all()
        if epoch == self._resumed_epoch:
            self._take_others()
        if epoch == self._resumed_epoch and self._skip:
            self._variables.put_metrics()  # Keras has just reset them
            rng.restore(position["rng"])
            return
        if self._hosted.is_pending:
            position["others"] = self._others()  # all of them have seen the end of the epoch before
        self._hosted.begin(
            self._total
        )  # restores the random state, which the order of the data may follow from
        position |= {"epoch": epoch, "batch": 0, "rng": rng.capture()}

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """A checkpoint, if one is wanted; the step ends when the next epoch begins, after all callbacks have run."""
        self._log(logs)
        self._position |= {"epoch": epoch + 1, "batch": 0}
        if self.save_freq == "epoch" and self._is_worth_it(logs):
            self.session.save()

    # ------------------------------------------------------------------ batches

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """A step begins, unless the batch was trained on before."""
        if self._skip:
            self.model.train_function = self._pass_over
            return
        self.model.train_function = self._train
        self._hosted.begin(self._total)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """A step's work is done; a checkpoint, if one is wanted."""
        if self._skip:
            self._skip -= 1
            return
        self._position["batch"] += 1
        self._log(logs)
        self._hosted.done()
        if self._is_due(batch) and self._is_worth_it(logs):
            self.session.save()

    def on_test_begin(self, logs: Any = None) -> None:
        """An evaluation has other hang limits."""
        self._hosted.evaluate(on=True)

    def on_test_end(self, logs: Any = None) -> None:
        """Back to training."""
        self._hosted.evaluate(on=False)

    def _pass_over(self, data: Any) -> dict[str, Any]:
        """In the place of the train function: take the data and do nothing with them."""
        if keras.backend.backend() == "tensorflow":
            batches = [next(data) for _ in range(self.model.steps_per_execution)]
            if self._variables.lacks_metrics:  # this backend makes them with the first batch it computes on
                self.model.test_on_batch(*keras.utils.unpack_x_y_sample_weight(batches[0]))
                self._variables.put_metrics()
        return dict(self.model.get_metrics_result())

    # ------------------------------------------------------------------ what ModelCheckpoint would do

    def _is_due(self, batch: int) -> bool:
        """Whether ``save_freq`` batches have gone by; as ModelCheckpoint counts with several steps per execution."""
        if not isinstance(self.save_freq, int):
            return False
        position, last = self._position, self._position["last_batch"]
        position["batches_since"] += batch + 1 if last is None or batch <= last else batch - last
        position["last_batch"] = batch
        if position["batches_since"] < self.save_freq:
            return False
        position["batches_since"] = 0
        return True

    def _is_worth_it(self, logs: Mapping[str, Any] | None) -> bool:
        if not self.save_best_only:
            return True
        value = (logs or {}).get(self.monitor)
        if value is None:
            raise UsageError(
                f"save_best_only is set, but the logs have no {self.monitor!r}: they have {', '.join(logs or {}) or 'nothing'}"
            )
        best, value = self._position["best"], float(value)
        up = self.mode == "max" or (self.mode == "auto" and _rises(self.model, self.monitor))
        if best is not None and not (value > best if up else value < best):
            return False
        self._position["best"] = value
        return True

    # ------------------------------------------------------------------ odds and ends

    def _steps_in_all(self) -> int | None:
        steps, epochs = self.params.get("steps"), self.params.get("epochs")
        if steps is None or epochs is None:
            return None
        each = -(-steps // getattr(self.model, "steps_per_execution", 1))
        return int((epochs - self._position["first_epoch"]) * each)

    def _log(self, logs: Mapping[str, Any] | None) -> None:
        if logs:
            self.session.log(**logs)

    def _others(self) -> dict[str, Any]:
        kept = {
            f"{index}:{type(one).__name__}": plain_attributes(one) for index, one in enumerate(self._kept)
        }
        history = self.model.history
        return kept | {"history": {"epoch": list(history.epoch), "history": _copied(history.history)}}

    def _take_others(self) -> None:
        """After their own ``on_train_begin``, which sets them back."""
        stored = self._position["others"]
        for index, one in enumerate(self._kept):
            vars(one).update(stored.get(f"{index}:{type(one).__name__}", {}))
        if "history" in stored:
            history = self.model.history
            history.epoch = list(stored["history"]["epoch"])
            history.history = _copied(stored["history"]["history"])


def _copied(history: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    return {name: [float(value) for value in values] for name, values in history.items()}


def _rises(model: Any, monitor: str) -> bool:
    """Whether more of the metric is better, as ModelCheckpoint finds out. Raises UsageError where it cannot be known."""
    name = monitor.removeprefix("val_")
    for metric in model.metrics:
        for one in (metric, *getattr(metric, "metrics", ())):
            if one.name == name and hasattr(one, "_direction"):
                return bool(one._direction == "up")
    if name == "loss":
        return False
    raise UsageError(
        f"whether {monitor!r} should rise or fall is not known: mode='min' or mode='max' is required"
    )
