"""The cluster, asked for what ``fitness`` judges."""

from __future__ import annotations

from collections.abc import Mapping

from launch.slurm import environment, fitness, shown
from launch.slurm.scheduler import Asked
from supervisor.decide.fitness import Finding, warning


def examine(client: Asked, environ: Mapping[str, str], save: float | None) -> list[Finding]:
    """Findings about the cluster, and about this job if this is run in one. ``save``: seconds that one took."""
    text = client.show("config")
    if text is None:
        return [
            warning(
                "slurm", "scontrol is there, and slurmctld does not answer", "ask its operator; scontrol ping"
            )
        ]
    allocation = environment.parse(environ)
    shows = client.show("job", str(allocation.job_id)) if allocation else None
    job = shown.parse_job(shows) if shows else None
    partition = _partition(client, environ.get("SLURM_JOB_PARTITION"))
    limit = shown.limit(shown.fields(shows).get("TimeLimit") if shows else partition.get("MaxTime"))
    grace = partition.get("GraceTime", "")
    return fitness.findings(
        shown.parse_config(text),
        job,
        grace=float(grace) if grace.isdecimal() else None,
        limit=limit,
        save=save,
    )


def _partition(client: Asked, name: str | None) -> dict[str, str]:
    """The partition of this job, else the default one."""
    for line in (client.show("partition", *([name] if name else [])) or "").splitlines():
        found = shown.fields(line)
        if name is not None or found.get("Default") == "YES":
            return found
    return {}
