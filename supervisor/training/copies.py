"""Copies of what ranks of other nodes store: so that a node can resume from its own RAM, and a lost one takes nothing with it.

A checkpoint stores what is replicated once, from the lowest rank that holds it. In the RAM of several nodes it is stored once per
node: where that rank is on another node, the lowest rank of this node that holds the same writes it as well, under a key that
names the node, into a file of its own (``is_copy_file``). Of a tensor that is sharded over some ranks and replicated over
others (hybrid sharding), that goes for each shard.

The index of a node says of those items where its copy lies, and nothing of the files that the node does not have. The index
of the whole, on the first node, says nothing of copies: they are no part of a checkpoint. So it is the index of every other
node's slot, too, once all files are brought there.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.tensor import DTensor

from supervisor.checkpoint.slots import rank_of_file

_PREFIX: Final = re.compile(r"__node_([0-9]+)((?:_[0-9]+)*)__\.")


@dataclass(frozen=True)
class Node:
    """One of several nodes, and the ranks on it. The lowest ranks are on node 0, the next ones on node 1, and so on."""

    number: int
    ranks: range

    @property
    def has_own_index(self) -> bool:
        """Whether its index is another one than that of the whole."""
        return 0 not in self.ranks

    def copies(self, rank: int, holders: Collection[int]) -> bool:
        """Whether ``rank`` keeps the node's copy of what ``holders`` hold, of whom the lowest stores it."""
        if rank not in holders or min(holders) in self.ranks:
            return False
        return rank == min(other for other in holders if other in self.ranks)

    def prefix(self, offsets: Collection[int] = ()) -> str:
        """What the key of a copy begins with; ``offsets``: of a shard in the tensor."""
        return f"__node_{'_'.join(map(str, (self.number, *offsets)))}__"

    def may_lack(self, name: str) -> bool:
        """Whether a file may be missing on this node: another node's ranks have written it."""
        rank = rank_of_file(name)
        return rank is not None and rank not in self.ranks


def is_copy(key: str) -> bool:
    """Whether a flat key is that of a copy."""
    return _PREFIX.match(key) is not None


def holders_of(tensor: DTensor) -> frozenset[int]:
    """The ranks that hold the same part of ``tensor`` as this one; none if this rank has no part in it."""
    mesh = tensor.device_mesh
    here = mesh.get_coordinate()
    if here is None:
        return frozenset()
    where = tuple(
        slice(None) if placement.is_replicate() else at
        for placement, at in zip(tensor.placements, here, strict=True)
    )
    return frozenset(mesh.mesh[where].flatten().tolist())


def offsets_of(tensor: DTensor) -> tuple[int, ...]:
    """Where this rank's part of ``tensor`` begins."""
    chunked: Any = tensor  # it is untyped
    (chunk,) = chunked.__create_chunk_list__()
    return tuple(chunk.offsets)


def without_copies(metadata: Metadata) -> Metadata:
    """The index of the whole."""
    copied = {key for key in metadata.state_dict_metadata if is_copy(key)}
    whole = copy.copy(metadata)
    whole.state_dict_metadata = {
        key: entry for key, entry in metadata.state_dict_metadata.items() if key not in copied
    }
    whole.storage_data = {
        index: info for index, info in metadata.storage_data.items() if index.fqn not in copied
    }
    if isinstance(metadata.planner_data, dict):
        whole.planner_data = {key: path for key, path in metadata.planner_data.items() if key not in copied}
    return whole


def index_of_node(metadata: Metadata, node: Node) -> Metadata:
    """The index of a node, from that of everything: all keys, and of what they stand for what lies there."""
    own = without_copies(metadata)
    stored = {
        index: info for index, info in own.storage_data.items() if not node.may_lack(info.relative_path)
    }
    for index, info in metadata.storage_data.items():
        match = _PREFIX.match(index.fqn)
        if match is not None and int(match[1]) == node.number:
            stored[_original(index, match)] = info
    own.storage_data = stored
    return own


def _original(index: MetadataIndex, match: re.Match[str]) -> MetadataIndex:
    offset = torch.Size(map(int, match[2].split("_")[1:])) if match[2] else index.offset
    return MetadataIndex(index.fqn[match.end() :], offset)
