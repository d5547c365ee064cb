"""Are the cluster's settings and this job's good for a job that is to be stopped, saved and run again? Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from launch.slurm import shown
from launch.slurm.shown import ShownJob
from supervisor.decide.deadline import Costs, lead
from supervisor.decide.fitness import Finding, ok, warning

#: seconds for a save, before one was measured
UNKNOWN_SAVE: Final = 20.0


def requeueing(config: Mapping[str, str], job: ShownJob | None) -> Finding:
    """Whether a job may be requeued. ``job``: the one that this is run in."""
    name = "slurm requeue"
    if job is not None and not job.batch:
        return warning(name, "an interactive job", "it cannot be requeued: use `everstep submit slurm`")
    if job is not None and not job.requeue:
        return warning(
            name, "this job may not be requeued", "sbatch --requeue, or `everstep submit slurm --chain`"
        )
    if config.get("JobRequeue") == "0" and job is None:
        return warning(
            name,
            "JobRequeue=0",
            "sbatch --requeue (`everstep submit slurm` says so), or --chain if that is refused",
        )
    return ok(name, "allowed" if job is None else "allowed for this job")


def kill_wait(config: Mapping[str, str], save: float | None) -> Finding:
    """The time from SIGTERM to SIGKILL, against what a save takes (seconds; None: not measured)."""
    name = "slurm KillWait"
    seconds = shown.seconds(config, "KillWait")
    if seconds is None:
        return ok(name, "unknown")
    needed = lead(Costs(save=UNKNOWN_SAVE / 2 if save is None else save), UNKNOWN_SAVE)
    why = "a save is not measured yet" if save is None else f"a save takes {save:.1f} s"
    if seconds < needed:
        return warning(
            name, f"{seconds:g} s, and {why}",
            "scancel and scontrol requeue leave no more than that: checkpoint more often, or KillWait in slurm.conf",
        )  # fmt: skip
    return ok(name, f"{seconds:g} s")


def preemption(config: Mapping[str, str], grace: float | None, save: float | None) -> Finding:
    """How jobs are preempted. ``grace``: GraceTime of the partition in seconds, None: not known."""
    name, mode = "slurm preemption", config.get("PreemptMode", "OFF")
    if mode.startswith("OFF") or config.get("PreemptType", "").endswith("/none"):
        return ok(name, "off")
    found = f"{mode}, GraceTime {grace:g} s" if grace is not None else mode
    if "SUSPEND" in mode:
        return warning(
            name, found, "a suspended job keeps its memory and its time limit runs on: nothing is saved"
        )
    if grace is not None and grace < lead(
        Costs(save=UNKNOWN_SAVE / 2 if save is None else save), UNKNOWN_SAVE
    ):
        return warning(
            name,
            found,
            "after that only KillWait is left for the save: GraceTime for the partition, or checkpoint more often",
        )
    return ok(name, found)


def tracking(config: Mapping[str, str]) -> Finding:
    """Whether SLURM finds every process of a job."""
    name, kind = "slurm ProctrackType", config.get("ProctrackType", "unknown")
    if kind.endswith("cgroup") or kind == "unknown":
        return ok(name, kind)
    return warning(
        name, kind, "proctrack/cgroup: torchrun's workers have sessions of their own, and others lose them"
    )


def leftovers(config: Mapping[str, str]) -> Finding:
    """Whether somebody empties /dev/shm behind a job that was killed."""
    name, container = "slurm /dev/shm", config.get("JobContainerType", "")
    if container.endswith("/tmpfs"):
        return ok(name, "private to each job, by job_container/tmpfs (Dirs must name /dev/shm)")
    if config.get("Epilog", "(null)") != "(null)":
        return ok(name, "there is an Epilog; deploy/slurm/epilog.sh is what it needs")
    mend = "Epilog=…/deploy/slurm/epilog.sh in slurm.conf; else the user's next job on that node removes it"
    return warning(name, "a job that is killed leaves its snapshots there", mend)


def time_limit(limit: float | None, save: float | None) -> Finding:
    """The time that a job gets (seconds; None: no limit), against what a save takes."""
    name = "slurm time limit"
    if limit is None:
        return ok(name, "none")
    needed = lead(Costs(save=save), 60.0)
    found = f"{limit / 60:.0f} min"
    if needed > limit / 4:
        return warning(
            name,
            f"{found}, of which {needed:.0f} s are kept for the save",
            "ask for more time (sbatch --time)",
        )
    return ok(name, f"{found}, the stop begins {needed:.0f} s before")


def findings(
    config: Mapping[str, str],
    job: ShownJob | None,
    *,
    grace: float | None,
    limit: float | None,
    save: float | None,
) -> list[Finding]:
    """All of them."""
    return [
        requeueing(config, job),
        time_limit(limit, save),
        kill_wait(config, save),
        preemption(config, grace, save),
        tracking(config),
        leftovers(config),
    ]
