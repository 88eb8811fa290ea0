"""A rank, `python -P -m forescale.slurm.rank RUN`: trains the frozen config as a task of srun.

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
