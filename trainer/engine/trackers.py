"""Weights & Biases and TensorBoard, through Accelerate's trackers.

Invariant: a run is one curve there, over all its attempts, whatever other runs are called; no
tracker waits for an answer on the terminal, and none needs an account.
"""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from forescale.errors import UserError


def open_trackers(
    logging: Any, run: Path, identity: Mapping[str, Any], config: dict, first_step: int
) -> list[Any]:
    """Return the trackers that `logging` (LoggingConfig) enables; each has `log(values, step=...)`.

    run: its directory; identity: the content of its run.json; first_step: the step that the attempt
    begins at. Raises UserError if a tracker's package is missing.
    """
    check_trackers(logging)
    trackers: list[Any] = []
    if logging.tensorboard:
        trackers.append(_tensorboard(run, first_step))
    if logging.wandb.enabled:
        trackers.append(_wandb(logging.wandb, run, identity))
    for tracker in trackers:
        if hasattr(tracker, "start"):
            tracker.start()
        if logging.wandb.enabled and tracker.name == "wandb":
            tracker.store_init_configuration({**config, **_facts(identity)})
    return trackers


def check_trackers(logging: Any) -> None:
    """Raise UserError if a tracker that `logging` enables has no package, or no account. Imports
    neither."""
    if logging.tensorboard and not any(map(_is_installed, ("tensorboard", "tensorboardX"))):
        todo = 'pip install "forescale[tensorboard]", or set logging.tensorboard=false'
        raise UserError("logging.tensorboard", "tensorboard is not installed", todo)
    if logging.wandb.enabled:
        if not _is_installed("wandb"):
            todo = "pip install wandb, or set logging.wandb.enabled=false"
            raise UserError("logging.wandb.enabled", "wandb is not installed", todo)
        if logging.wandb.mode == "online" and not has_account():
            todo = "run `wandb login`, or set logging.wandb.mode=offline"
            problem = "no wandb account is logged in on this machine"
            raise UserError("logging.wandb.mode=online", problem, todo)


def _is_installed(package: str) -> bool:
    """True if a package can be imported. A directory of this name without code is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def _facts(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return what wandb's table of runs is sorted and filtered by."""
    return {
        "parameters": identity.get("parameters"),
        "dataset_hash": identity.get("dataset", {}).get("identity"),
        "git_commit": identity.get("git", {}).get("commit"),
        "gpu": identity.get("device"),
        "versions": identity.get("versions"),
    }


def _tensorboard(run: Path, first_step: int) -> Any:
    from accelerate.tracking import TensorBoardTracker

    # Values that an earlier attempt wrote beyond this attempt's first step are not drawn.
    return TensorBoardTracker("tensorboard", logging_dir=run, purge_step=first_step + 1)


def _wandb(settings: Any, run: Path, identity: Mapping[str, Any]) -> Any:
    from accelerate.tracking import WandBTracker
    from wandb import Settings

    mode = settings.mode
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if has_account() else "offline")
    return WandBTracker(
        settings.project,
        entity=settings.entity,
        id=identity["wandb_id"],
        name=run.name,
        group=settings.group,
        tags=settings.tags or None,
        resume="allow",
        mode=mode,
        dir=str(run),
        # Left alone, wandb reads the address of the git remote, in which a token may stand.
        settings=Settings(disable_git=True),
    )


def has_account() -> bool:
    """True if a wandb account is logged in, by the environment or ~/.netrc."""
    import netrc

    if "WANDB_API_KEY" in os.environ:
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
