"""Containers for the ranks: how a command of srun runs in one, with Pyxis or with Apptainer; and
the command of Python, inside and outside.

Invariant: the run, its data, the scratch directory and the working directory have inside the paths
that they have outside, and an image can't replace the code or the addresses of a job.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from forescale.ground.errors import UserError
from forescale.slurm.config import SlurmConfig
from forescale.slurm.submission import Submission

# Where the drivers are loaded; AMD's also for the graphics of a processor, beside NVIDIA's.
AMD, NVIDIA = Path("/dev/kfd"), Path("/dev/nvidiactl")
# Of a variable that an image sets, too, the image's value wins, in Pyxis and in Apptainer. For an
# image with PYTORCH_VERSION, Enroot's hook 50-slurm-pytorch.sh adds values of its own to these.
_PASSED_ON = (
    *("PYTHONPATH", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"),
    *("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "HF_HOME"),
)


def options(submission: Submission) -> list[str]:
    """Return srun's options for a command in the container: Pyxis adds them to srun."""
    settings = submission.settings
    if settings.container is None or settings.container_runtime != "pyxis":
        return []
    return [
        f"--container-image={settings.container}",
        f"--container-mounts={','.join(mounts(submission))}",
        f"--container-workdir={os.getcwd()}",
        f"--container-env={','.join((*_PASSED_ON, *settings.exports))}",
    ]


def prefix(submission: Submission) -> list[str]:
    """Return the words before a command in the container: Apptainer and Singularity are commands
    themselves."""
    settings = submission.settings
    if settings.container is None or settings.container_runtime == "pyxis":
        return []
    names = [name for name in (*_PASSED_ON, *settings.exports) if name in os.environ]
    vendor = "--rocm" if AMD.exists() and not NVIDIA.exists() else "--nv"
    return [
        *(settings.container_runtime, "exec", *([vendor] if settings.has_gpus else [])),
        *("--bind", ",".join(mounts(submission)), "--pwd", os.getcwd(), settings.container),
        *("env", *(f"{name}={os.environ[name]}" for name in names)),
    ]


def prepared(submission: Submission, host: Sequence[str], inside: Sequence[str]) -> list[str]:
    """Return the command that runs `inside`, and first `host` if only the host can make what Pyxis
    mounts. If `host` fails on a node, `inside` still reports of the others."""
    if not options(submission):
        return list(inside)
    return ["bash", "-c", f"{shlex.join(host)}\nexec {shlex.join(inside)}"]


def mounts(submission: Submission) -> list[str]:
    """Return what the container shows of the host, as SOURCE:TARGET. Raises UserError for a path
    that can't be written so."""
    local = [path for path in submission.facts["data"] if "://" not in path]
    root = str(submission.run.path.parent)
    paths = sorted({os.environ["FORESCALE_SCRATCH"], os.getcwd(), root, *local})  # parents first
    for path in paths:
        if not {",", ":"}.isdisjoint(path):
            todo = "move it, or give a path without them: a list of mounts can't hold it"
            raise UserError(path, "has a comma or a colon, and a container must show it", todo)
    extra = submission.settings.mounts
    return [*(f"{path}:{path}" for path in paths), *(m if ":" in m else f"{m}:{m}" for m in extra)]


def python(settings: SlurmConfig) -> list[str]:
    """Return the command of Python for the ranks."""
    if settings.python is None:
        return ["python3" if settings.container else sys.executable]
    return shlex.split(settings.python)


def python_of_host(settings: SlurmConfig) -> list[str]:
    """Return the command of Python for the batch script. It needs SLURM's commands, which an image
    rarely has, so it is outside of the container."""
    words = python(settings)
    is_inside = settings.container or Path(words[0]).name in ("apptainer", "singularity")
    return [sys.executable] if is_inside else words
