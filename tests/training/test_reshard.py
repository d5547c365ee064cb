"""Another number of ranks: the state is sharded anew, and training goes on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.training.harness import launch
from tests.training.programs import elastic, lean, shards


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_one_rank_two_ranks(kind: str, tmp_path: Path) -> None:
    expected = launch(elastic.train, 2, kind, 9, str(tmp_path / "undisturbed"))[0]
    for world, steps in ((2, 3), (1, 6), (2, 9)):
        results = launch(elastic.train, world, kind, steps, str(tmp_path / "job"))
    assert results[0]["used"] == results[1]["used"] == expected["used"] == list(range(0, 72, 8))
    for rank in range(2):
        assert all(
            math.isclose(new, old, rel_tol=1e-9, abs_tol=1e-12)
            for new, old in zip(results[rank]["weights"], expected["weights"], strict=True)
        )
    assert results[0]["draw"] != results[1]["draw"], "a new rank draws a stream of its own"


def test_zero_redundancy_optimizer(tmp_path: Path) -> None:
    expected = launch(elastic.zero, 2, 6, None)
    launch(elastic.zero, 2, 3, str(tmp_path))
    assert launch(elastic.zero, 2, 6, str(tmp_path)) == expected


def test_shards_are_read_as_they_were_saved_unless_they_are_others(tmp_path: Path) -> None:
    launch(shards.save, 2, tmp_path)
    assert launch(shards.load, 2, tmp_path) == [[], []]
    sharded = ["model.columns", "model.middle", "model.rows", "model.uneven"]
    assert launch(shards.load, 3, tmp_path) == [sharded] * 3
    assert launch(shards.load, 1, tmp_path) == [sharded]


@pytest.mark.parametrize("strict", [True, False], ids=["bytes", "pieces"])
def test_each_rank_asks_for_what_it_reads(strict: bool, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    launch(lean.save, 2, checkpoint)
    shares = {}
    for world in (1, 2, 4):
        asked = launch(lean.load, world, checkpoint, tmp_path / f"on-{world}", strict=strict)
        assert all(1 <= one["requests"] <= 12 for one in asked), asked
        shares[world] = max(one["bytes"] / one["total"] for one in asked)
    assert shares[1] <= 1
    assert shares[2] < (0.51 if strict else 0.75), shares
    assert shares[4] < (0.26 if strict else 0.75), shares
