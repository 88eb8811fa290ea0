"""Scores of a trained run, without an engine: fp32, on one device. Its loss on a dataset, also by
position and at sequences longer than in training, and its accuracy on small tasks.

Invariant: the dataset must have the run's tokenizer, because the same ids mean other text in
another tokenizer. Weights are those of the checkpoint; only rotary frequencies change, on request.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forescale.config.eval import ScoreJob
from forescale.config.sections.data import ONLY, CorpusConfig
from forescale.config.sections.objective import PreferencesConfig
from forescale.config.train import TrainJob
from forescale.data.bins import Bins, num_windows
from forescale.data.dataset import Dataset, Sources
from forescale.data.objective import IGNORED, NEXT_TOKEN, Objective, window_length
from forescale.data.stream import MicroBatch, validation_windows
from forescale.data.tokenizer import text_ids
from forescale.ground.console import Progress, silent
from forescale.ground.errors import UserError
from forescale.ground.storage import hash_file
from forescale.inference.view import RunView, best_device
from forescale.models.positions.kinds import Ntk, Rotary, Yarn
from forescale.models.positions.position import document_starts, positions_of
from forescale.models.transformer import Transformer
from forescale.run.abilities import Accuracy, questions_of
from forescale.run.feed import objective_of, whole_rows_of
from forescale.run.identity import expect_data
from forescale.run.references import read_references
from forescale.run.start import open_dataset
from forescale.train.abilities import accuracies, judged
from forescale.train.evaluate import Score, evaluate, ratio_stderr
from forescale.train.preferences import PreferenceScore, evaluate_preferences


def datasets_of(view: RunView, data: CorpusConfig) -> dict[str, Dataset]:
    """Return the dataset at `data.path`, or those that the run was trained on, by name.

    Raises UserError if a dataset is missing or has another tokenizer than the run.
    """
    if data.path is not None:
        return {ONLY: _checked(view, open_dataset(data.path, data))}
    expect_data(view.run)
    datasets = {}
    for name, stored in view.identity["dataset"]["sources"].items():
        path = stored["path"]
        if "://" not in path and not Path(path).exists():
            problem = f"the dataset that the run was trained on is not at {path}"
            raise UserError(str(view.path), problem, "give its new place with data.path=DIR")
        datasets[name] = _checked(view, open_dataset(path, data))
    return datasets


def _checked(view: RunView, dataset: Dataset) -> Dataset:
    if not view.run.tokenizer.is_file():
        raise UserError(str(view.run.tokenizer), "no such file", "restore the run's tokenizer.json")
    if hash_file(view.run.tokenizer).sha256 != dataset.manifest["tokenizer"]["sha256"]:
        todo = f"build it with `forescale shards ... tokenizer={view.run.tokenizer}`"
        raise UserError(dataset.where, "was built with another tokenizer than the run's", todo)
    return dataset


def score_of(
    view: RunView,
    config: TrainJob,
    model: nn.Module,
    dataset: Dataset,
    job: ScoreJob,
    progress: Progress = silent,
) -> tuple[Score | PreferenceScore, str | None]:
    """Return the score of a run's model on the split that a job names, by the objective of the run,
    and the documents that are no rows, in words; None: there are none.

    config: of the run, with the length of the windows. Raises UserError if the split is empty, or
    has no pair; of preferences also if the nats of the reference model aren't known.
    """
    part, objective = dataset.split(job.split), objective_of(config, dataset.vocab_size, True)
    length, cache = window_length(objective, config.train.sequence_length), job.data.cache_directory
    references = None
    if config.objective.are_preferences:  # first: making rows may take long
        stored = read_references(view.run)
        references = None if stored is None else stored.of(dataset.identity, job.split)
        if references is None:
            problem = "the losses of the reference are known of the run's own preferences alone"
            raise UserError(dataset.where, problem, "leave data.path out")
    rows = whole_rows_of(config, Sources({ONLY: dataset}), job.split, cache).get(ONLY)
    left_out = rows.left_out() if rows else None
    if not isinstance(config.objective, PreferencesConfig):
        result = score(
            model,
            dataset,
            job.split,
            sequence_length=length,
            micro_batch=job.micro_batch,
            windows=job.windows,
            documents=config.data.document_mask,
            objective=objective,
            bins=rows,
            progress=progress,
        )
        return result, left_out
    total = _count(dataset, job.split, length, rows, job.windows)
    micros = validation_windows(
        part,
        length,
        job.micro_batch,
        limit=job.windows,
        objective=objective,
        bins=rows,
        references=references,
    )
    losses = _losses(model, job.split, total * config.objective.rows, progress)
    return evaluate_preferences(losses, micros, config.objective.beta), left_out


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
        output = model(*positional, **named)
        done = min(total, done + len(micro.tokens))
        progress(f"score {split}", done, total, "windows")
        # The second is a penalty of the objective.
        return output[0] if isinstance(output, tuple) else output

    return losses


@dataclass(frozen=True)
class Bucket:
    """The loss at positions first to last, in nats a target.

    A position is the number of tokens that the model sees besides the last one. loss_stderr:
    standard error, windows taken as independent. An empty bucket has NaN.
    """

    first: int
    last: int
    loss: float
    loss_stderr: float
    targets: int


def at_length(model: nn.Module, length: int, trained: int, scaling: str | None) -> nn.Module:
    """Return the model for sequences of `length` tokens; the same object if nothing changes.

    Args: `trained`, the sequence length of its training; `scaling`, ntk or yarn, of rotary
    positions by length / trained; None: as trained. Raises UserError if the model has no positions
    beyond its table, or can't be scaled.
    """
    if not isinstance(model, Transformer):
        if scaling:
            problem = "only positions of forescale's own model can be scaled"
            raise UserError("rope_scaling", problem, "leave it out")
        return model
    config, longest = model.config, model.sizes.max_sequence_length
    position = config.position
    if position.kind == "learned" and length > longest:
        problem = f"the model has {longest} learned positions, and none beyond"
        raise UserError("sequence_length", problem, f"give at most {longest}")
    if scaling is None:
        return model
    if not isinstance(position, Rotary) or position.scaling.kind != "none":
        trained_with = position.scaling if isinstance(position, Rotary) else position
        problem = f"the model was trained with {trained_with.kind}"
        problem += ", and not with plain rotary positions"
        raise UserError("rope_scaling", problem, "leave it out")
    if length <= trained:
        problem = f"there is nothing to scale: the model was trained at {trained} tokens"
        raise UserError("rope_scaling", problem, f"give sequence_length above {trained}")
    factor = length / trained
    by = Yarn(factor, trained) if scaling == "yarn" else Ntk(factor)
    scaled = replace(config, position=replace(position, scaling=by))
    with torch.device("meta"):
        longer = Transformer(scaled)
    longer.load_state_dict(model.state_dict(), assign=True)
    return longer.train(model.training)


def edges_of(length: int, trained: int) -> list[int]:
    """Return where buckets begin, and `length`: the quarter and half of `trained`, then doubled."""
    edges = [0, trained // 4, trained // 2, trained]
    while edges[-1] < length:
        edges.append(2 * edges[-1])
    return [*sorted({edge for edge in edges if edge < length}), length]


def loss_by_position(
    model: nn.Module,
    dataset: Dataset,
    split: str,
    *,
    sequence_length: int,
    edges: Sequence[int],
    windows: int | None = None,
    documents: bool = False,
    objective: Objective = NEXT_TOKEN,
    progress: Progress = silent,
) -> list[Bucket]:
    """Return the loss in each bucket of positions, over the windows that `score` takes.

    Args: `edges`, increasing: a bucket holds the positions from one edge to before the next;
    `documents`, as trained: then positions count from the document's first token in the window.
    Logits of one window are held at a time, (L, V) fp32.
    """
    part, size = dataset.split(split), len(edges) - 1
    count = num_windows(part, sequence_length)
    total, limits = min(count, windows or count), torch.tensor(edges)
    nats, targets = np.zeros((size, total)), np.zeros((size, total))
    parts = validation_windows(
        part, sequence_length, 1, limit=windows, documents=documents, objective=objective
    )
    for i, window in enumerate(parts):
        nats_L, positions_L = target_losses(model, window)
        bucket_L = torch.bucketize(positions_L, limits[1:-1], right=True)
        sums = torch.zeros(size, dtype=torch.float64).index_add_(0, bucket_L, nats_L)
        nats[:, i] = sums.numpy()
        real_L = window.targets[0] != IGNORED
        targets[:, i] = bucket_L[real_L].bincount(minlength=size).numpy()
        progress("loss by position", i + 1, total, "windows")
    buckets = []
    for first, end, nats_W, targets_W in zip(edges[:-1], edges[1:], nats, targets, strict=True):
        loss = stderr = math.nan
        if number := int(targets_W.sum()):
            used = targets_W > 0
            loss = math.fsum(nats_W) / number
            stderr = ratio_stderr(nats_W[used], targets_W[used], loss)
        buckets.append(Bucket(first, end - 1, loss, stderr, number))
    return buckets


@torch.no_grad()
def target_losses(model: nn.Module, window: MicroBatch) -> tuple[Tensor, Tensor]:
    """Return the nats (fp64, 0 where there is no target) and the position of each target of one
    window, (L,) each, on the CPU."""
    device = next(model.parameters()).device
    (tokens_1L, targets_1L), named = window.arguments(device)
    logits_LV = model(tokens_1L, **named)[0].float()
    nats_L = F.cross_entropy(logits_LV, targets_1L[0], ignore_index=IGNORED, reduction="none")
    starts_1L = None if window.documents is None else document_starts(window.documents)
    length, where = window.tokens.shape[1], window.tokens.device
    positions_L = positions_of(length, where, None, starts_1L).view(-1)
    return nats_L.double().cpu(), positions_L.cpu()


def abilities_of(
    view: RunView, model: nn.Module, job: ScoreJob, progress: Progress = silent
) -> dict[str, list[Accuracy | None]]:
    """Return for each of job.abilities its accuracy at each number of examples (job.shots); None
    where the examples don't fit the run's windows.

    Raises UserError for a model that doesn't continue text.
    """
    config = view.config
    if not config.continues_text:
        problem = f"was trained with objective={config.objective.kind}, and continues no text"
        raise UserError("abilities", problem, "leave it out, or name a run that continues text")
    device = best_device()
    model = model.to(device)

    def judge(tokens_BL: Tensor, targets_BL: Tensor) -> tuple[Tensor, Tensor]:
        return judged(model(tokens_BL.to(device)), targets_BL)

    questions = questions_of(
        lambda text: text_ids(view.tokenizer, text),
        view.identity["dataset"]["end_of_text"],
        job.abilities,
        job.shots,
        job.questions,
    )
    results: dict[str, list[Accuracy | None]] = {name: [] for name in job.abilities}
    total, done = sum(len(each.rows) for each in questions), 0
    for each in questions:
        if each.longest > config.train.sequence_length:
            results[each.task].append(None)
        else:
            results[each.task] += accuracies(judge, [each], rows=job.micro_batch)
        done += len(each.rows)
        progress("abilities", done, total, "questions")
    return results
