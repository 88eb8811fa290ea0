"""What a node must have, for the tests of the preflight: next to nothing."""

from forescale.slurm.preflight.findings import Wanted

PLAIN = Wanted(".", [], 1, 0, None, None, 0, reduce=False)
