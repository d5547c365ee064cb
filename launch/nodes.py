"""How many nodes, which of them this is, and where they meet: what the flags leave open is taken from torchrun's line, or the scheduler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from launch.program import Program
from launch.slurm import environment
from supervisor.config import Options
from supervisor.edge.store import address
from supervisor.errors import ConfigError, UsageError
from supervisor.flags import nodes as node_options

PORTS: Final = range(20000, 30000)  # for the store of a SLURM job, by the job's number


def complete(
    options: Options,
    program: Program,
    environ: Mapping[str, str],
    address_of: Callable[[str], str] = lambda node: node,
) -> Options:
    """The options with all that is known about nodes. ``address_of``: where SLURM's node of that name is reached.

    Raises UsageError for what torchrun's line or the scheduler cannot mean.
    """
    options = _from_torchrun(options, program)
    options = from_slurm(options, environ, address_of)
    several = options.nnodes is not None and options.nnodes.most > 1
    if several and program.launcher is None:
        raise UsageError(
            f"--nnodes {options.nnodes}: several nodes are torchrun's to start, but this is {program.command[0]}"
        )
    if (
        several
        and options.node_rank is not None
        and options.nnodes
        and options.node_rank >= options.nnodes.most
    ):
        raise UsageError(f"--node-rank {options.node_rank}: of {options.nnodes} nodes")
    return options


def _from_torchrun(options: Options, program: Program) -> Options:
    if program.launcher is None:
        return options
    said = program.launcher.nodes
    try:
        if options.nnodes is None and said.count is not None:
            options = replace(options, nnodes=node_options.parse_size(said.count))
        if options.node_rank is None and said.rank is not None:
            options = replace(options, node_rank=node_options.parse_rank(said.rank))
        several = options.nnodes is not None and options.nnodes.most > 1
        if several and options.store is None and said.endpoint is not None:
            options = replace(options, store=address.parse(f"tcp://{said.endpoint}"))
    except ConfigError as error:
        raise UsageError(f"torchrun: {error}") from None
    return options


def from_slurm(options: Options, environ: Mapping[str, str], address_of: Callable[[str], str]) -> Options:
    """What a SLURM step says of its nodes, where the options leave it open."""
    allocation = environment.parse(environ)
    if allocation is None or allocation.step_id is None or len(allocation.nodes) == 1:
        return options
    nodes = len(allocation.nodes)
    if options.nnodes is None:
        options = replace(options, nnodes=node_options.parse_size(nodes))
    if options.nnodes is None or options.nnodes.most == 1:
        return options
    if options.node_rank is None:
        options = replace(options, node_rank=allocation.node_rank)
    if options.node_name is None:  # not the hostname: several nodes may share one
        name = allocation.node_name or allocation.nodes[allocation.node_rank]
        options = replace(options, node_name=node_options.parse_name(name))
    if options.store is None:
        port = PORTS[allocation.job_id % len(PORTS)]
        host = address_of(allocation.address)
        url = f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
        options = replace(options, store=address.parse(url))
    return options
