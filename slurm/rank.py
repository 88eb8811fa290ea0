"""A rank, `python -P -m forescale.slurm.rank RUN`: a task of srun trains the frozen config.

Invariant: what torch must know of the world stands in the environment before torch is imported.
"""

import os
import sys

from forescale.cli import main as command
from forescale.slurm.node import interface_to


def adopt() -> None:
    """srun's names in torch's words. The batch script has set MASTER_ADDR, MASTER_PORT and
    LOCAL_WORLD_SIZE."""
    words = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    os.environ.update({ours: os.environ[theirs] for ours, theirs in words.items()})
    if found := interface_to(os.environ["MASTER_ADDR"]):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", found)
        # With = it is that one alone, and not all whose names begin so.
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={found}")


if __name__ == "__main__":
    adopt()
    sys.exit(command(["train", *sys.argv[1:], "--frozen"]))
