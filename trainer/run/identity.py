"""run.json: what a run is. Its name, its data, the versions and the commit of its code, its id at
wandb; and, once ranks have begun, its number of parameters and its device.

Invariant: a field is written once and never changes. What only a rank knows is absent until the
first rank 0 adds it; what an older version did not write is added by the next attempt.
"""

import secrets
import shutil
import subprocess
from pathlib import Path
from typing import Any

from forescale.data.dataset import Sources
from forescale.ground.errors import UserError
from forescale.ground.storage import write_checked_json
from forescale.run.directory import Run

CHECKOUT = Path(__file__).resolve().parents[2]  # of an editable install


def code_and_id() -> dict[str, Any]:
    """Return the fields that any process of a run can know: git and wandb_id. git: the commit of
    forescale's checkout and whether files differ from it, and the commit of the working directory,
    where the user's own code is; absent where there is no repository. wandb_id: random, so that
    runs of one name in two places are two curves."""
    here = _git(Path.cwd(), "rev-parse", "HEAD")
    git = {**version_of_checkout(), **({"directory": here} if here else {})}
    return {"git": git, "wandb_id": secrets.token_hex(8)}


def expect_data(run: Run) -> None:
    """Raise UserError if a run was trained on no data that is known here, as one with imported
    weights."""
    if not run.read_identity()["dataset"]["sources"]:
        problem = "holds imported weights, and was trained on no data that is known here"
        raise UserError(str(run.path), problem, "give data.path=DIR")


def data_fields(sources: Sources) -> dict[str, Any]:
    """Return the description of a run's data: `identity` is the hash of the datasets."""
    return {
        "path": sources.where,
        "identity": sources.identity,
        "corpus_hash": sources.corpus_hash,
        "vocab_size": sources.vocab_size,
        "end_of_text": sources.end_of_text,
        "sources": sources.describe(),
    }


def complete(run: Run, parameters: int, device: str) -> dict[str, Any]:
    """Return run.json, to which the fields that it lacked are added. Only for rank 0. parameters:
    their number in the model; device: the name of the rank's GPU, or "cpu"."""
    stored: dict[str, Any] = {**run.read_identity()}
    known = {"parameters": parameters, "device": device}
    if lacks := {k: v for k, v in {**code_and_id(), **known}.items() if k not in stored}:
        stored |= lacks
        write_checked_json(run.identity, stored)
    return stored


def version_of_checkout() -> dict[str, str]:
    """Return the commit of the code's checkout, and whether files differ from it; empty where there
    is no checkout."""
    if not (CHECKOUT / ".git").exists() or (commit := _git(CHECKOUT, "rev-parse", "HEAD")) is None:
        return {}
    return {"commit": commit, "changed": "yes" if _git(CHECKOUT, "status", "--porcelain") else "no"}


def _git(directory: Path, *words: str) -> str | None:
    """Return the output of a git command; None if it fails."""
    if shutil.which("git") is None:
        return None
    # A repository can name a program that git runs to see what changed.
    command = ["git", "-c", "core.fsmonitor=false", "-C", str(directory), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
