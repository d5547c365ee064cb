"""Several nodes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from supervisor.amounts import parse_rate
from supervisor.decide.membership import Size
from supervisor.edge.store import address
from supervisor.edge.store.address import StoreAddress
from supervisor.errors import ConfigError
from supervisor.flags.reading import Group, at_least, one_of, option, positive

LEAST_LEASE: Final = 1.0  # seconds: shorter ones would run out on a busy machine


def parse_size(value: object) -> Size:
    """``4``, or ``2:4`` for as many nodes as there are between these."""
    match = re.fullmatch(r"\s*(\d{1,6})\s*(?::\s*(\d{1,6})\s*)?", str(value))
    if match is None or isinstance(value, bool):
        raise ConfigError(f"{value!r}: a number of nodes, or MIN:MAX, is required")
    least = int(match[1])
    most = int(match[2]) if match[2] else least
    if not 1 <= least <= most:
        raise ConfigError(f"{value!r}: 1 <= MIN <= MAX is required")
    return Size(least=least, most=most)


def parse_rank(value: object) -> int:
    """A node's rank."""
    if isinstance(value, bool) or not re.fullmatch(r"\s*\d{1,6}\s*", str(value)):
        raise ConfigError(f"{value!r}: a number from 0 on is required")
    return int(str(value))


def parse_name(value: object) -> str:
    """A node's name: a plain word, for it is part of file names."""
    text = str(value)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", text):
        raise ConfigError(f"{text!r}: letters, digits, dots, dashes and underscores are allowed")
    return text


def _store(value: object) -> StoreAddress:
    return address.parse(str(value))


@dataclass(frozen=True, kw_only=True)
class NodeOptions(Group):
    """The nodes of a job, and what they do for each other."""

    nnodes: Size | None = option(parse_size, None)
    """How many nodes: as many as given, or between two numbers. None: what torchrun or the scheduler says, else one."""
    node_rank: int | None = option(parse_rank, None)
    """This node's rank among them, if it matters. None: what torchrun or the scheduler says, else as they come."""
    node_name: str | None = option(parse_name, None)
    """What this node is called. None: what SLURM calls it, else its hostname."""
    store: StoreAddress | None = option(_store, None)
    """Where the nodes of a job meet: ``tcp://host:port`` (served by the node of that name) or ``etcd://host:port``."""
    lease: float = option(at_least(LEAST_LEASE), 5.0)
    """Seconds without a word from a node until it is taken for lost."""
    node_timeout: float = option(positive, 600.0)
    """Seconds that a job waits for nodes when there are too few, before it leaves with exit code 75."""
    peer_copies: str = option(one_of("on", "off"), "on")
    """Keep each node's snapshots in another node's memory, too: ``on`` or ``off``."""
    peer_bandwidth: float | None = option(parse_rate, None)
    """Bytes a second that a node may fetch of other nodes' snapshots. None: no limit."""
