"""A rank, `python -P -m forescale.slurm.rank RUN`: trains the frozen config as a task of srun.

Invariant: torch's variables (RANK, WORLD_SIZE, ...) are set before torch is imported.
"""

import os
import sys

from forescale.cli import main as command
from forescale.ground.rendezvous import interface_to


def adopt() -> None:
    """Set torch's variables from srun's. The supervisor has set MASTER_ADDR, MASTER_PORT and
    LOCAL_WORLD_SIZE."""
    names = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    os.environ.update({name: os.environ[source] for name, source in names.items()})
    if interface := interface_to(os.environ["MASTER_ADDR"]):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        # With =, NCCL uses this interface alone, not all whose names begin with it.
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")


if __name__ == "__main__":
    adopt()
    sys.exit(command(["train", *sys.argv[1:], "--frozen"]))
