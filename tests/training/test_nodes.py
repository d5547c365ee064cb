"""Several nodes: each can resume from its own RAM, and together they hold one stock checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from supervisor.checkpoint.slots import is_copy_file, rank_of_file
from supervisor.training.copies import Node, is_copy
from supervisor.training.reader import read_metadata
from tests.training.harness import launch
from tests.training.programs.nodes import bytes_of, load_alone, train_and_come_back


@pytest.mark.parametrize(
    ("kind", "world", "copyists"), [("ddp", 2, {1}), ("fsdp", 2, {1}), ("hybrid", 4, {2, 3})]
)
def test_each_node_comes_back_from_its_own_files(
    kind: str, world: int, copyists: set[int], tmp_path: Path
) -> None:
    results = launch(train_and_come_back, world, str(tmp_path), kind, drafted=kind == "ddp")
    assert [result["came_back"] for result in results] == [[True, True]] * world
    assert [result["frozen"] for result in results] == [1] * world, "stored or copied, it waits for its time"
    first, second = (tmp_path / f"node-{node}" / "1" for node in range(2))
    assert not any(is_copy_file(path.name) for path in first.iterdir())
    copies = {path.name for path in second.iterdir() if is_copy_file(path.name)}
    assert {rank_of_file(name) for name in copies} == copyists
    # the files of all nodes in one place, as whoever lost a node would bring them there
    whole = tmp_path / "whole"
    shutil.copytree(second, whole)
    shutil.copytree(first, whole, dirs_exist_ok=True)
    alone = launch(load_alone, 1, str(whole), str(second), kind)[0]
    assert alone["model"] == results[0]["model"]
    assert f"{second} does not hold 'session' in full" in alone["refused"]
    # and as a checkpoint
    for name in copies:
        (whole / name).unlink()
    metadata = read_metadata(whole)
    assert not any(map(is_copy, metadata.state_dict_metadata))
    dcp_to_torch_save(whole, tmp_path / "whole.pt")
    stored = torch.load(tmp_path / "whole.pt", weights_only=False)
    logical = {name for name in stored if not name.startswith("__rank_")}
    assert logical == {"model", "optimizer", "session", "session.state"}
    assert {name: bytes_of(stored["model"][name]) for name in alone["model"]} == alone["model"]


def test_the_lowest_rank_of_a_node_that_holds_it_keeps_the_copy() -> None:
    node = Node(1, range(2, 4))
    everywhere, stage, own = {0, 1, 2, 3}, {1, 3}, {2, 3}
    assert [rank for rank in node.ranks if node.copies(rank, everywhere)] == [2]
    assert [rank for rank in node.ranks if node.copies(rank, stage)] == [3], "rank 2 has another stage"
    assert not any(node.copies(rank, own) for rank in node.ranks), "this node stores it"
    assert not any(Node(0, range(2)).copies(rank, stage) for rank in range(2))


@pytest.mark.parametrize(
    ("name", "rank", "copies"),
    [
        ("__0_0.distcp", 0, False), ("__12_2.distcp", 12, True), ("__0_12.distcp", 0, False),
        (".metadata", None, False), ("__1_2.distcp.tmp", None, False), ("x__1_2.distcp", None, False),
    ],
)  # fmt: skip
def test_names_of_files(name: str, rank: int | None, copies: bool) -> None:
    assert (rank_of_file(name), is_copy_file(name)) == (rank, copies)
