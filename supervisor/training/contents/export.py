"""A checkpoint, or its weights, in the files that other programs read: safetensors (one or several), ``torch.save``.

The file's ending says which. A target appears complete or not at all: it is written beside, synced, and renamed.

safetensors are written block by block, so memory does not grow with the model; the reference implementation then opens the
file (which checks its header against its size) before it gets its name. A directory gets what Hugging Face's
``save_pretrained`` writes: ``model.safetensors``, or shards of at most ``max_shard_size`` and their index. ``torch.save``
needs all that is exported in memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint._nested_dict import unflatten_state_dict

from supervisor.checkpoint.directory import sync_directory
from supervisor.errors import CheckpointError, StorageError, UsageError
from supervisor.training import trees
from supervisor.training.contents.opened import Contents, Item, UnsafeError
from supervisor.training.contents.raw import memory_of
from supervisor.training.contents.selection import Selection, select

SAFETENSORS: Final = ".safetensors"
TORCH: Final = (".pt", ".pth")
SHARD_SIZE: Final = 5 * 10**9
_INDEX: Final = "model.safetensors.index.json"
_UNITS: Final = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SIZE: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?) *([KMGT]?)(i?)B?", re.IGNORECASE)
_DTYPES: Final = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written: the files, how many tensors and bytes of them, and the keys that were left out."""

    files: list[Path]
    tensors: int
    bytes: int
    other_ranks: list[str]  # another rank's item of the same name was taken
    objects: list[str]  # a safetensors file holds tensors only


def parse_size(text: str) -> int:
    """Bytes in ``5GB``, ``500MB``, ``2GiB``. Raises UsageError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or not float(match[1]):
        raise UsageError(f"{text!r} is not a size: 5GB, 500MB or 2GiB is")
    factor = _UNITS[match[2].upper()]
    if match[3]:
        factor = {1: 1, 10**3: 2**10, 10**6: 2**20, 10**9: 2**30, 10**12: 2**40}[factor]
    return max(1, int(float(match[1]) * factor))


def check_target(target: Path, max_shard_size: int | None) -> None:
    """Refuse a target that cannot be written. Raises UsageError."""
    suffix = target.suffix.lower()
    if target.is_dir():
        if any(target.iterdir()):
            raise UsageError(f"{target} is a directory that is not empty: give a new one, or a file in it")
    elif suffix in (SAFETENSORS, *TORCH):
        if max_shard_size is not None:
            raise UsageError(f"--max-shard-size is for a directory of shards, and {target} is one file")
    elif suffix:
        raise UsageError(
            f"{target}: the ending says the format: {SAFETENSORS}, {' or '.join(TORCH)}; a name without one is a directory of "
            "safetensors as Hugging Face has them"
        )
    elif target.exists():
        raise UsageError(f"{target} exists and is no directory")
    if not target.absolute().parent.is_dir():
        raise UsageError(f"there is no directory {target.absolute().parent}")


def export(
    contents: Contents,
    target: Path,
    *,
    weights_only: bool,
    only: str | None = None,
    max_shard_size: int | None = None,
    verified: bool = False,
) -> Exported:
    """Write ``target``. Digests of the files to be read are checked first unless ``verified``.

    Raises UsageError, CheckpointError (damage, or an object that cannot be read safely) and StorageError.
    """
    check_target(target, max_shard_size)
    selection = select(contents, weights_only=weights_only, only=only)
    if not verified:
        contents.verify(selection.items.values())
    tensors = {name: item for name, item in selection.items.items() if item.is_tensor}
    objects = [item.key for item in selection.items.values() if not item.is_tensor]
    size = sum(_size(item) for item in tensors.values())
    if target.suffix.lower() in TORCH:
        files, objects = _torch_save(contents, target, selection, flat=weights_only or only is not None), []
    else:
        if not tensors:
            raise UsageError(f"there are no tensors to export; {target.suffix} holds nothing else")
        writer = _Safetensors(contents, tensors)
        if target.suffix.lower() == SAFETENSORS:
            with _replacing(target) as file:
                writer.write(file, tensors)
            files = [target]
        else:
            files = writer.write_directory(target, max_shard_size or SHARD_SIZE)
    return Exported(
        files=files, tensors=len(tensors), bytes=size, other_ranks=selection.others, objects=objects
    )


# --------------------------------------------------------------------------- safetensors


class _Safetensors:
    def __init__(self, contents: Contents, tensors: Mapping[str, Item]) -> None:
        self._contents = contents
        self._all = tensors
        for name, item in tensors.items():
            if item.dtype not in _DTYPES:
                raise CheckpointError(
                    f"safetensors has no {item.dtype}, which {name!r} is: export to .pt instead"
                )

    def write(self, file: IO[bytes], tensors: Mapping[str, Item]) -> None:
        """Wide elements first, so that each tensor is aligned; then by name."""
        ordered = sorted(tensors, key=lambda name: (-_itemsize(tensors[name]), name))
        header: dict[str, Any] = {"__metadata__": self._origin()}
        offset = 0
        for name in ordered:
            item = tensors[name]
            end = offset + _size(item)
            assert item.shape is not None
            assert item.dtype is not None
            header[name] = {
                "dtype": _DTYPES[item.dtype],
                "shape": list(item.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            for block in self._contents.blocks(tensors[name]):
                file.write(memory_of(block.contiguous()))
        file.flush()
        try:
            with safe_open(file.name, "pt"):
                pass
        except SafetensorError as error:
            raise CheckpointError(f"what was written is no safetensors file: {error}") from None

    def write_directory(self, target: Path, limit: int) -> list[Path]:
        """Shards of at most ``limit`` bytes (a larger tensor has one for itself) and their index."""
        shards: list[dict[str, Item]] = []
        room = 0
        for name, item in self._all.items():
            if not shards or _size(item) > room:
                shards.append({})
                room = limit
            shards[-1][name] = item
            room -= _size(item)
        names = [
            f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
        ]
        if len(shards) == 1:
            names = ["model.safetensors"]
        with _new_directory(target) as folder:
            for name, shard in zip(names, shards, strict=True):
                with open(folder / name, "wb") as file:
                    self.write(file, shard)
                    os.fsync(file.fileno())
            if len(shards) > 1:
                index = {
                    "metadata": {"total_size": sum(_size(item) for item in self._all.values())},
                    "weight_map": {
                        key: name for name, shard in zip(names, shards, strict=True) for key in shard
                    },
                }
                with open(folder / _INDEX, "w", encoding="utf-8") as text:
                    json.dump(index, text, indent=2)
                    text.flush()
                    os.fsync(text.fileno())
                names.append(_INDEX)
        return [target / name for name in names]

    def _origin(self) -> dict[str, str]:
        manifest = self._contents.manifest
        origin = {"format": "pt"}
        if manifest is not None:
            origin |= {"step": str(manifest.step), "run_id": manifest.origin.run_id}
        return origin


# --------------------------------------------------------------------------- torch.save


def _torch_save(contents: Contents, target: Path, selection: Selection, *, flat: bool) -> list[Path]:
    values: dict[str, Any] = {}
    for name, item in selection.items.items():
        if item.is_tensor:
            values[name] = contents.tensor(item)
            continue
        try:
            value = contents.object(item)
            values[name] = trees.join(value, {}) if trees.is_box(value) else value
        except UnsafeError as error:
            raise UnsafeError(f"{error}; --weights-only leaves it out") from None
    whole = (
        values
        if flat
        else unflatten_state_dict(values, {name: item.path for name, item in selection.items.items()})
    )
    with _replacing(target) as file:
        torch.save(whole, file)
        file.flush()
    return [target]


# --------------------------------------------------------------------------- complete or not at all


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[IO[bytes]]:
    partial = _partial(target)
    with _telling(target), _undoing(lambda: partial.unlink(missing_ok=True)):
        with open(partial, "wb") as file:
            yield file
            os.fsync(file.fileno())
        partial.rename(target)
        sync_directory(target.absolute().parent)


@contextlib.contextmanager
def _new_directory(target: Path) -> Iterator[Path]:
    partial = _partial(target)
    with _telling(target), _undoing(lambda: shutil.rmtree(partial, ignore_errors=True)):
        partial.mkdir()
        yield partial
        sync_directory(partial)
        partial.rename(target)  # also onto an empty directory
        sync_directory(target.absolute().parent)


def _partial(target: Path) -> Path:
    return target.absolute().with_name(f".{target.name}.partial-{os.getpid()}")


@contextlib.contextmanager
def _undoing(undo: Callable[[], object]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        undo()
        raise


@contextlib.contextmanager
def _telling(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"writing {target} failed: {error.strerror or error}; nothing of it is left"
        ) from error


def _itemsize(item: Item) -> int:
    assert item.dtype is not None
    return item.dtype.itemsize


def _size(item: Item) -> int:
    return item.elements * _itemsize(item)
