"""A pickle that runs code when it is loaded, in every place of a checkpoint where there is one: it is never loaded.

Whoever lacks the key puts it there, and then does the best he can to make the checkpoint look whole.
"""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from launch import cli
from supervisor.checkpoint.commit import seal
from supervisor.checkpoint.manifest import Key, read_manifest
from supervisor.errors import CheckpointError
from supervisor.training import Session

SECRET = "0123456789abcdef" * 4


class Evil:
    """Makes a directory when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "owned"


@pytest.fixture
def checkpoint(tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ours, of step 1; the attack is prepared beside it: ``evil`` is the same with another payload."""
    monkeypatch.setenv("EVERSTEP_KEY", SECRET)
    for place in ("job", "evil"):
        with Session(dir=tmp_path / place) as session:
            for _ in session.steps(1):
                session.state["value"] = 5
                session.state["thing"] = Evil(mark) if place == "evil" else 7
    assert not mark.exists()
    return tmp_path / "job" / "checkpoints" / "step-000000001"


def in_an_object(checkpoint: Path, mark: Path) -> None:
    evil = checkpoint.parents[2] / "evil" / "checkpoints" / "step-000000001"
    for file in evil.iterdir():
        if file.name != "everstep.json":
            shutil.copy(file, checkpoint / file.name)


def in_the_index(checkpoint: Path, mark: Path) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Evil(mark)))


def as_it_is(checkpoint: Path) -> None:
    """The manifest stays."""


def without_a_key(checkpoint: Path) -> None:
    seal(checkpoint, read_manifest(checkpoint, Key.derive(SECRET)).origin)


def with_another_key(checkpoint: Path) -> None:
    seal(checkpoint, read_manifest(checkpoint, Key.derive(SECRET)).origin, key=Key.derive("x" * 64))


def without_a_manifest(checkpoint: Path) -> None:
    (checkpoint / "everstep.json").unlink()


ATTACKS = pytest.mark.parametrize("forge", [as_it_is, without_a_key, with_another_key, without_a_manifest])
PLACES = pytest.mark.parametrize("place", [in_an_object, in_the_index])


@PLACES
def test_the_pickle_would_run_code(place: Callable[[Path, Path], None], checkpoint: Path, mark: Path) -> None:
    """Else these tests would show nothing."""
    place(checkpoint, mark)
    if place is in_the_index:
        pickle.loads((checkpoint / ".metadata").read_bytes())
    else:
        state: dict[str, object] = {}
        try:
            torch.distributed.checkpoint.state_dict_loader._load_state_dict_from_keys(
                checkpoint_id=checkpoint
            )
        except Exception as error:
            state["error"] = error
    assert mark.exists()


@ATTACKS
@PLACES
def test_a_session_does_not_load_it(
    place: Callable[[Path, Path], None],
    forge: Callable[[Path], None],
    checkpoint: Path,
    mark: Path,
    tmp_path: Path,
) -> None:
    place(checkpoint, mark)
    forge(checkpoint)
    with pytest.raises(CheckpointError, match="can be used"), Session(dir=tmp_path / "job"):
        pass
    assert not mark.exists()


@ATTACKS
@PLACES
@pytest.mark.parametrize("key", [SECRET, None, "another"], ids=["our key", "no key", "another key"])
def test_the_command_line_does_not_load_it(
    place: Callable[[Path, Path], None],
    forge: Callable[[Path], None],
    key: str | None,
    checkpoint: Path,
    mark: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without the key or a manifest it may be looked into, as any stranger's; even then nothing is run."""
    place(checkpoint, mark)
    forge(checkpoint)
    if key is None:
        monkeypatch.delenv("EVERSTEP_KEY")
    else:
        monkeypatch.setenv("EVERSTEP_KEY", key)
    target = tmp_path / "x.pt"
    for words in (
        ("inspect", str(checkpoint)),
        ("compare", str(checkpoint), str(checkpoint)),
        ("export", str(checkpoint), "-o", str(target)),
        ("inspect", "latest", "--checkpoints", str(checkpoint.parent), "--dir", str(tmp_path / "job")),
    ):
        code = cli.call(["checkpoints", *words])
        _, err = capsys.readouterr()
        assert err.count("\n") == (1 if code else 0), err
        if key is not None:
            assert code == (64 if "latest" in words else 1) or (
                words[0] == "inspect" and place is in_an_object and forge is as_it_is
            )
    assert not mark.exists()
    assert not target.exists()
