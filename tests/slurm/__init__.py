"""Jobs on a real SLURM cluster, which the tests set up on this machine."""
