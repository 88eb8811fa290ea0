"""What a node must have, for the tests of the preflight: next to nothing."""

from forescale.slurm.findings import Wanted

PLAIN = Wanted(".", [], 1, 0, None, None, 0, reduce=False)
