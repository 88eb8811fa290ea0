"""A trained run scored on a dataset, without an engine: fp32, on one device.

Invariant: only a dataset of the run's own tokenizer is scored, since the ids of another one mean
other text.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from trainer.data.progress import Progress, silent
from trainer.data.shards import Dataset
from trainer.door import RunView
from trainer.durable import hash_file
from trainer.errors import UserError
from trainer.evaluate import Score, evaluate


def dataset_of(view: RunView, path: str | None) -> Dataset:
    """The dataset at `path`, or the one that the run was trained on.

    Raises UserError where it isn't there, or has another tokenizer than the run.
    """
    stored = view.identity["dataset"]["path"]
    if path is None and not Path(stored).exists():
        what = f"the dataset that the run was trained on is not at {stored}"
        raise UserError(str(view.path), what, "say where it is: data.path=DIR")
    dataset = Dataset(Path(path or stored).expanduser())
    if not view.run.tokenizer.is_file():
        raise UserError(str(view.run.tokenizer), "no such file", "restore the run's tokenizer")
    if hash_file(view.run.tokenizer).sha256 != dataset.manifest["tokenizer"]["sha256"]:
        todo = f"build it with `forescale shards ... tokenizer={view.run.tokenizer}`"
        raise UserError(str(dataset.path), "has another tokenizer than the run", todo)
    return dataset


def score(
    model: nn.Module,
    dataset: Dataset,
    split: str,
    *,
    sequence_length: int,
    micro_batch: int,
    windows: int | None = None,
    progress: Progress = silent,
) -> Score:
    """`evaluate` for a model in hand. Raises UserError for a split without a target."""
    part, done = dataset.split(split), 0
    count = sum(-(-(tokens - 1) // sequence_length) for tokens in part.shard_tokens)
    if not count:
        raise UserError(str(dataset.path), f"its split {split} is empty", "choose another split")
    total = min(count, windows or count)
    device = next(model.parameters()).device

    @torch.no_grad()
    def losses(tokens: Tensor, targets: Tensor) -> Tensor:
        nonlocal done
        found = model(tokens.to(device), targets.to(device))
        done = min(total, done + len(tokens))
        progress(f"score {split}", done, total, "windows")
        return found[0] if isinstance(found, tuple) else found  # the other is a penalty

    return evaluate(
        losses,
        part,
        dataset.token_bytes,
        sequence_length=sequence_length,
        micro_batch=micro_batch,
        windows=windows,
    )
