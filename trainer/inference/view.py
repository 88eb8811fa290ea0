"""A trained run as Python sees it: its rows as DataFrames, its checkpoints, its model.

Invariant: looking never changes a run, needs no engine, and runs no code that a run's files name
unless it is told to trust them.
"""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from forescale.checkpoint.reader import STATE, Checkpoint, at_step, whole
from forescale.config.frozen import thaw
from forescale.config.train import TrainJob
from forescale.errors import UserError
from forescale.run.directory import Run, read_rows
from forescale.storage import read_json

if TYPE_CHECKING:
    import pandas as pd
    from tokenizers import Tokenizer
    from torch import nn


class RunView:
    """A run directory, read. `path` and `name` say which; `chosen` is the checkpoint that `model`
    takes unless told otherwise, None for the newest."""

    def __init__(self, run: Run, chosen: Path | None = None):
        self.run, self.path, self.name, self.chosen = run, run.path, run.name, chosen

    def __repr__(self) -> str:
        return f"RunView({str(self.path)!r})"

    @cached_property
    def config(self) -> TrainJob:
        """The frozen job. A model class that it names is named, not imported."""
        return thaw(TrainJob, self.run.config, trust=True)

    @cached_property
    def identity(self) -> dict:
        """What run.json holds: the dataset (path, hashes, vocab_size, end_of_text) and versions."""
        return read_json(self.run.identity)

    @cached_property
    def tokenizer(self) -> "Tokenizer":
        from forescale.data.tokenizer import load_tokenizer

        return load_tokenizer(self.run.tokenizer)

    def metrics(self, kind: str | None = "train") -> "pd.DataFrame":
        """The rows of one kind (train: one a step; validation), oldest first; None: all. Fields of
        sections are columns such as `seconds.compute`."""
        rows = read_rows(self.run.metrics)
        return _frame([row for row in rows if kind in (None, row["kind"])])

    def events(self) -> "pd.DataFrame":
        """What happened beside training, in all attempts, in the order of time (UTC)."""
        import pandas as pd

        rows = [row for a in self.run.attempts() for row in read_rows(a.events.path)]
        frame = _frame(sorted(rows, key=lambda row: row["time"]))
        if len(frame):
            frame["time"] = pd.to_datetime(frame["time"], unit="s", utc=True)
        return frame

    def checkpoints(self) -> list[Checkpoint]:
        """All that are published, oldest first, eligible or not."""
        return [Checkpoint(self.run.checkpoint_path(s)) for s in self.run.checkpoint_steps()]

    def checkpoint(self, step: int | None = None) -> Checkpoint:
        """The one at `step`, or the chosen or newest whole one, verified to the last byte.

        Raises UserError where there is none.
        """
        if self.chosen is None:
            return at_step(self.run, step)
        found = whole(self.chosen)
        if step not in (None, found.position.step):
            what = f"is of step {found.position.step}, not {step}"
            raise UserError(str(self.chosen), what, "leave step out, or name the run")
        return found

    def model(self, step: int | None = None, trust: bool = False) -> "nn.Module":
        """The model with the fp32 weights of a checkpoint, in eval mode, on the CPU.

        step: of the checkpoint, None: the newest. trust: import and run the class that the run's
        config names, where the model is one of the user's own. Raises UserError where there is no
        such checkpoint, or it isn't whole.
        """
        return self.load(self.checkpoint(step), trust)

    def load(self, checkpoint: Checkpoint, trust: bool = False) -> "nn.Module":
        """As `model`, of a checkpoint in hand."""
        from forescale.train.model import build_model

        job = thaw(TrainJob, self.run.config, trust)
        model = build_model(job, self.identity["dataset"]["vocab_size"])
        set_weights(model, checkpoint)
        return model.eval()


def open_view(target: str | Path, root: str | Path = "runs") -> RunView:
    """A run by its path or its name under `root`, or the run that a checkpoint's directory is in.

    Raises UserError where there is none.
    """
    path = Path(target).expanduser()
    if not (path / STATE).is_file():
        return RunView(Run.existing(path, Path(root).expanduser()))
    run = Run(path.resolve().parent.parent)
    if not run.config.is_file():
        what = "this checkpoint lies outside of its run, so its config is not known"
        raise UserError(str(target), what, "put it back under RUN/checkpoints")
    return RunView(run, path)


def set_weights(model: "nn.Module", checkpoint: Checkpoint) -> None:
    """Read a checkpoint's weights into a model's own memory, one tensor at a time.

    Raises UserError where it is of another model.
    """
    import torch

    kept = model.state_dict(keep_vars=True)
    own: dict[str, torch.Tensor] = dict(model.named_parameters())  # each once, tied or not
    own |= {name: b for name, b in model.named_buffers() if name in kept}
    for name in sorted(own.keys() | checkpoint.shapes.keys()):
        ours = list(own[name].shape) if name in own else None
        if ours != (stored := checkpoint.shapes.get(name)):
            what = f"parameter {name} is {stored} there and {ours} in this model"
            raise UserError(str(checkpoint.path), what, "use the model of the run that saved it")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(checkpoint.tensor(name))


def _frame(rows: list[dict]) -> "pd.DataFrame":
    import pandas as pd

    return pd.json_normalize(rows)
