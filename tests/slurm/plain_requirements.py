"""What a node must have, for the tests of the preflight: next to nothing."""

from forescale.slurm.preflight.findings import Requirements

PLAIN = Requirements(".", [], 1, 0, None, None, 0, reduce=False)
