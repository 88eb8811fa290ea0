"""A task of srun, `python -P -m forescale.slurm.rank RUN`: forks a rank for each attempt that the
supervisor orders (warm.py), or is one, which trains the frozen config.

Invariant: torch's variables (RANK, WORLD_SIZE, ...) are set before torch is imported.
"""

import os
import sys

from forescale.cli import main as command
from forescale.ground.rendezvous import use_interface_to

if __name__ == "__main__":
    # The supervisor has set MASTER_ADDR, MASTER_PORT and LOCAL_WORLD_SIZE.
    names = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    os.environ.update({name: os.environ[source] for name, source in names.items()})
    use_interface_to(os.environ["MASTER_ADDR"])
    sys.exit(command(["train", *sys.argv[1:], "--frozen"]))
