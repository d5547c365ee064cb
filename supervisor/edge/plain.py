"""Frozen dataclasses to plain JSON values and back, by their annotations.

Enums become their values, tuples lists, nested dataclasses objects. JSON has no NaN and no infinities (a loss can be one):
they become the strings "nan", "inf" and "-inf". Decoding checks every value against its annotation, ignores unknown
fields, and takes the default of a field that is missing.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
Decoder = Callable[[Any], Any]


def to_plain(value: Any) -> Any:
    """``value`` as dicts, lists, strings and numbers that ``json`` writes as they are."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def to_sparse(value: Any) -> Any:
    """As ``to_plain``, without the fields of dataclasses that have their default: for what is said thousands of times."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found = {}
        for name, default in _defaults(type(value)):
            content = getattr(value, name)
            if default is dataclasses.MISSING or content != default:
                found[name] = to_sparse(content)
        return found
    if isinstance(value, tuple | list):
        return [to_sparse(item) for item in value]
    return to_plain(value)


@functools.cache
def _defaults(kind: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(
        (
            field.name,
            field.default if field.default_factory is dataclasses.MISSING else field.default_factory(),
        )
        for field in dataclasses.fields(kind)
    )


def from_plain(kind: type[T], plain: dict[str, Any]) -> T:
    """A dataclass of type ``kind``. Raises ValueError naming the field that is missing or of the wrong type."""
    decoders, required = _fields(typing.cast(Any, kind))
    values: dict[str, Any] = {}
    for name, value in plain.items():
        if (decode := decoders.get(name)) is not None:
            try:
                values[name] = decode(value)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{kind.__name__}.{name}: {error}") from None
    if not required <= values.keys():
        raise ValueError(
            f"{kind.__name__} lacks {next(name for name in decoders if name in required - values.keys())!r}"
        )
    return kind(**values)


@functools.cache
def _fields(kind: Any) -> tuple[dict[str, Decoder], frozenset[str]]:
    """What decodes each field, and the names of those that have no default."""
    hints = typing.get_type_hints(kind)
    fields = dataclasses.fields(kind)
    required = frozenset(
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    )
    return {field.name: _decoder(hints[field.name]) for field in fields}, required


def _decoder(annotation: Any) -> Decoder:
    """What checks and decodes a value of this annotation: looked up once, for a journal can hold 100 000 facts."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        (wanted,) = (argument for argument in arguments if argument is not types.NoneType)
        decode = _decoder(wanted)
        return (
            decode
            if types.NoneType not in arguments
            else lambda plain: None if plain is None else decode(plain)
        )
    if origin is tuple:
        item = _decoder(arguments[0])
        return lambda plain: tuple([item(part) for part in _checked(plain, list)])
    if origin is dict:
        item = _decoder(arguments[1])
        return lambda plain: {key: item(part) for key, part in _checked(plain, dict).items()}
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return lambda plain: from_plain(annotation, _checked(plain, dict))
    if issubclass(annotation, enum.Enum):
        return typing.cast(Decoder, annotation)
    if annotation is float:
        return _float
    return _int if annotation is int else lambda plain: _checked(plain, annotation)


def _float(plain: Any) -> float:
    if type(plain) is float:
        return plain
    if isinstance(plain, bool) or not (isinstance(plain, int | float) or plain in ("nan", "inf", "-inf")):
        raise ValueError(f"{plain!r} is no number")
    return float(plain)


def _int(plain: Any) -> int:
    if type(plain) is int:
        return plain
    if isinstance(plain, bool):
        raise TypeError(f"{plain!r} is no int")
    return _checked(plain, int)


def _checked(plain: Any, kind: type[T]) -> T:
    if isinstance(plain, kind):
        return plain
    raise TypeError(f"{plain!r} is no {kind.__name__}")
