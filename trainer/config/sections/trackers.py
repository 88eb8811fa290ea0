"""The trackers that receive the numbers of a run's rows: the keys of each, and how it is opened.

To add a tracker, write its class here and its field in LoggingConfig (runtime.py).

Invariant: a run is one curve there, over all its attempts, whatever other runs are called; no
tracker waits for an answer on the terminal, and none needs an account. A tracker's package is
imported only when it is opened.
"""

import importlib.util
import netrc
import os
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from forescale.config.schema import key
from forescale.ground.errors import UserError

Facts = Mapping[str, Any]


@dataclass
class TrackerConfig:
    """The key of every tracker, and what a tracker can do."""

    enabled: bool = False  # send the numbers of metrics.jsonl there

    def check(self) -> None:
        """Raise UserError if its package or its account is missing; by default it needs none."""

    def open(self, run: Path, identity: Facts, config: Facts, first_step: int) -> Any:
        """Return what has `log(values, step=...)`, `write(texts, step=...)` and `finish()`; rank 0
        alone opens it.

        run: its directory, in which an older attempt may have written; identity: the content of its
        run.json; config: the job as plain values; first_step: the number of steps already made.
        values: numbers by names such as train/loss, validation/loss and, of one dataset of a
        mixture, validation/NAME/loss; texts: what the model writes to validation.prompts, by names
        such as validation/text/0.
        """
        raise NotImplementedError


def _is_installed(package: str) -> bool:
    """True if a package can be imported. A directory of this name without code is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


@dataclass
class TensorboardConfig(TrackerConfig):
    """Files for `tensorboard --logdir runs`, in RUN/tensorboard."""

    def check(self) -> None:
        if not any(map(_is_installed, ("tensorboard", "tensorboardX"))):
            todo = 'pip install "forescale[tensorboard]", or set logging.tensorboard.enabled=false'
            raise UserError("logging.tensorboard", "tensorboard is not installed", todo)

    def open(self, run: Path, identity: Facts, config: Facts, first_step: int) -> Any:
        # Values that an earlier attempt wrote beyond this attempt's first step are not drawn.
        return _Tensorboard(run / "tensorboard", purge_step=first_step + 1)


class _Tensorboard:
    def __init__(self, folder: Path, purge_step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            from tensorboardX import SummaryWriter  # type: ignore[no-redef]
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, global_step=step)
        self._writer.flush()

    def write(self, texts: dict[str, str], step: int) -> None:
        for name, text in texts.items():
            self._writer.add_text(name, indented(text), global_step=step)
        self._writer.flush()

    def finish(self) -> None:
        self._writer.close()


@dataclass
class WandbConfig(TrackerConfig):
    """Weights & Biases."""

    project: str = "forescale"  # the project there
    entity: str | None = None  # the account or team; null: yours
    group: str | None = None  # the group of the run there; null: the study of a cell, else none
    tags: list[str] = key([])  # tags of the run there
    # auto: online if an account is logged in, else offline
    mode: Literal["auto", "online", "offline"] = "auto"

    def check(self) -> None:
        if not _is_installed("wandb"):
            todo = "pip install wandb, or set logging.wandb.enabled=false"
            raise UserError("logging.wandb.enabled", "wandb is not installed", todo)
        if self.mode == "online" and not has_account():
            todo = "run `wandb login`, or set logging.wandb.mode=offline"
            problem = "no wandb account is logged in on this machine"
            raise UserError("logging.wandb.mode=online", problem, todo)

    def open(self, run: Path, identity: Facts, config: Facts, first_step: int) -> Any:
        import wandb

        mode: Any = self.mode
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if has_account() else "offline")
        facts = {  # what wandb's table of runs is sorted and filtered by
            "parameters": identity.get("parameters"),
            "dataset_hash": identity.get("dataset", {}).get("identity"),
            "git_commit": identity.get("git", {}).get("commit"),
            "gpu": identity.get("device"),
            "versions": identity.get("versions"),
        }
        tracker = wandb.init(
            project=self.project,
            entity=self.entity,
            id=identity["wandb_id"],
            name=run.name,
            group=self.group,
            tags=self.tags or None,
            resume="allow",
            mode=mode,
            dir=str(run),
            # Left alone, wandb reads the address of the git remote, in which a token may stand.
            settings=wandb.Settings(disable_git=True),
        )
        tracker.config.update({**config, **facts}, allow_val_change=True)
        return _Wandb(tracker, wandb.Html)


class _Wandb:
    def __init__(self, run: Any, html: Callable[[str], Any]):
        self._run, self._html = run, html

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def write(self, texts: dict[str, str], step: int) -> None:
        pages = {name: self._html(f"<pre>{escape(text)}</pre>") for name, text in texts.items()}
        self._run.log(pages, step=step)

    def finish(self) -> None:
        self._run.finish()


@dataclass
class TrackioConfig(TrackerConfig):
    """trackio, of Hugging Face: a database on this machine, in TRACKIO_DIR, else in ~/.cache; see
    it with `trackio show`. Where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL is set, it goes there.
    Steps that a resume makes again are there twice, with the same values."""

    project: str = "forescale"  # the project there
    group: str | None = None  # the group of the run there

    def check(self) -> None:
        if not _is_installed("trackio"):
            todo = 'pip install "forescale[trackio]", or set logging.trackio.enabled=false'
            raise UserError("logging.trackio", "trackio is not installed", todo)

    def open(self, run: Path, identity: Facts, config: Facts, first_step: int) -> Any:
        import trackio

        with redirect_stdout(StringIO()):  # it prints where it writes, in the middle of our lines
            tracker = trackio.init(
                self.project,
                # Its runs are known by their names alone, which another directory's may have, too.
                name=f"{run.name}-{identity['wandb_id'][:6]}",
                group=self.group,
                config={**config},
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        return _Trackio(tracker)


class _Trackio:
    def __init__(self, run: Any):
        self.log, self._run = run.log, run

    def write(self, texts: dict[str, str], step: int) -> None:
        from trackio import Markdown

        self.log({name: Markdown(indented(text)) for name, text in texts.items()}, step=step)

    def finish(self) -> None:
        with redirect_stdout(StringIO()):
            self._run.finish()


def indented(text: str) -> str:
    """Return a text as Markdown that shows it as it is."""
    return "\n".join(f"    {line}" for line in text.split("\n"))


def has_account() -> bool:
    """True if a wandb account is logged in, by the environment or ~/.netrc."""
    if "WANDB_API_KEY" in os.environ:
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
