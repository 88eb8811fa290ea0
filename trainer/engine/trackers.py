"""Weights & Biases and TensorBoard, through Accelerate's trackers.

Invariant: a run is one curve there, over all its attempts; no tracker waits for an answer on the
terminal, and none needs an account.
"""

import hashlib
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from forescale.errors import UserError


def open_trackers(logging: Any, run: Path, name: str, config: dict, first_step: int) -> list[Any]:
    """Return the trackers that `logging` (LoggingConfig) enables; each has `log(values, step=...)`.

    first_step: the step that the attempt begins at. Raises UserError if a tracker's package is
    missing.
    """
    trackers: list[Any] = []
    if logging.tensorboard:
        trackers.append(_tensorboard(run, first_step))
    if logging.wandb.enabled:
        trackers.append(_wandb(logging.wandb, run, name))
    for tracker in trackers:
        if hasattr(tracker, "start"):
            tracker.start()
        if logging.wandb.enabled and tracker.name == "wandb":
            tracker.store_init_configuration(config)
    return trackers


def _tensorboard(run: Path, first_step: int) -> Any:
    from accelerate.tracking import TensorBoardTracker
    from accelerate.utils import is_tensorboard_available

    if not is_tensorboard_available():
        todo = 'pip install "forescale[tensorboard]", or set logging.tensorboard=false'
        raise UserError("logging.tensorboard", "tensorboard is not installed", todo)
    # Values that an earlier attempt wrote beyond this attempt's first step are not drawn.
    return TensorBoardTracker("tensorboard", logging_dir=run, purge_step=first_step + 1)


def _wandb(settings: Any, run: Path, name: str) -> Any:
    from accelerate.tracking import WandBTracker

    mode = settings.mode
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if has_account() else "offline")
    elif mode == "online" and not has_account():
        todo = "run `wandb login`, or set logging.wandb.mode=offline"
        raise UserError(
            "logging.wandb.mode=online", "no wandb account is logged in on this machine", todo
        )
    identity = hashlib.sha256(f"{settings.project}/{name}".encode()).hexdigest()[:16]
    return WandBTracker(
        settings.project,
        entity=settings.entity,
        id=identity,
        name=name,
        resume="allow",
        mode=mode,
        dir=str(run),
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
