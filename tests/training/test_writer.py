"""The writer through DCP: who makes a checkpoint's directory, and when."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.checkpoint.planner import SavePlan

from supervisor.training.items import Items
from supervisor.training.writer import PlannerOfItems, Storage


def planned(directory: Path, *, cleans: bool) -> SavePlan:
    """What a rank does of a save until the plans of all are gathered."""
    items = Items(rank=0, values={"weight": torch.ones(3)}, paths={"weight": ("weight",)})
    planner, storage = PlannerOfItems(lambda: items, directory, cleans=cleans), Storage(directory)
    planner.set_up_planner({}, storage.storage_meta(), False)
    storage.set_up_storage_writer(False)
    return storage.prepare_local_plan(planner.create_local_plan())


def test_only_the_rank_that_clears_it_makes_the_directory_before_all_have_planned(tmp_path: Path) -> None:
    """Made by another rank, it would be taken for a leftover by the first, and removed under the other's feet."""
    assert len(planned(tmp_path / "step", cleans=False).items) == 1
    assert not (tmp_path / "step").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "__3_0.distcp").touch()
    assert len(planned(tmp_path / "other", cleans=True).items) == 1
    assert list((tmp_path / "other").iterdir()) == []
    assert len(planned(tmp_path / "new", cleans=True).items) == 1
    assert (tmp_path / "new").is_dir()
