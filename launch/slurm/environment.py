"""What a SLURM job finds in its environment, as one value. Pure: table-tested with environments of real jobs.

Within a step (``srun``) the step's variables say on how many nodes this program was started; in the batch script itself
there are only the job's, and the program runs on the first node alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from launch.slurm import hostlist
from supervisor.errors import ConfigError, UsageError


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """A place in a SLURM job."""

    job_id: int  # of an array's task or a heterogeneous job's component: its own
    job_name: str | None = None
    step_id: str | None = None  # None: the batch script itself, or a shell of salloc
    nodes: tuple[str, ...]  # of the step, else of the job, in SLURM's order: the first one leads
    node_rank: int = 0  # this node among ``nodes``
    node_name: str | None = None  # what SLURM calls this node; several may be on one host
    tasks: int = 1  # of the step
    array: tuple[int, int] | None = None  # the array's job id, and the number of this task
    het_leader: int | None = None  # the first component's job id, in a heterogeneous job
    restarts: int = 0  # how often the job was requeued
    end_time: float | None = None  # Unix seconds, as it was at the job's start; not every version says it

    @property
    def address(self) -> str:
        """The host that leads."""
        return self.nodes[0]

    @property
    def label(self) -> str:
        """What tells this job's directory from another's, and stays when it is requeued: ``4711``, ``4711_3``."""
        return f"{self.array[0]}_{self.array[1]}" if self.array else str(self.job_id)

    @property
    def requeue_id(self) -> int:
        """What to give to ``scontrol requeue``: SLURM refuses to requeue a single component of a heterogeneous job."""
        return self.het_leader or self.job_id


def parse(environ: Mapping[str, str]) -> Allocation | None:
    """The place in a job that ``environ`` tells of; None outside of SLURM.

    Raises ConfigError when SLURM's own variables cannot be (somebody else has set them).
    """
    job_id = _number(environ, "SLURM_JOB_ID") or _number(environ, "SLURM_JOBID")
    if job_id is None:
        return None
    step_id = environ.get("SLURM_STEP_ID") or environ.get("SLURM_STEPID")
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    text = next((environ[name] for name in names[step_id is None :] if environ.get(name)), None)
    nodes = hostlist.expand(text) if text else (environ.get("SLURMD_NODENAME") or "localhost",)
    array, task = _number(environ, "SLURM_ARRAY_JOB_ID"), _number(environ, "SLURM_ARRAY_TASK_ID")
    rank = _number(environ, "SLURM_NODEID") or 0
    if rank >= len(nodes):
        raise ConfigError(f"SLURM_NODEID={rank}, but there are {len(nodes)} nodes ({text})")
    return Allocation(
        job_id=job_id,
        job_name=environ.get("SLURM_JOB_NAME"),
        step_id=step_id,
        nodes=nodes,
        node_rank=rank,
        node_name=environ.get("SLURMD_NODENAME") or None,
        tasks=(_number(environ, "SLURM_STEP_NUM_TASKS") or 1) if step_id is not None else 1,
        array=(array, task) if array is not None and task is not None else None,
        het_leader=_number(environ, "SLURM_JOB_ID_HET_GROUP_0"),
        restarts=_number(environ, "SLURM_RESTART_COUNT") or 0,
        end_time=_number(environ, "SLURM_JOB_END_TIME"),
    )


def check(allocation: Allocation) -> str | None:
    """What the user should be told about how everstep was started; raises UsageError when it cannot go well.

    One supervisor a node is wanted: it starts torchrun, and torchrun the node's workers.
    """
    nodes, tasks = len(allocation.nodes), allocation.tasks
    if tasks > nodes:
        raise UsageError(
            f"srun started everstep {tasks} times on {_counted(nodes)}: once for each node is right, "
            "torchrun starts the workers (srun --ntasks-per-node=1)"
        )
    if nodes == 1:
        return None
    if allocation.step_id is not None:
        return None
    return f"the job has {_counted(nodes)}, of which only {allocation.address} is used (srun everstep run … uses all)"


def _counted(nodes: int) -> str:
    return "1 node" if nodes == 1 else f"{nodes} nodes"


def _number(environ: Mapping[str, str], name: str) -> int | None:
    value = environ.get(name)
    if not value:
        return None
    if not (value.isascii() and value.isdigit()):
        raise ConfigError(f"{name}={value}: a whole number is what SLURM sets")
    return int(value)
