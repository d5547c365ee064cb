"""Reading a checkpoint: its index without trusting it, what does not fit before anything is changed, and its contents.

``.metadata`` is a pickle, and it says which file to read: it goes through an unpickler that knows DCP's own classes and
nothing else, and a path in it that leads out of the directory is refused. Byte items are pickles too; they are only
loaded after somebody has verified the digests of all files (the supervisor before it answers ``resume``, library mode
before it offers a candidate).
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, Final

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from supervisor.errors import CheckpointError, StateMismatchError
from supervisor.training.items import STATE, Path, owner_of
from supervisor.training.mapped import MappedReader

_SHOWN: Final = 4  # of each kind in an error
_ALLOWED: Final = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    # stock writers record where they wrote
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module.replace("._local", ""), name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")


def read_metadata(directory: FilePath) -> Metadata:
    """The ``.metadata`` of a checkpoint, checked. Raises CheckpointError."""
    try:
        metadata = _Unpickler(io.BytesIO((directory / ".metadata").read_bytes())).load()
    except OSError as error:
        raise CheckpointError(f"{directory / '.metadata'}: {error.strerror}") from error
    except Exception as error:
        raise CheckpointError(f"{directory / '.metadata'} is damaged or no DCP metadata: {error}") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise CheckpointError(f"{directory / '.metadata'} is no DCP metadata")
    sizes: dict[str, int] = {}
    for info in metadata.storage_data.values():
        name = info.relative_path
        if not isinstance(name, str) or FilePath(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(f"{directory / '.metadata'} leads out of the checkpoint: {name!r}")
        if name not in sizes:
            try:
                sizes[name] = (directory / name).lstat().st_size
            except OSError as error:
                raise CheckpointError(f"{directory / name}: {error.strerror}") from error
        if info.offset < 0 or info.length < 0 or info.offset + info.length > sizes[name]:
            raise CheckpointError(f"{directory / name} is truncated: {sizes[name]} bytes")
    metadata.storage_meta = metadata.storage_meta or StorageMeta()
    return metadata


@dataclass
class Mismatch:
    """What does not fit between a checkpoint and the training, gathered so that one error says all."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)

    def fits(self, name: str, stored: object, present: object) -> bool:
        """Note it when ``present`` (a tensor, or anything else) is not of the stored kind, shape and dtype."""
        if isinstance(stored, TensorStorageMetadata) != isinstance(present, torch.Tensor):
            kind = "a tensor" if isinstance(stored, TensorStorageMetadata) else "not a tensor"
            self.different.append(f"{name} is {kind} in the checkpoint only")
        elif isinstance(stored, TensorStorageMetadata) and isinstance(present, torch.Tensor):
            if stored.size != present.shape:
                self.different.append(f"{name} is {list(stored.size)}, here {list(present.shape)}")
            elif stored.properties.dtype != present.dtype:
                self.different.append(f"{name} is {stored.properties.dtype}, here {present.dtype}")
            else:
                return True
            return False
        else:
            return True
        return False

    def check(self, directory: FilePath) -> None:
        """Raise StateMismatchError if anything was noted."""
        kinds = {
            "not in the checkpoint": self.missing,
            "only in the checkpoint": self.unexpected,
            "different": self.different,
        }
        told = []
        for kind, names in kinds.items():
            unique = list(dict.fromkeys(names))
            if unique:
                more = f" and {len(unique) - _SHOWN} more" if len(unique) > _SHOWN else ""
                told.append(f"{kind} ({len(unique)}): {', '.join(unique[:_SHOWN])}{more}")
        if told:
            raise StateMismatchError(f"{directory} does not fit this training; {'; '.join(told)}")


class Stored:
    """A checkpoint, opened for one rank. Raises CheckpointError for damage, here and in every method."""

    def __init__(self, directory: FilePath, rank: int) -> None:
        self.directory = directory
        self.rank = rank
        self._metadata = read_metadata(directory)
        paths: Mapping[str, Path] = self._metadata.planner_data or {}
        self._by_owner: dict[int, dict[Path, str]] = {}
        for key in self._metadata.state_dict_metadata:
            owner, path = owner_of(tuple(paths.get(key, (key,))))
            self._by_owner.setdefault(owner, {})[path] = key

    @property
    def owners(self) -> list[int]:
        """The ranks that wrote items of their own."""
        return sorted(self._by_owner)

    def metadata_of(self, key: str) -> TensorStorageMetadata | BytesStorageMetadata:
        """What is stored under a key."""
        return self._metadata.state_dict_metadata[key]

    def owned(self, path: Path, owner: int) -> str | None:
        """The key of an item of ``owner``'s own."""
        return self._by_owner.get(owner, {}).get(path)

    def find(self, path: Path, owner: int) -> str | None:
        """The key of ``owner``'s item, else rank 0's, else that of the lowest rank that has one."""
        for candidate in (owner, *self.owners):
            if (key := self.owned(path, candidate)) is not None:
                return key
        return None

    def entries(self, prefix: Path) -> Iterator[tuple[int, Path, str]]:
        """Owner, logical path and key of every item under ``prefix``."""
        for owner in self.owners:
            for path, key in self._by_owner[owner].items():
                if len(path) > len(prefix) and path[: len(prefix)] == prefix:
                    yield owner, path, key

    def is_object(self, key: str) -> bool:
        """Whether a byte item is stored under a key, and not a tensor."""
        return not isinstance(self.metadata_of(key), TensorStorageMetadata)

    def names(self) -> set[str]:
        """The names of the objects in it."""
        firsts = {str(path[0]) for paths in self._by_owner.values() for path in paths}
        return {STATE if f"{first}.".startswith(f"{STATE}.") else first.split(".")[0] for first in firsts}

    def objects(self, keys: Iterable[str]) -> dict[str, Any]:
        """The values of byte items by key."""
        values: dict[str, Any] = dict.fromkeys(keys)
        self._read(values)
        return values

    def load(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Fill the targets, each with this rank's part of the item under its key."""
        self._read(dict(targets))

    def _read(self, values: dict[str, Any]) -> None:
        if not values:
            return
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp_load(
                    values,
                    storage_reader=MappedReader(self.directory, self._metadata),
                    planner=planner,
                    no_dist=True,
                )
        except CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            raise CheckpointError(
                f"{self.directory} cannot be loaded: {type(cause).__name__}: {cause}"
            ) from error
