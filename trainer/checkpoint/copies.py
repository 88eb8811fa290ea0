"""Checks that a folder holds a copy of this very run: the same run with the same history.

Invariant: a copy that lacks files of the run is the run's; one with other files is not. Imports no
torch.
"""

import json
from typing import Any

from forescale.ground.errors import UserError
from forescale.ground.storage import read_typed
from forescale.remote.buckets import Folder
from forescale.run.directory import Run

LAUNCH = "launch.json"  # written by resilience/outcome.py; torchrun and rollbacks write none
PARENT = "parent.json"  # later than launch.json, and sent after it
ROWS = "metrics.jsonl"


class Taken(UserError):
    """The folder holds another run, or attempts that this run directory lacks: another copy of the
    run continued."""


def expect_same_run(run: Run, folder: Folder, there: dict[str, int]) -> set[str]:
    """Return the names of the attempts in a folder; `there`: its files, all of them the run's.
    Raises Taken if it holds others, UserError if it can't be read."""
    attempts = {n.split("/")[1] for n in there if n.startswith("attempts/")}
    name = run.identity.name
    copied = _read(folder, name).get("wandb_id") if name in there and attempts else None
    local = run.read_identity().get("wandb_id")  # an early version wrote none
    if None not in (copied, local) and copied != local:
        todo = "set another run.name or checkpoint.mirror"
        raise Taken(folder.where, f"holds another run of the name {run.name}", todo)
    missing = attempts - {a.path.name for a in run.attempts()}
    if strange := sorted(missing) or [
        a for a in sorted(attempts) if _differs(run, a, folder, there)
    ]:
        problem = f"holds attempt {strange[-1]} of {run.name}, which isn't the one in {run.path}"
        todo = (
            "another copy of the run went on: go on with that one, or move this directory away and "
            "give the command again to restore it, or set another checkpoint.mirror"
        )
        raise Taken(folder.where, problem, todo)
    return attempts


def _differs(run: Run, attempt: str, folder: Folder, there: dict[str, int]) -> bool:
    """True if the attempt of this number there is that of another copy of the run."""
    launch, parent, rows = (f"attempts/{attempt}/{name}" for name in (LAUNCH, PARENT, ROWS))
    here = run.path / launch
    if launch in there and here.exists():
        copied = _read(folder, launch)
        return bool(copied) and copied.get("begun") != read_typed(dict[str, Any], here).get("begun")
    if launch in there or here.exists():
        return launch in there or parent in there
    # The rows of the newest attempt begin with all the history before it.
    is_newest = rows == max(n for n in (*there, rows) if n.endswith(f"/{ROWS}"))
    is_on_both = rows in there and (run.path / rows).exists()
    return is_newest and is_on_both and not _begin_alike(run, folder, rows)


def _begin_alike(run: Run, folder: Folder, name: str) -> bool:
    with open(run.path / name, "rb") as local:
        for piece in folder.get(name):
            here = local.read(len(piece))
            if here != piece[: len(here)]:
                return False
            if len(here) < len(piece):
                break
    return True


def _read(folder: Folder, name: str) -> dict[str, Any]:
    """Return a JSON object of the folder; {} for anything else."""
    try:
        value = json.loads(b"".join(folder.get(name)))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
