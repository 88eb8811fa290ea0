"""Score a trained run on a dataset, without an engine: fp32, on one device.

Invariant: the dataset must have the run's tokenizer, because the same ids mean other text in
another tokenizer.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from forescale.config.sections.data import ONLY, CorpusConfig
from forescale.config.train import TrainJob
from forescale.data.dataset import Dataset, Sources
from forescale.data.objective import NEXT_TOKEN, Objective, window_length
from forescale.data.packing_table import Bins, num_windows
from forescale.data.stream import MicroBatch
from forescale.errors import UserError
from forescale.inference.view import RunView
from forescale.progress import Progress, silent
from forescale.run.feed import objective_of, whole_rows_of
from forescale.run.start import open_dataset
from forescale.storage import hash_file
from forescale.train.evaluate import Score, evaluate


def datasets_of(view: RunView, data: CorpusConfig) -> dict[str, Dataset]:
    """Return the dataset at `data.path`, or those that the run was trained on, by name.

    Raises UserError if a dataset is missing or has another tokenizer than the run.
    """
    if data.path is not None:
        return {ONLY: _checked(view, open_dataset(data.path, data))}
    found, sources = {}, view.identity["dataset"]["sources"]
    if not sources:
        what = "holds imported weights, and was trained on no data that is known here"
        raise UserError(str(view.path), what, "give data.path=DIR")
    for name, stored in sources.items():
        path = stored["path"]
        if "://" not in path and not Path(path).exists():
            what = f"the dataset that the run was trained on is not at {path}"
            raise UserError(str(view.path), what, "give its new place with data.path=DIR")
        found[name] = _checked(view, open_dataset(path, data))
    return found


def _checked(view: RunView, dataset: Dataset) -> Dataset:
    if not view.run.tokenizer.is_file():
        raise UserError(str(view.run.tokenizer), "no such file", "restore the run's tokenizer.json")
    if hash_file(view.run.tokenizer).sha256 != dataset.manifest["tokenizer"]["sha256"]:
        todo = f"build it with `forescale shards ... tokenizer={view.run.tokenizer}`"
        raise UserError(dataset.where, "was built with another tokenizer than the run's", todo)
    return dataset


def score_of(
    job: TrainJob,
    model: nn.Module,
    dataset: Dataset,
    split: str,
    *,
    micro_batch: int,
    windows: int | None = None,
    cache: Path | None = None,
    progress: Progress = silent,
) -> tuple[Score, str | None]:
    """Return the score of a job's model on a split, by the job's objective and windows, and the
    documents that are no rows, in words; None: there are none.

    windows: so many, spread over the split; None: all. cache: where tables of rows are kept.
    Raises UserError if the split is empty, or has no pair.
    """
    objective = objective_of(job, dataset.vocab_size, held_out=True)
    rows = whole_rows_of(job, Sources({ONLY: dataset}), split, cache).get(ONLY)
    found = score(
        model,
        dataset,
        split,
        sequence_length=window_length(objective, job.train.sequence_length),
        micro_batch=micro_batch,
        windows=windows,
        documents=job.data.document_mask,
        objective=objective,
        bins=rows,
        progress=progress,
    )
    return found, rows.left_out() if rows else None


def score(
    model: nn.Module,
    dataset: Dataset,
    split: str,
    *,
    sequence_length: int,
    micro_batch: int,
    windows: int | None = None,
    documents: bool = False,
    objective: Objective = NEXT_TOKEN,
    bins: Bins | None = None,
    progress: Progress = silent,
) -> Score:
    """Return the score of a model on a split. bins: the split's pairs or conversations. Raises
    UserError if the split is empty, or has no such row."""
    part, done = dataset.split(split), 0
    count = num_windows(part, sequence_length, bins)
    if not count:
        what = f"its split {split} {'is empty' if bins is None else f'has no {bins.unit}'}"
        raise UserError(dataset.where, what, "choose another split")
    total = min(count, windows or count)
    device = next(model.parameters()).device

    @torch.no_grad()
    def losses(micro: MicroBatch) -> Tensor:
        nonlocal done
        positional, named = micro.arguments(device)
        found = model(*positional, **named)
        done = min(total, done + len(micro.tokens))
        progress(f"score {split}", done, total, "windows")
        return (
            found[0] if isinstance(found, tuple) else found
        )  # the second is a penalty of the objective

    return evaluate(
        losses,
        part,
        dataset.token_bytes,
        sequence_length=sequence_length,
        micro_batch=micro_batch,
        windows=windows,
        documents=documents,
        objective=objective,
        bins=bins,
    )
