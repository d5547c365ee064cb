"""What everstep commits is still a stock DCP checkpoint, also as a copy, for a process that has no everstep."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch.distributed import checkpoint as dcp

from supervisor.checkpoint.catalog import list_checkpoints, step_directory, verify
from supervisor.checkpoint.commit import drain, seal
from tests.checkpoint.tools import origin

READER = """
import sys, torch
from torch.distributed import checkpoint as dcp
assert not any(name.partition(".")[0] in ("supervisor", "launch") for name in sys.modules)
state = {"weight": torch.zeros(300, 7), "step": -1}
dcp.load(state, checkpoint_id=sys.argv[1], no_dist=True)
assert torch.equal(state["weight"], torch.arange(2100.0).reshape(300, 7)), state
assert state["step"] == 12
"""


def test_stock_dcp_reads_it(tmp_path: Path) -> None:
    state = {"weight": torch.arange(2100.0).reshape(300, 7), "step": 12}
    dcp.save(state, checkpoint_id=tmp_path / "saved", no_dist=True)
    seal(tmp_path / "saved", origin(12))
    drained = step_directory(tmp_path / "checkpoints", 12)
    drain(tmp_path / "saved", drained, origin(12))
    copied = step_directory(tmp_path / "copies", 12)
    shutil.copytree(drained, copied)
    assert verify(list_checkpoints(tmp_path / "copies")[0]) == []
    for directory in (tmp_path / "saved", drained, copied):
        subprocess.run(
            [sys.executable, "-I", "-c", READER, str(directory)], check=True, cwd=tmp_path, timeout=60
        )
