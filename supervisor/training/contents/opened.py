"""A checkpoint, opened to be looked at: what is in it, and its tensors block by block.

A tensor may be larger than memory, and sharded over many files in any way. It is therefore read as *rows*: a range of its
first dimension, put together from the parts that lie in it. In each part a range of rows is contiguous on disk, so a block
is a few reads into one buffer and nothing else is held. (A part that was saved with its dimensions in another order has
no contiguous rows; it is read whole, one at a time.)

Nothing here runs code from a checkpoint: ``.metadata`` goes through the restricted unpickler, a tensor's header and the
objects through ``torch.load(weights_only=True)``, and what that refuses is told, never loaded otherwise. With a manifest,
the digests of the files are checked before (``verify``). Stock DCP directories have none, and can only be read as they are;
with a key set they are refused.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from supervisor.checkpoint.manifest import MANIFEST_NAME, METADATA_NAME, Key, Manifest, read_manifest
from supervisor.checkpoint.verify import problems_of
from supervisor.errors import CheckpointError, StorageError
from supervisor.training.contents.raw import RawFiles, memory_of
from supervisor.training.items import OWN, owner_of
from supervisor.training.items import Path as Keys
from supervisor.training.reader import read_metadata

#: elements that are read at once (or one row): what is computed with so few stays in the cache
BLOCK: Final = 1 << 18


@dataclass(frozen=True, kw_only=True)
class Item:
    """One entry of the state: a tensor, or any other object (``shape`` and ``dtype`` None). ``bytes`` as stored."""

    key: str
    owner: int  # the rank whose own it is; 0 also for what ranks have in common
    path: Keys  # in the nested state dict, without the owner
    bytes: int
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    parts: int = 1
    files: frozenset[str] = frozenset()

    @property
    def is_tensor(self) -> bool:
        """Whether it is a tensor."""
        return self.shape is not None

    @property
    def elements(self) -> int:
        """Of a tensor; 0 for anything else."""
        return 0 if self.shape is None else torch.Size(self.shape).numel()


@dataclass(frozen=True)
class _Part:
    """A stored part of a tensor: where in the tensor it lies, and where on disk."""

    file: str
    start: int
    length: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class Contents:
    """An open checkpoint. Raises CheckpointError for what is damaged or refused, StorageError for what cannot be read now."""

    def __init__(
        self,
        directory: Path,
        key: Key | None = None,
        *,
        manifest: Manifest | None = None,
        name: str | None = None,
    ) -> None:
        """Reads the index only; its digest is checked if there is a manifest.

        ``manifest``: it is known, for it lies elsewhere. ``name``: what to call the place, if not by its path.
        """
        self.directory = directory
        self.name = name or str(directory)
        self._key = key
        self._files = RawFiles(directory)
        self._tensor: tuple[_Part, torch.Tensor] | None = None  # the part that had to be read whole
        self._layouts: dict[_Part, int | None] = {}
        self.manifest = manifest or _manifest(directory, key)
        if self.manifest is not None:
            self._check({METADATA_NAME})
        try:
            self._metadata = read_metadata(directory)
        except CheckpointError as error:
            if self.manifest is None and not (directory / METADATA_NAME).exists():
                raise CheckpointError(f"{directory} is no checkpoint: it has no {METADATA_NAME}") from error
            raise
        self.items = {item.key: item for item in sorted(self._list(), key=lambda item: _order(item.key))}

    def __enter__(self) -> Contents:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._files.close()

    @property
    def is_ours(self) -> bool:
        """Whether a Session wrote it."""
        return any(item.path == (OWN,) for item in self.items.values())

    def verify(self, items: Iterable[Item]) -> None:
        """Check the digests of all files that hold ``items``; without a manifest there is nothing to check by."""
        if self.manifest is not None:
            self._check({name for item in items for name in item.files})

    def _check(self, names: set[str]) -> None:
        assert self.manifest is not None
        if unknown := sorted(names - set(self.manifest.files)):
            raise CheckpointError(f"{self.directory}: {unknown[0]} is not in the manifest")
        chosen = {name: entry for name, entry in self.manifest.files.items() if name in names}
        if problems := problems_of(self.directory, replace(self.manifest, files=chosen), self._key):
            raise CheckpointError(f"{self.directory} is damaged: {'; '.join(problems)}")

    # ------------------------------------------------------------------ the index

    def _list(self) -> Iterator[Item]:
        paths: Any = self._metadata.planner_data
        for key, value in self._metadata.state_dict_metadata.items():
            path = paths.get(key, (key,)) if isinstance(paths, dict) else (key,)
            owner, path = owner_of(tuple(path))
            if not isinstance(value, TensorStorageMetadata):
                info = self._info(MetadataIndex(key))
                yield Item(
                    key=key, owner=owner, path=path, bytes=info.length, files=frozenset({info.relative_path})
                )
                continue
            infos = [self._info(MetadataIndex(key, chunk.offsets)) for chunk in value.chunks]
            _check_parts(key, value)
            yield Item(
                key=key,
                owner=owner,
                path=path,
                bytes=sum(info.length for info in infos),
                shape=tuple(value.size),
                dtype=value.properties.dtype,
                parts=len(infos),
                files=frozenset(info.relative_path for info in infos),
            )

    def _info(self, index: MetadataIndex) -> Any:
        info = self._metadata.storage_data.get(index)
        if info is None:
            raise CheckpointError(f"{self.directory}: the index does not say where {index.fqn!r} is")
        if getattr(info, "transform_descriptors", None):
            raise CheckpointError(
                f"{self.directory}: {index.fqn!r} is stored transformed ({', '.join(map(str, info.transform_descriptors))}), "
                "which cannot be read here"
            )
        return info

    def _parts(self, item: Item) -> list[_Part]:
        value = self._metadata.state_dict_metadata[item.key]
        assert isinstance(value, TensorStorageMetadata)
        parts = []
        for chunk in value.chunks:
            info = self._info(MetadataIndex(item.key, chunk.offsets))
            parts.append(
                _Part(info.relative_path, info.offset, info.length, tuple(chunk.offsets), tuple(chunk.sizes))
            )
        return parts

    # ------------------------------------------------------------------ objects

    def object(self, item: Item) -> Any:
        """The value of an item that is no tensor. Raises CheckpointError for one that could run code."""
        return self._load(self._view(item), item.key, None)

    def stored(self, item: Item) -> bytes:
        """Its bytes as they are stored."""
        return self._view(item).read()

    def _view(self, item: Item) -> io.BufferedReader:
        info = self._info(MetadataIndex(item.key))
        return self._files.view(info.relative_path, info.offset, info.length)

    # ------------------------------------------------------------------ tensors

    def blocks(self, item: Item) -> Iterator[torch.Tensor]:
        """The tensor in row-major order, in flat pieces of about ``BLOCK`` elements."""
        shape, parts = _unsqueezed(item, self._parts(item))
        row = max(1, torch.Size(shape[1:]).numel())
        step = max(1, BLOCK // row)
        for start in range(0, shape[0] if item.elements else 0, step):
            yield self._rows(item, shape, parts, start, min(shape[0], start + step)).reshape(-1)

    def tensor(self, item: Item) -> torch.Tensor:
        """The whole tensor, in memory."""
        assert item.shape is not None
        tensor = torch.empty(item.shape, dtype=item.dtype)
        flat = tensor.view(-1)
        filled = 0
        for block in self.blocks(item):
            flat[filled : filled + len(block)] = block
            filled += len(block)
        return tensor

    def _rows(
        self,
        item: Item,
        shape: tuple[int, ...],
        parts: list[tuple[_Part, tuple[int, ...], tuple[int, ...]]],
        start: int,
        stop: int,
    ) -> torch.Tensor:
        rows: torch.Tensor | None = None
        for part, offsets, sizes in parts:
            low, high = max(start, offsets[0]), min(stop, offsets[0] + sizes[0])
            if low >= high or 0 in sizes:
                continue
            piece = self._piece(item, part, sizes, low - offsets[0], high - offsets[0])
            if piece.shape == (stop - start, *shape[1:]):
                return piece
            if rows is None:
                rows = torch.empty((stop - start, *shape[1:]), dtype=item.dtype)
            target = rows.narrow(0, low - start, high - low)
            for dimension in range(1, len(shape)):
                target = target.narrow(dimension, offsets[dimension], sizes[dimension])
            target.copy_(piece)
        if rows is None:
            raise CheckpointError(f"{self.directory}: {item.key!r} has rows that no part holds")
        return rows

    def _piece(self, item: Item, part: _Part, sizes: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        """Rows of one part."""
        payload = self._payload(item, part)
        if payload is None:
            if self._tensor is None or self._tensor[0] is not part:
                self._tensor = None
                view = self._files.view(part.file, part.start, part.length)
                self._tensor = (part, self._load(view, item.key, "cpu"))
            return self._tensor[1].reshape(sizes)[start:stop]
        assert item.dtype is not None
        piece = torch.empty((stop - start, *sizes[1:]), dtype=item.dtype)
        width = item.dtype.itemsize * torch.Size(sizes[1:]).numel()
        self._files.read(part.file, payload + start * width, memory_of(piece))
        return piece

    def _payload(self, item: Item, part: _Part) -> int | None:
        """Where in the file the part's elements begin; None when they are not in row-major order."""
        if part in self._layouts:
            return self._layouts[part]
        view = self._files.view(part.file, part.start, part.length)
        header = self._load(view, item.key, "meta")
        if not isinstance(header, torch.Tensor) or header.shape != part.sizes or header.dtype != item.dtype:
            raise CheckpointError(f"{self.directory}: {item.key!r} is not what the index says")
        self._layouts[part] = None
        offset = getattr(header.untyped_storage(), "_checkpoint_offset", None)
        if header.is_contiguous() and offset is not None and not header.is_conj() and not header.is_neg():
            start = offset + header.storage_offset() * header.element_size()
            if start + header.numel() * header.element_size() > part.length:
                raise CheckpointError(f"{self.directory}: {item.key!r} is truncated")
            self._layouts[part] = part.start + start
        return self._layouts[part]

    # ------------------------------------------------------------------ files

    def _load(self, view: io.BufferedReader, key: str, device: str | None) -> Any:
        try:
            return torch.load(view, map_location=device or "cpu", weights_only=True)
        except OSError as error:
            raise StorageError(f"{self.directory}: {key!r}: {error.strerror or error}") from error
        except Exception as error:  # noqa: BLE001 - of any kind, the bytes being anything
            # torch names what it refuses in a page of advice; its first line says what is wrong
            first = str(error).strip().partition("\n")[0]
            raise UnsafeError(
                f"{key!r} in {self.directory} cannot be read safely: {_refused(error) or first}"
            ) from None


class UnsafeError(CheckpointError):
    """An object that only unpickling without restrictions could make again."""


def _manifest(directory: Path, key: Key | None) -> Manifest | None:
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no checkpoint: no such directory")
    if os.path.lexists(directory / MANIFEST_NAME):
        try:
            return read_manifest(directory, key)
        except CheckpointError as error:
            raise CheckpointError(f"{directory}: {error}") from error
    if key is not None:
        raise CheckpointError(
            f"{directory} has no {MANIFEST_NAME}, so it cannot be authenticated: refused because EVERSTEP_KEY is set"
        )
    return None


def _check_parts(key: str, value: TensorStorageMetadata) -> None:
    covered = sum(chunk.sizes.numel() for chunk in value.chunks)
    inside = all(
        len(chunk.offsets) == len(chunk.sizes) == len(value.size)
        and all(
            offset >= 0 and size >= 0 and offset + size <= length
            for offset, size, length in zip(chunk.offsets, chunk.sizes, value.size, strict=True)
        )
        for chunk in value.chunks
    )
    if not inside or covered != value.size.numel():
        raise CheckpointError(f"the parts of {key!r} in the index do not make up the whole")


def _unsqueezed(
    item: Item, parts: list[_Part]
) -> tuple[tuple[int, ...], list[tuple[_Part, tuple[int, ...], tuple[int, ...]]]]:
    """Shape, and each part's offsets and sizes, without leading dimensions of 1: rows are what can be read in pieces."""
    assert item.shape is not None
    skip = 0
    while skip < len(item.shape) - 1 and item.shape[skip] == 1:
        skip += 1
    shape = item.shape[skip:] or (1,)
    return shape, [(part, part.offsets[skip:] or (0,), part.sizes[skip:] or (1,)) for part in parts]


def _order(key: str) -> tuple[tuple[int, int, str], ...]:
    """``layers.10`` after ``layers.9``."""
    return tuple(
        (0, int(word), "") if word.isascii() and word.isdigit() else (1, 0, word) for word in key.split(".")
    )


def _refused(error: Exception) -> str | None:
    """What ``torch.load(weights_only=True)`` did not want to load."""
    text = str(error)
    for mark in (
        "Unsupported global: GLOBAL ",
        "unsupported GLOBAL ",
        "Unsupported class ",
        "Unsupported operand ",
    ):
        if mark in text:
            return f"it needs {text.partition(mark)[2].split()[0]}"
    return None
