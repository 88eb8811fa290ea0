"""Score a trained run on a dataset, without an engine: fp32, on one device.

Invariant: the dataset must have the run's tokenizer, because the same ids mean other text in
another tokenizer.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from forescale.config.sections.data import ONLY, CorpusConfig
from forescale.config.sections.objective import PreferencesConfig
from forescale.config.train import TrainJob
from forescale.console import Progress, silent
from forescale.data.bins import Bins, num_windows
from forescale.data.dataset import Dataset, Sources
from forescale.data.objective import NEXT_TOKEN, Objective, window_length
from forescale.data.stream import MicroBatch, validation_windows
from forescale.errors import UserError
from forescale.inference.view import RunView
from forescale.run.feed import objective_of, whole_rows_of
from forescale.run.identity import expect_data
from forescale.run.references import read_references
from forescale.run.start import open_dataset
from forescale.storage import hash_file
from forescale.train.evaluate import Score, evaluate
from forescale.train.preferences import PreferenceScore, evaluate_preferences


def datasets_of(view: RunView, data: CorpusConfig) -> dict[str, Dataset]:
    """Return the dataset at `data.path`, or those that the run was trained on, by name.

    Raises UserError if a dataset is missing or has another tokenizer than the run.
    """
    if data.path is not None:
        return {ONLY: _checked(view, open_dataset(data.path, data))}
    expect_data(view.run)
    found = {}
    for name, stored in view.identity["dataset"]["sources"].items():
        path = stored["path"]
        if "://" not in path and not Path(path).exists():
            problem = f"the dataset that the run was trained on is not at {path}"
            raise UserError(str(view.path), problem, "give its new place with data.path=DIR")
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
    references: np.ndarray | None = None,
    progress: Progress = silent,
) -> tuple[Score | PreferenceScore, str | None]:
    """Return the score of a job's model on a split, by the job's objective and windows, and the
    documents that are no rows, in words; None: there are none.

    windows: so many, spread over the split; None: all. cache: where tables of rows are kept.
    references: of preferences, see references_of. Raises UserError if the split is empty, or has no
    pair.
    """
    objective = objective_of(job, dataset.vocab_size, held_out=True)
    rows = whole_rows_of(job, Sources({ONLY: dataset}), split, cache).get(ONLY)
    if references is not None:
        assert rows is not None
        part, length = dataset.split(split), window_length(objective, job.train.sequence_length)
        total = _count(dataset, split, length, rows, windows)
        micros = validation_windows(
            part,
            length,
            micro_batch,
            limit=windows,
            objective=objective,
            bins=rows,
            references=references,
        )
        losses = _losses(model, split, total * objective.rows, progress)  # type: ignore[attr-defined]
        assert isinstance(job.objective, PreferencesConfig)
        scored = evaluate_preferences(losses, micros, job.objective.beta)
        return scored, rows.left_out()
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
    total = _count(dataset, split, sequence_length, bins, windows)
    return evaluate(
        _losses(model, split, total, progress),
        dataset.split(split),
        dataset.token_bytes,
        sequence_length=sequence_length,
        micro_batch=micro_batch,
        windows=windows,
        documents=documents,
        objective=objective,
        bins=bins,
    )


def references_of(view: RunView, dataset: Dataset, split: str) -> np.ndarray | None:
    """Return what the reference of a run says of the preferences of a split, (n, 2) nats; None if
    the run learns none. Raises UserError if it isn't known, as of other data."""
    if not view.config.objective.are_preferences:
        return None
    stored = read_references(view.run)
    found = None if stored is None else stored.of(dataset.identity, split)
    if found is None:
        problem = (
            "what the reference says of its preferences is not known, only of the run's own data"
        )
        raise UserError(dataset.where, problem, "leave data.path out")
    return found


def _count(
    dataset: Dataset, split: str, length: int, bins: Bins | None, windows: int | None
) -> int:
    """Return how many windows are scored. Raises UserError if there are none."""
    count = num_windows(dataset.split(split), length, bins)
    if not count:
        problem = f"its split {split} {'is empty' if bins is None else f'has no {bins.unit}'}"
        raise UserError(dataset.where, problem, "choose another split")
    return min(count, windows or count)


def _losses(
    model: nn.Module, split: str, total: int, progress: Progress
) -> Callable[[MicroBatch], Tensor]:
    """Return a function that returns the nats of each row of a micro-batch. total: of all rows."""
    device, done = next(model.parameters()).device, 0

    @torch.no_grad()
    def losses(micro: MicroBatch) -> Tensor:
        nonlocal done
        positional, named = micro.arguments(device)
        found = model(*positional, **named)
        done = min(total, done + len(micro.tokens))
        progress(f"score {split}", done, total, "windows")
        # The second is a penalty of the objective.
        return found[0] if isinstance(found, tuple) else found

    return losses
