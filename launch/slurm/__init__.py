"""SLURM: what a job finds around it, what is asked of the scheduler, and how a job is submitted."""
