"""From a job to its run directory: names, attempts, lineage; the start or a refusal."""
