"""Where this user submitted a run last: its machine and SLURM settings, for the next submission.

Invariant: kept in the user's own state directory, never read from the run's: these settings hold
lines of shell, and a run's directory may have been written by another.
"""

import hashlib
import os
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from platformdirs import user_state_path

from forescale.config.schema import plain
from forescale.ground.errors import UserError
from forescale.ground.storage import read_typed, write_json
from forescale.plan.config import MachineConfig
from forescale.slurm.config import SlurmConfig, SubmitJob

_OF_ONE_COMMAND = ("runs", "at_once", "after")  # of an array, or of a moment


def remember(job: SubmitJob) -> None:
    """Keep the settings of a job that SLURM has accepted. Without a place for them, they are typed
    again the next time."""
    settings = {k: v for k, v in plain(job.slurm).items() if k not in _OF_ONE_COMMAND}
    machine = plain(job.machine)
    if not job.slurm.has_gpus:
        machine["memory_bytes"] = None  # on CPUs it follows from slurm.mem
    with suppress(OSError, UserError):
        path = _file(job.run.directory)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_json(path, {"slurm": settings, "machine": machine})


def recall(run: Path) -> dict[str, Any]:
    """Return the sections `slurm` and `machine` of this user's last submission of a run; empty if
    there was none."""
    with suppress(OSError, UserError):
        path = _file(run)
        kind = dict[str, dict[str, Any]]
        stored = read_typed(kind, path) if path.exists() else {}
        return {
            name: {f.name: stored[name][f.name] for f in fields(kind) if f.name in stored[name]}
            for name, kind in (("slurm", SlurmConfig), ("machine", MachineConfig))
            if name in stored
        }
    return {}


def _file(run: Path) -> Path:
    digest = hashlib.sha256(os.fsencode(run.expanduser().resolve())).hexdigest()
    return user_state_path("forescale") / "submitted" / f"{digest}.json"
