"""The state of a Keras model as tensors by path, whatever the backend; and what of a callback is plain."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from supervisor.errors import StateMismatchError

_PRIVATE = frozenset(
    {"_model", "model", "params", "_params", "validation_data"}
    | {
        "min_delta"
    }  # which Keras gives its sign anew when a callback first finds out in which direction its metric goes
)


class Variables:
    """A Stateful over the variables of a model, its optimizer and its metrics."""

    def __init__(self, model: Any, *, weights_only: bool) -> None:
        self._model = model
        self._weights_only = weights_only
        self._metrics: dict[str, torch.Tensor] = {}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Tensors by path: those in use where the backend is torch, else copies."""
        return {name: _tensor_of(variable) for name, variable in self._named()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Assign them all, or none. Raises StateMismatchError for what is not the model's.

        By path; or, where only the paths differ (Keras counts the models of a process to name them), by order. Metrics that
        the model has not made yet are let go.
        """
        present = dict(self._named())
        renamed: dict[str, str] = {}  # stored names by present ones
        for kind in ("model", "optimizer", "metrics"):
            here = [name for name in present if name.startswith(f"{kind}/")]
            stored = [name for name in state if name.startswith(f"{kind}/")]
            if set(here) <= set(stored) or len(here) != len(stored):
                renamed |= {name: name for name in here if name in state}
            else:
                renamed |= dict(zip(here, stored, strict=True))
            if kind != "metrics" and len(here) != len(stored):
                raise StateMismatchError(
                    f"the checkpoint has {len(stored)} variables of the {kind}, here are {len(here)}"
                )
        for name, stored_name in renamed.items():
            shape, here_shape = tuple(state[stored_name].shape), tuple(present[name].shape)
            if shape != here_shape:
                raise StateMismatchError(f"{stored_name} is {shape} in the checkpoint, here {here_shape}")
        for name, stored_name in renamed.items():
            _assign(present[name], state[stored_name])
        self._metrics = {name: value.clone() for name, value in state.items() if name.startswith("metrics/")}

    @property
    def lacks_metrics(self) -> bool:
        """Whether metrics were loaded that the model has not made yet."""
        return not self._metrics.keys() <= dict(self._named()).keys()

    def put_metrics(self) -> None:
        """Give the metrics the values that were loaded, once more."""
        for name, variable in self._named():
            if name in self._metrics:
                _assign(variable, self._metrics[name])

    def _named(self) -> Iterator[tuple[str, Any]]:
        model = self._model
        kinds = {"model": model.variables}
        if not self._weights_only:
            optimizer = getattr(model, "optimizer", None)
            kinds["optimizer"] = [] if optimizer is None else optimizer.variables
            kinds["metrics"] = model.metrics_variables
        for kind, variables in kinds.items():
            seen: dict[str, int] = {}
            for variable in variables:
                count = seen[variable.path] = seen.get(variable.path, 0) + 1
                yield f"{kind}/{variable.path}" + (f"#{count}" if count > 1 else ""), variable


def _tensor_of(variable: Any) -> torch.Tensor:
    value = variable.value
    if isinstance(value, torch.Tensor):
        return value.detach()
    array = np.array(value.numpy())
    if array.dtype.name == "bfloat16":  # ml_dtypes', which torch does not know
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _assign(variable: Any, tensor: torch.Tensor) -> None:
    value = variable.value
    if isinstance(value, torch.Tensor):
        with torch.no_grad():
            value.copy_(tensor)
        return
    if tensor.dtype is torch.bfloat16:
        variable.assign(tensor.view(torch.uint16).numpy().view(value.dtype.as_numpy_dtype))
    else:
        variable.assign(tensor.numpy())


def plain_attributes(one: object) -> dict[str, Any]:
    """The attributes of an object that are numbers, text, arrays, or lists and dicts of them."""
    return {
        name: _plain(value) for name, value in vars(one).items() if name not in _PRIVATE and _is_plain(value)
    }


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    return value is None or isinstance(value, (bool, int, float, str)) or type(value).__module__ == "numpy"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return list(value)
    return value
