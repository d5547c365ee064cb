"""Reading a checkpoint: its index without trusting it, what does not fit before anything is changed, and its contents.

``.metadata`` is a pickle, and it says which file to read: it goes through an unpickler that knows DCP's own classes and
nothing else, and a path in it that leads out of the directory is refused. Byte items are pickles too; they are only
loaded after somebody has compared them with the manifest: the supervisor before it answers ``resume`` (on several nodes before it
answers ``need``), library mode before it offers a candidate.

What goes wrong is of three kinds. *Damage* (CheckpointError): a file is missing, too short, or not what it should be.
*Storage* (StorageError): it would not give the bytes now (ESTALE, EIO), or this process had no room for them (EMFILE, no
memory); tried again a few times, and no judgement on the checkpoint. *Misfit* (StateMismatchError): whole, but not of this
training. An object that cannot be unpickled counts as damage, and its item is named.
"""

from __future__ import annotations

import errno
import io
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path as FilePath
from typing import Any, Final, TypeVar

import tenacity
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from supervisor.checkpoint import stamps
from supervisor.checkpoint.slots import numbers_of_file
from supervisor.errors import CheckpointError, EverstepError, StateMismatchError, StorageError
from supervisor.training.collecting import without_collection
from supervisor.training.direct import DirectReader
from supervisor.training.items import STATE, Path, owner_of
from supervisor.training.supply import Need, Supply
from supervisor.training.writer import mark_of

T = TypeVar("T")

_GONE: Final = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
)  # damage; any other errno is storage's
_TRIES: Final = 4
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


def read_metadata(directory: FilePath, may_lack: Callable[[str], bool] = lambda _: False) -> Metadata:
    """The ``.metadata`` of a checkpoint, checked. Raises CheckpointError and StorageError.

    What lies in a missing file that the directory ``may_lack`` is left out of ``storage_data``.
    """
    data = _patiently(directory / ".metadata", (directory / ".metadata").read_bytes)
    try:
        with without_collection():
            metadata = _Unpickler(io.BytesIO(data)).load()
    except MemoryError as error:
        raise StorageError(f"{directory / '.metadata'} cannot be read: out of memory") from error
    except Exception as error:
        raise CheckpointError(f"{directory / '.metadata'} is damaged or no DCP metadata: {error}") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise CheckpointError(f"{directory / '.metadata'} is no DCP metadata")
    sizes: dict[str, int | None] = {}
    for info in metadata.storage_data.values():
        name = info.relative_path
        if not isinstance(name, str) or (name not in sizes and not _is_bare(name)):
            raise CheckpointError(f"{directory / '.metadata'} leads out of the checkpoint: {name!r}")
        if name not in sizes:
            sizes[name] = None
            if not may_lack(name) or (directory / name).exists():
                sizes[name] = _patiently(directory / name, (directory / name).lstat).st_size
        size = sizes[name]
        if size is not None and (info.offset < 0 or info.length < 0 or info.offset + info.length > size):
            raise CheckpointError(f"{directory / name} is truncated: {size} bytes")
    _check_stamps(directory, metadata, {name: size for name, size in sizes.items() if size is not None})
    if None in sizes.values():
        metadata.storage_data = {
            index: info
            for index, info in metadata.storage_data.items()
            if sizes[info.relative_path] is not None
        }
    metadata.storage_meta = metadata.storage_meta or StorageMeta()
    return metadata


def _is_bare(name: str) -> bool:
    """Whether it names a file of the directory itself."""
    return FilePath(name).name == name and name not in ("", ".", "..") and "\0" not in name


def _check_stamps(directory: FilePath, metadata: Metadata, sizes: Mapping[str, int]) -> None:
    """Each file that bears a stamp is that which its name says, and of the layout that the index is of."""
    mark = mark_of(metadata)
    for name, size in sizes.items():
        numbers = numbers_of_file(name)
        stamp = (
            None
            if numbers is None
            else _patiently(directory / name, partial(stamps.read, directory / name, size))
        )
        if stamp is not None and numbers is not None:
            stamps.check(str(directory / name), stamp, stamps.Stamp(*numbers, stamp.step, mark))


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
    """A checkpoint, opened for one rank. Raises CheckpointError and StorageError, here and in every method.

    ``resharded``: whether it was written by another number of ranks. ``may_lack``: which files may be missing. ``need``: whom to ask
    for what is read, if not all of it is there.
    """

    def __init__(
        self,
        directory: FilePath,
        rank: int,
        may_lack: Callable[[str], bool] = lambda _: False,
        need: Need | None = None,
    ) -> None:
        self.directory = directory
        self.rank = rank
        self.resharded = False
        self._metadata = read_metadata(directory, may_lack)
        self._supply = Supply(directory, need)
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
        _patiently(self.directory, lambda: self._read_once(values))

    def _read_once(self, values: dict[str, Any]) -> None:
        reader = DirectReader(self.directory, self._metadata, self._supply)
        try:
            done = reader.read_whole(values)
        except EOFError as error:
            raise CheckpointError(f"{self.directory} cannot be loaded: {error}") from error
        rest = {key: value for key, value in values.items() if key not in done}
        if rest:
            self._read_planned(rest, reader)
            values.update(rest)

    def _read_planned(self, values: dict[str, Any], reader: DirectReader) -> None:
        """With DCP's planning: what is sharded, what is no plain tensor, and objects."""
        planner = _Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp_load(values, storage_reader=reader, planner=planner, no_dist=True)
        except CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            if isinstance(cause, (OSError, MemoryError, EverstepError)):
                raise cause from error
            if isinstance(cause, KeyError) and isinstance(absent := cause.args[0], MetadataIndex):
                raise CheckpointError(f"{self.directory} does not hold {absent.fqn!r} in full") from error
            if isinstance(cause, _ItemError):
                raise CheckpointError(f"{self.directory}: {cause}") from error
            raise CheckpointError(
                f"{self.directory} cannot be loaded: {type(cause).__name__}: {cause}"
            ) from error


class _ItemError(Exception):
    """The object under a key could not be made again from its bytes."""


class _Planner(DefaultLoadPlanner):
    """Stock, but an object that fails to load is named."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        try:
            super().load_bytes(read_item, value)
        except (OSError, MemoryError):
            raise
        except Exception as error:
            key = read_item.dest_index.fqn
            raise _ItemError(f"{key!r} cannot be unpickled: {type(error).__name__}: {error}") from error


def _patiently(path: FilePath, action: Callable[[], T]) -> T:
    """Try again what storage refuses for a moment. Raises CheckpointError for what is gone, else StorageError."""
    retry = tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda e: isinstance(e, OSError) and e.errno not in _GONE),
        wait=tenacity.wait_exponential(multiplier=0.1),
        stop=tenacity.stop_after_attempt(_TRIES),
        reraise=True,
    )
    try:
        return retry(action)
    except OSError as error:
        kind = CheckpointError if error.errno in _GONE else StorageError
        raise kind(f"{error.filename or path}: {error.strerror or error}") from error
    except MemoryError as error:
        raise StorageError(f"{path} cannot be loaded: out of memory") from error
