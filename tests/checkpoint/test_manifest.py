"""everstep.json: what goes in comes out, and nothing else gets in."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.checkpoint.manifest import (
    FileEntry,
    ForeignError,
    Key,
    Manifest,
    check_name,
    decode,
    encode,
    sign,
)
from supervisor.errors import CheckpointError, ConfigError
from tests.checkpoint.tools import origin

KEY = Key.derive("correct horse battery staple")
DIGEST = "ab" * 32
FILES = {
    name: FileEntry(bytes=7, blake3=DIGEST) for name in (".metadata", "__0_0.distcp", "shard/__1_0.distcp")
} | {"__2_0.distcp": FileEntry(bytes=20 << 20, blake3=DIGEST, pieces=("01" * 32, "02" * 32, "03" * 32))}
MANIFEST = Manifest(origin=origin(1200), files=FILES)

both = pytest.mark.parametrize("key", [None, KEY], ids=["unkeyed", "keyed"])


def resigned(key: Key | None = None, **changes: object) -> bytes:
    """The manifest with some fields changed, by someone who can sign."""
    document = json.loads(encode(MANIFEST, key))
    del document["digest"]
    return sign({**document, **changes}, key)


@both
def test_it_comes_back_as_it_was(key: Key | None) -> None:
    assert decode(encode(MANIFEST, key), key) == MANIFEST


@given(
    step=st.integers(0, 10**12),
    created=st.floats(0, 1e11),
    metrics=st.dictionaries(st.text(), st.floats(allow_nan=False)),
    run_id=st.text(),
    sizes=st.dictionaries(st.from_regex(r"[a-z_0-9.]{1,9}[a-z]", fullmatch=True), st.integers(0, 2**63)),
)
def test_any_origin_comes_back_as_it_was(
    step: int, created: float, metrics: dict[str, float], run_id: str, sizes: dict[str, int]
) -> None:
    files = {name: FileEntry(bytes=size, blake3=DIGEST) for name, size in sizes.items()} | FILES
    manifest = Manifest(origin=origin(step, created=created, metrics=metrics, run_id=run_id), files=files)
    data = encode(manifest, KEY)
    assert decode(data, KEY) == manifest
    assert encode(decode(data, KEY), KEY) == data


def test_a_metric_that_is_nan_is_valid_json_and_comes_back() -> None:
    manifest = Manifest(origin=origin(1, metrics={"loss": math.nan, "gain": -math.inf}), files=FILES)
    data = encode(manifest, None)
    json.loads(data, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    metrics = decode(data, None).origin.metrics
    assert math.isnan(metrics["loss"])
    assert metrics["gain"] == -math.inf


@both
def test_every_flipped_bit_is_noticed(key: Key | None) -> None:
    data = encode(MANIFEST, key)
    for position in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[position] ^= 1 << bit
            with pytest.raises(CheckpointError):
                decode(bytes(changed), key)


@both
def test_every_truncation_is_noticed(key: Key | None) -> None:
    data = encode(MANIFEST, key)
    for size in range(len(data)):
        with pytest.raises(CheckpointError):
            decode(data[:size], key)


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"null", b'{"format":3}', b"\xff\xfe", b"[" * 200_000, b"9" * 9999]
)
def test_what_is_no_manifest_is_called_damaged(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="is damaged"):
        decode(data, None)


def test_a_newer_version_is_refused_naming_both() -> None:
    with pytest.raises(ForeignError, match=r"version 7\b.*up to version 2\b.*upgrade"):
        decode(resigned(version=7), None)


@pytest.mark.parametrize("version", [0, -1, "1", True, None, 1.0])
def test_a_version_that_never_was_is_damage(version: object) -> None:
    with pytest.raises(CheckpointError, match="its version is"):
        decode(resigned(version=version), None)


def test_keyed_and_unkeyed_do_not_mix_and_say_so() -> None:
    with pytest.raises(ForeignError, match="made with a key: set EVERSTEP_KEY"):
        decode(encode(MANIFEST, KEY), None)
    with pytest.raises(ForeignError, match="made without a key.*refused because EVERSTEP_KEY is set"):
        decode(encode(MANIFEST, None), KEY)
    with pytest.raises(ForeignError, match="made with another key"):
        decode(encode(MANIFEST, Key.derive("other")), KEY)


def test_a_forged_manifest_does_not_authenticate() -> None:
    document = json.loads(encode(MANIFEST, KEY))
    document["step"] += 1
    with pytest.raises(CheckpointError, match="does not authenticate with EVERSTEP_KEY"):
        decode(json.dumps(document).encode(), KEY)
    # nor does one signed without the key, or with the key that the files' digests have
    forged = json.loads(sign({**document, "key": KEY.id}, None))
    with pytest.raises(CheckpointError, match="does not authenticate"):
        decode(json.dumps(forged).encode(), KEY)
    crossed = Key(files=KEY.manifest, manifest=KEY.files, id=KEY.id)
    with pytest.raises(CheckpointError, match="does not authenticate"):
        decode(encode(MANIFEST, crossed), KEY)


def test_the_key_is_not_shown() -> None:
    shown = repr(KEY) + encode(MANIFEST, KEY).decode()
    assert KEY.files.hex() not in shown
    assert KEY.manifest.hex() not in shown
    assert str(KEY.files) not in shown
    assert "horse" not in shown


def test_the_key_comes_from_the_environment() -> None:
    assert Key.from_environment({}) is None
    assert Key.from_environment({"EVERSTEP_KEY": "correct horse battery staple"}) == KEY
    with pytest.raises(ConfigError, match="EVERSTEP_KEY is empty"):
        Key.from_environment({"EVERSTEP_KEY": " "})


BAD_NAMES = [
    "", "/etc/passwd", "..", "../x", "a/../b", "a/..", "./a", "a//b", "a/", ".", "a\\b", "a\0b", "a\nb", "a\x7f",
    "everstep.json", "everstep.json.partial",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_leads_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="file name"):
        check_name(name)
    with pytest.raises(CheckpointError, match="file name"):
        decode(
            resigned(
                files={".metadata": {"bytes": 1, "blake3": DIGEST}, name: {"bytes": 1, "blake3": DIGEST}}
            ),
            None,
        )


@pytest.mark.parametrize(
    "changes",
    [
        {"step": -1}, {"step": True}, {"step": "1"}, {"created": 5}, {"run_id": None}, {"metrics": []},
        {"metrics": {"loss": "1.5"}}, {"metrics": {"loss": None}}, {"files": {}}, {"files": {".metadata": 5}},
        {"files": {".metadata": {"bytes": 1, "blake3": "AB" * 32}}}, {"files": {".metadata": {"bytes": -1, "blake3": DIGEST}}},
        {"files": {".metadata": {"bytes": 1, "blake3": DIGEST, "pieces": {}}}},
        {"files": {".metadata": {"bytes": 1, "blake3": DIGEST, "pieces": [DIGEST] * 2}}},
        {"files": {".metadata": {"bytes": 20 << 20, "blake3": DIGEST, "pieces": [DIGEST] * 2}}},
        {"files": {".metadata": {"bytes": 20 << 20, "blake3": DIGEST, "pieces": [DIGEST, DIGEST, 5]}}},
    ],
)  # fmt: skip
def test_a_field_of_the_wrong_kind_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(CheckpointError):
        decode(resigned(**changes), None)


def test_a_checkpoint_without_metadata_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"no \.metadata"):
        encode(Manifest(origin=origin(1), files={"a": FileEntry(bytes=1, blake3=DIGEST)}), None)
