"""Jobs on a SLURM cluster: submitted, looked at, started, requeued."""
