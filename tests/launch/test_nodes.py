"""How many nodes there are and where they meet: flags first, then torchrun's line, then SLURM."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from launch import nodes, program
from supervisor import config
from supervisor.errors import EverstepError, UsageError

SLURM = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n[1-3]", "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_NODEID": "2",
}  # fmt: skip


@pytest.fixture(autouse=True)
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.py").touch()


@pytest.mark.parametrize(
    ("flags", "words", "environ", "expected"),
    [
        ({}, "torchrun train.py", {}, (None, None, None)),
        ({}, "torchrun --nnodes=1:1 train.py", {}, ("1", None, None)),
        (
            {},
            "torchrun --nnodes=4 --node-rank 1 --master-addr n1 --master-port 29500 train.py",
            {},
            ("4", 1, "tcp://n1:29500"),
        ),
        ({}, "torchrun --nnodes=2:4 --rdzv-endpoint=n1 train.py", {}, ("2:4", None, "tcp://n1:29400")),
        (
            {},
            "torchrun train.py",
            {"PET_NNODES": "2", "PET_RDZV_ENDPOINT": "[fe80::1]:7"},
            ("2", None, "tcp://[fe80::1]:7"),
        ),
        (
            {"nnodes": "3", "node_rank": "0", "store": "etcd://e:2379"},
            "torchrun --nnodes=2 --rdzv-endpoint=n1:1 train.py",
            {},
            ("3", 0, "etcd://e:2379"),
        ),
        ({}, "torchrun train.py", SLURM, ("3", 2, "tcp://n1:24711")),
        ({"store": "tcp://n2:1"}, "torchrun --nnodes 2:3 train.py", SLURM, ("2:3", 2, "tcp://n2:1")),
        ({"nnodes": "1"}, "torchrun train.py", SLURM, ("1", None, None)),
    ],
)
def test_where_it_is_taken_from(
    flags: Mapping[str, object],
    words: str,
    environ: Mapping[str, str],
    expected: tuple[str | None, int | None, str | None],
) -> None:
    understood = program.parse(words.split(), environ)
    options = nodes.complete(config.load(flags), understood, environ)
    found = (options.nnodes, options.store)
    assert (
        None if found[0] is None else str(found[0]),
        options.node_rank,
        None if found[1] is None else str(found[1]),
    ) == expected


@pytest.mark.parametrize(
    ("flags", "words", "said"),
    [
        ({"nnodes": "0"}, "torchrun train.py", "1 <= MIN <= MAX"),
        ({"nnodes": "4:2"}, "torchrun train.py", "1 <= MIN <= MAX"),
        ({"nnodes": "x"}, "torchrun train.py", "a number of nodes, or MIN:MAX"),
        ({"node_rank": "-1"}, "torchrun train.py", "a number from 0 on"),
        ({"nnodes": "2", "node_rank": "2"}, "torchrun train.py", "--node-rank 2: of 2 nodes"),
        ({"nnodes": "2"}, "python train.py", "several nodes are torchrun's to start"),
        ({"lease": "0.5s"}, "torchrun train.py", "1s or longer"),
        ({"lease": "5"}, "torchrun train.py", "--lease"),
        ({"node_timeout": "0s"}, "torchrun train.py", "longer than 0"),
        ({"node_name": "a/b"}, "torchrun train.py", "letters, digits"),
        ({"store": "redis://x:1"}, "torchrun train.py", "is no store"),
        ({}, "torchrun --nnodes=a train.py", "torchrun: 'a'"),
    ],
)
def test_what_cannot_be(flags: Mapping[str, object], words: str, said: str) -> None:
    with pytest.raises(EverstepError) as caught:
        nodes.complete(config.load(flags), program.parse(words.split(), {}), {})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_node_of_slurm_is_called_and_reached_as_slurm_does() -> None:
    """Its nodes' names need not be hosts' names; and several of them may be on one host."""
    understood = program.parse(["torchrun", "train.py"], {})
    for environ, flags, expected in (
        (SLURM, {}, ("n3", "tcp://10.0.0.7:24711")),
        ({**SLURM, "SLURMD_NODENAME": "rack-3"}, {}, ("rack-3", "tcp://10.0.0.7:24711")),
        (SLURM, {"node_name": "mine", "store": "tcp://h:1"}, ("mine", "tcp://h:1")),
    ):
        options = nodes.complete(config.load(flags), understood, environ, {"n1": "10.0.0.7"}.__getitem__)
        assert (options.node_name, str(options.store)) == expected
    options = nodes.complete(config.load({}), understood, SLURM, lambda _: "fe80::1")
    assert str(options.store) == "tcp://[fe80::1]:24711"


def test_without_a_place_to_meet(tmp_path: Path) -> None:
    from supervisor.run import run

    options = config.load({"nnodes": "2", "dir": str(tmp_path / "job")})
    with pytest.raises(UsageError, match="where do the nodes meet"):
        run(options, program.parse(["torchrun", "train.py"], {}))
