"""The manifest, ``everstep.json``: what makes a directory of stock DCP files a checkpoint.

It names every file with its size and BLAKE3 digest and is written last, so a directory with a valid manifest was
whole when the manifest was made, and whether it still is can be checked without trusting anything else in it. The
manifest carries a digest of its own (over its canonical JSON without that field), so that damage to it is noticed
too. With a key (``EVERSTEP_KEY``) all digests are keyed: who lacks the key can neither make nor alter a checkpoint
that its owner's jobs would load. File digests and the manifest's use different derived keys, else a file that has
the text of a manifest would yield that manifest's digest.

A file of several pieces (``pieces``) is named with the digest of each, and its own is the digest of those, one after the other; any
other file, also a large one of a manifest of version 1, has the digest of its bytes.

A reader refuses what it cannot judge, each case in its own words: no manifest, damage, a newer version, a manifest
with a key where none is set, one without where one is set, and one of another key.
"""

from __future__ import annotations

import hmac
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from blake3 import blake3

from supervisor.checkpoint.location import Location
from supervisor.checkpoint.pieces import Piece, cut
from supervisor.edge.files import leads_inside
from supervisor.errors import CheckpointError, ConfigError

MANIFEST_NAME: Final = "everstep.json"
#: the manifest before its rename, and after the one that starts a removal: marks a directory as no checkpoint
PARTIAL_NAME: Final = "everstep.json.partial"
METADATA_NAME: Final = ".metadata"
KEY_VARIABLE: Final = "EVERSTEP_KEY"
VERSION: Final = 2

_FORMAT: Final = "everstep-checkpoint"
LARGEST: Final = 512 << 20  # bytes; seven million pieces
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


class ForeignError(CheckpointError):
    """A manifest that may well be good, but not for us: a newer version's, or another key's."""


@dataclass(frozen=True)
class Key:
    """The keys derived from one secret. ``id`` may be shown: it tells keys apart and nothing else."""

    files: bytes = field(repr=False)
    manifest: bytes = field(repr=False)
    id: str

    @classmethod
    def derive(cls, secret: str) -> Key:
        """From a secret of high entropy (say, 32 random bytes in hex; this is no password hash)."""

        def derived(purpose: str) -> bytes:
            context = f"everstep 2026-01 checkpoint {purpose}"
            return blake3(secret.encode(), derive_key_context=context).digest()

        return cls(files=derived("files"), manifest=derived("manifest"), id=derived("key id").hex()[:16])

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Key | None:
        """The key in ``EVERSTEP_KEY``, None when it is not set. Raises ConfigError when it is empty."""
        secret = environ.get(KEY_VARIABLE)
        if secret is None:
            return None
        if not secret.strip():
            raise ConfigError(f"{KEY_VARIABLE} is empty: unset it, or give it a secret")
        return cls.derive(secret)


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file: its size, and the hex of its 32-byte BLAKE3 digest (keyed if the manifest is), and of those of its ``pieces``.

    Without them, ``blake3`` is that of its bytes.
    """

    bytes: int
    blake3: str
    pieces: tuple[str, ...] = ()

    def cut(self, name: str) -> list[Piece]:
        """What can be compared by itself, of the file called ``name``, in order; all of it together is the file."""
        if not self.pieces:
            return [Piece(name, 0, self.bytes, self.blake3)]
        return [
            Piece(name, *place, digest) for place, digest in zip(cut(self.bytes), self.pieces, strict=True)
        ]

    def encode(self) -> dict[str, Any]:
        """For JSON."""
        document: dict[str, Any] = {"bytes": self.bytes, "blake3": self.blake3}
        return {**document, "pieces": list(self.pieces)} if self.pieces else document


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a checkpoint comes from: all of its manifest but the files. ``created`` is Unix seconds."""

    step: int
    attempt: int
    epoch: int
    run_id: str
    world_size: int
    created: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)  # of torch, everstep, python


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A checkpoint: its origin and its files by relative name (``/`` between the parts)."""

    origin: Origin
    files: Mapping[str, FileEntry]
    version: int = VERSION
    place: Location | None = field(
        default=None, compare=False
    )  # set by who committed it elsewhere than by its step

    @property
    def step(self) -> int:
        """The number of completed steps it holds the state after."""
        return self.origin.step

    @property
    def bytes(self) -> int:
        """The size of all files together."""
        return sum(entry.bytes for entry in self.files.values())


def check_name(name: str) -> None:
    """Raise CheckpointError for a name that is not a plain relative path to a payload file."""
    if not leads_inside(name):
        raise CheckpointError(f"file name {name!r} is not a plain relative path")
    if name in (MANIFEST_NAME, PARTIAL_NAME):
        raise CheckpointError(f"file name {name!r} is the manifest's own")


def encode(manifest: Manifest, key: Key | None) -> bytes:
    """The text of ``everstep.json``. Raises CheckpointError for a file name that a reader would refuse."""
    origin = manifest.origin
    _check_files(manifest.files)
    document = {
        "format": _FORMAT,
        "version": manifest.version,
        "key": key.id if key else None,
        "step": origin.step,
        "attempt": origin.attempt,
        "epoch": origin.epoch,
        "run_id": origin.run_id,
        "world_size": origin.world_size,
        "created": float(origin.created),
        "metrics": encode_metrics(origin.metrics),
        "versions": dict(origin.versions),
        "files": {name: entry.encode() for name, entry in manifest.files.items()},
    }
    return sign(document, key)


def decode(data: bytes, key: Key | None) -> Manifest:
    """The manifest in ``data``, authenticated.

    Raises ForeignError for a newer version or another key, CheckpointError for anything else that is wrong.
    """
    document = authenticate(data, key, kind=_FORMAT, newest=VERSION)
    origin = Origin(
        step=_count(document, "step"),
        attempt=_count(document, "attempt"),
        epoch=_count(document, "epoch"),
        run_id=_value(document, "run_id", str),
        world_size=_count(document, "world_size"),
        created=_value(document, "created", float),
        metrics=decode_metrics(_value(document, "metrics", dict)),
        versions={name: str(value) for name, value in _value(document, "versions", dict).items()},
    )
    files = {name: decode_entry(name, value) for name, value in _value(document, "files", dict).items()}
    _check_files(files)
    return Manifest(origin=origin, files=files, version=document["version"])


def fingerprint(manifest: Manifest) -> str:
    """What tells a checkpoint from every other one, also of the same name."""
    return blake3(encode(manifest, None)).hexdigest()


def read_manifest(directory: Path, key: Key | None) -> Manifest:
    """The manifest of ``directory``. Raises as ``decode`` does, and CheckpointError when there is none."""
    try:
        fd = os.open(directory / MANIFEST_NAME, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            data = file.read(LARGEST + 1)
    except FileNotFoundError:
        raise CheckpointError(
            f"no {MANIFEST_NAME}: not a checkpoint, or one that was never finished"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{MANIFEST_NAME} cannot be read: {error.strerror or error}") from error
    if len(data) > LARGEST:
        raise CheckpointError(f"{MANIFEST_NAME} is larger than {LARGEST} bytes: not a manifest")
    return decode(data, key)


# --------------------------------------------------------------------------- signed JSON documents


def sign(document: Mapping[str, Any], key: Key | None) -> bytes:
    """Canonical JSON of ``document`` with its ``digest`` added."""
    return _canonical({**document, "digest": _digest(document, key)}) + b"\n"


def authenticate(
    data: bytes, key: Key | None, *, kind: str, newest: int, name: str = MANIFEST_NAME
) -> dict[str, Any]:
    """The document of which ``sign`` made ``data`` with this key, byte for byte.

    It is of the format ``kind`` and at most of version ``newest``. Raises as ``decode`` does, calling it ``name``.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{name} is damaged: not JSON ({len(data)} bytes)") from None
    if not isinstance(document, dict) or document.get("format") != kind:
        raise CheckpointError(f"{name} is damaged: its format is not {kind!r}")
    version = document.get("version")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{name} is damaged: its version is {version!r}")
    if version > newest:
        raise ForeignError(
            f"{name} is of version {version}, this everstep reads up to version {newest}: upgrade everstep"
        )
    _check_key(document.get("key"), key, name)
    document.pop("digest", None)
    if not hmac.compare_digest(data, sign(document, key)):
        how = f"it does not authenticate with {KEY_VARIABLE}" if key else "its digest does not match"
        raise CheckpointError(f"{name} is damaged or was changed: {how}")
    return document


def _check_key(theirs: object, key: Key | None, name: str) -> None:
    if theirs is not None and key is None:
        raise ForeignError(f"{name} was made with a key: set {KEY_VARIABLE} to read it")
    if theirs is None and key is not None:
        raise ForeignError(
            f"{name} was made without a key, so it cannot be authenticated: refused because {KEY_VARIABLE} is set"
        )
    if key is not None and theirs != key.id:
        raise ForeignError(f"{name} was made with another key (id {theirs!r}, {KEY_VARIABLE} has {key.id!r})")


def _canonical(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _digest(document: Mapping[str, Any], key: Key | None) -> str:
    try:
        text = _canonical(document)
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"a manifest cannot hold this: {error}") from None
    return (blake3(text, key=key.manifest) if key else blake3(text)).hexdigest()


# --------------------------------------------------------------------------- fields

_T = TypeVar("_T")


def _value(document: Mapping[str, Any], name: str, kind: type[_T]) -> _T:
    value = document.get(name)
    if type(value) is not kind:
        raise CheckpointError(f"{MANIFEST_NAME}: {name} must be a {kind.__name__}, not {value!r}")
    return value


def _count(document: Mapping[str, Any], name: str) -> int:
    value = _value(document, name, int)
    if value < 0:
        raise CheckpointError(f"{MANIFEST_NAME}: {name} is negative: {value}")
    return value


def decode_entry(name: str, value: object) -> FileEntry:
    """What ``FileEntry.encode`` made, of the file called ``name``. Raises CheckpointError."""
    if not isinstance(value, dict):
        raise CheckpointError(f"{MANIFEST_NAME}: the entry of {name!r} must be an object")
    size, digest = _count(value, "bytes"), _value(value, "blake3", str)
    pieces = tuple(_value(value, "pieces", list)) if "pieces" in value else ()
    for one in (digest, *pieces):
        if not isinstance(one, str) or not _DIGEST.fullmatch(one):
            raise CheckpointError(f"{MANIFEST_NAME}: a digest of {name!r} is not 64 hex digits")
    if pieces and len(pieces) != len(list(cut(size))):
        raise CheckpointError(f"{MANIFEST_NAME}: {name!r} of {size} bytes has not {len(pieces)} pieces")
    return FileEntry(bytes=size, blake3=digest, pieces=pieces)


def _check_files(files: Mapping[str, FileEntry]) -> None:
    for name in files:
        check_name(name)
    if METADATA_NAME not in files:
        raise CheckpointError(f"no {METADATA_NAME} among the {len(files)} files: not a DCP checkpoint")


def encode_metrics(metrics: Mapping[str, float]) -> dict[str, float | str]:
    """For JSON, which has no NaN and no infinities: they become strings."""
    return {
        name: float(value) if math.isfinite(value) else repr(float(value)) for name, value in metrics.items()
    }


def decode_metrics(document: Mapping[str, object]) -> dict[str, float]:
    """What ``encode_metrics`` was given. Raises CheckpointError for anything but numbers."""
    metrics = {}
    for name, value in document.items():
        if not isinstance(value, float) and value not in ("nan", "inf", "-inf"):
            raise CheckpointError(f"{MANIFEST_NAME}: metric {name!r} is no number: {value!r}")
        metrics[name] = float(value)
    return metrics
