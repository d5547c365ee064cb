"""The batch script of a job of everstep, built from what the user said. Pure; ``deploy/slurm/everstep.sbatch`` is one.

What it has to do beside starting everstep on each node:

- outlive the signals that SLURM sends to it, too: a script that ends takes the job with it, and a preempted job whose script
  ends within its grace is never requeued;
- hand on what is sent to the script alone (``--signal=B:USR1@…``);
- run the job again where everstep could not do it, in a container without ``scontrol``: exit code 75 says that the state
  is saved. Not twice: only while the job is running, or over its time limit, and not after it was cancelled;
- with ``--no-kill``, not to take a node that was lost for the job: srun's code is the worst of all tasks;
- in a *chain*, where the cluster forbids requeueing, submit its successor, which finds the job directory by its number.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from launch.slurm.options import render

#: the number of the chain's first job: what the job directory is called after
CHAIN = "EVERSTEP_CHAIN"
#: a node that leaves before the others must not take them with it, whatever the cluster has as its default
STAY = ("--kill-on-bad-exit=0", "--wait=0")

_RUN = """\
{srun} &
step=$!
trap 'kill -USR1 "$step" 2>/dev/null' USR1  # sent to this script alone, by --signal=B:USR1@…
trap : TERM                                 # SLURM has told everstep, too: wait for it
while kill -0 "$step" 2>/dev/null; do wait "$step"; done
wait "$step"
code=$?
"""
_ASK = """
# srun's code may be that of a node which was lost, and the job has gone on without it: how does that stand?
if [ "$code" -ne 0 ] && [ "$code" -ne 75 ]; then
    case $(timeout 60 {everstep} status --json --dir {place}) in
        *'"state": "completed"'*) code=0 ;;
        *'"state": "preempted"'*) code=75 ;;
    esac
fi
"""
_REQUEUE = """
# 75: the state is saved, and there is more to do. everstep has requeued the job, unless it found no scontrol.
if [ "$code" -eq 75 ]; then
    case $(timeout 20 scontrol --oneliner show job "$SLURM_JOB_ID") in
        *' JobState=RUNNING '* | *' JobState=COMPLETING Reason=TimeLimit '*)
            timeout 20 scontrol requeue "$SLURM_JOB_ID" ;;
    esac
fi
exit "$code"
"""
_SUCCEED = """
# 75: the state is saved, and there is more to do. This job may not be requeued: submit the next one.
if [ "$code" -eq 75 ]; then
    case $(timeout 20 scontrol --oneliner show job "$SLURM_JOB_ID") in
        *' JobState=RUNNING '* | *' JobState=COMPLETING Reason=TimeLimit '*)
            timeout 20 sbatch --export=ALL --dependency=afterany:"$SLURM_JOB_ID" "$0" ;;
    esac
fi
exit "$code"
"""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What is to be submitted. ``words``: what comes behind ``everstep run``."""

    everstep: Sequence[str]  # how it is called on the nodes
    words: Sequence[str]
    name: str
    options: dict[str, str | None]  # sbatch's
    directory: str  # the job's
    found: bool = False  # everstep finds its name: it goes on with the job's number
    requeue: bool = True  # whether the script sees to it that a saved job runs again
    chain: bool = False  # by submitting another job, not by requeueing this one


def build(batch: Batch) -> str:
    """The script."""
    nodes = batch.options.get("nodes") or "1"
    options = {
        "job-name": batch.name,
        "nodes": nodes,
        "ntasks-per-node": "1",
        "no-requeue" if batch.chain else "requeue": None,
        "open-mode": "append",
        **{name: value for name, value in batch.options.items() if name not in ("job-name", "nodes")},
    }
    if name := batch.options.get("job-name"):
        options["job-name"] = name
    head = ["#!/bin/bash", *(f"#SBATCH {option}" for option in render(options)), "", ""]
    if batch.chain:
        head.insert(-1, f': "${{{CHAIN}:=$SLURM_JOB_ID}}"; export {CHAIN}  # the first job of the chain')
    end = "" if not batch.requeue else _SUCCEED if batch.chain else _REQUEUE
    if "no-kill" in batch.options:
        end = _ASK.format(everstep=shlex.join(batch.everstep), place=_place(batch)) + (end or "\n")
    return "\n".join(head) + _RUN.format(srun=_srun(batch)) + _closed(end)


def _closed(end: str) -> str:
    return end if end.endswith('exit "$code"\n') else end + 'exit "$code"\n'


def _place(batch: Batch) -> str:
    """The job directory, as the shell writes it."""
    if batch.chain and batch.found:
        return f'{shlex.quote(batch.directory)}"${CHAIN}"'
    if batch.found:
        number = (
            "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}" if "array" in batch.options else "$SLURM_JOB_ID"
        )
        return f'{shlex.quote(batch.directory)}"{number}"'
    return shlex.quote(batch.directory)


def _srun(batch: Batch) -> str:
    """One everstep for each node, with all the CPUs that the job has there: torchrun's workers share them."""
    words = ["srun", "--ntasks-per-node=1", "--cpu-bind=none", *STAY]
    if cpus := batch.options.get("cpus-per-task"):
        words.append(f"--cpus-per-task={cpus}")  # srun does not take it from sbatch (22.05 and later)
    if "no-kill" in batch.options:
        words.append("--no-kill")  # sbatch's alone does not save the step
    own = [*batch.everstep, "run"]
    where = [f"--dir {_place(batch)}"] if batch.chain and batch.found else []
    lines = [" ".join([*map(shlex.quote, [*words, *own]), *where]), shlex.join(batch.words)]
    return " \\\n    ".join(lines)
