"""How much a job reads of its data, counted before it starts.

Invariant: no file stays: tables of pairs that are not in the cache are made in a temporary folder.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from forescale.config.train import TrainJob
from forescale.data.bins import num_windows
from forescale.data.dataset import Sources, Split
from forescale.data.objective import window_length
from forescale.run.abilities import Questions, prompts_of_job, questions_of_job
from forescale.run.feed import (
    epochs,
    feed_of,
    notes,
    objective_of,
    packs_documents,
    row_kind,
    row_tokens,
    whole_rows_of,
)

Check = Callable[[Callable[[], Any]], Any]
_SCANNED = 1 << 30  # tokens whose pairs are found in seconds


@dataclass(frozen=True)
class SourceUse:
    """A data source. tokens: that it has; read: tokens that the run reads, those of an epoch times
    the epochs. An epoch of pairs has only their tokens, without the documents that are left out."""

    name: str
    tokens: int
    read: float
    epochs: float


@dataclass(frozen=True)
class DataUse:
    """What a run reads.

    held_out: windows of the held-out split of each source, None if its pairs are not counted yet;
    notes: sentences for the user; compared: windows that the reference of preferences reads before
    the first step, of each source's training split and then of each held-out split, None without
    preferences or if they are not counted yet; questions: of an evaluation of abilities, None if
    they can't be made.
    """

    sources: list[SourceUse]
    held_out: list[int] | None
    notes: list[str]
    compared: list[int] | None = None
    questions: list[Questions] | None = None


def data_use(job: TrainJob, sources: Sources, check: Check) -> DataUse:
    """Return what a settled job reads; an estimate from sizes where counting takes long. check:
    returns what a function returns; None if it raises UserError, which it records."""

    def count_held_out() -> list[int]:
        rows = whole_rows_of(job, sources, "validation", where)
        objective = objective_of(job, sources.vocab_size, held_out=True)
        length = window_length(objective, job.train.sequence_length)
        splits = sources.split("validation").items()
        return [num_windows(split, length, rows.get(name)) for name, split in splits]

    with TemporaryDirectory() as scratch:
        where = check(lambda: _tables(job, sources, Path(scratch)))
        feed, held_out, sentences = None, None, []
        if where is not None:
            if not packs_documents(job):
                feed = check(lambda: feed_of(job, sources, cache=where))
            if packs_documents(job) or feed is not None:
                held_out = check(count_held_out)
        elif check(lambda: row_kind(job, sources, True)) is not None:
            sentences.append(
                "The rows of the data are not counted yet, so its epochs and the tokens read are "
                "estimates, as if no document were left out and no column were padding, and "
                "evaluations are not counted; `forescale train` counts them."
            )
        if feed is not None:
            sentences += notes(job, feed)
            times = epochs(job, feed)
        else:
            splits, total = sources.split("train"), job.total_tokens  # an estimate
            weights = job.data.weights or {n: s.num_tokens for n, s in splits.items()}
            whole = sum(weights.values()) or 1
            times = {
                n: total * weights.get(n, 0) / whole / max(1, s.num_tokens)
                for n, s in splits.items()
            }
    each = row_tokens(feed) if feed is not None else {}
    of = [
        SourceUse(name, size, times[name] * each.get(name, size), times[name])
        for name, size in ((n, s.num_tokens) for n, s in sources.split("train").items())
    ]
    compared = None
    if job.objective.are_preferences and feed is not None and held_out is not None:
        compared = [*(int(bins.counts.sum()) for bins in feed.bins or ()), *held_out]
    questions = check(lambda: questions_of_job(job, sources))
    check(lambda: prompts_of_job(job, sources))
    return DataUse(of, held_out, sentences, compared, questions)


def _tables(job: TrainJob, sources: Sources, scratch: Path) -> Path | None:
    """Return the folder of the tables of pairs: the cache if they are there or none are needed,
    `scratch` if they can be made in seconds, else None."""
    cache, parts = job.data.cache_directory, list[tuple[Split, bool]]()
    for split in ("train", "validation"):
        if kind := row_kind(job, sources, in_training=split == "train"):
            for name, part in sources.split(split).items():
                path = kind.path(part, sources.datasets[name].identity, cache)
                parts.append((part, path.exists()))
    if all(exists for _, exists in parts):
        return cache
    is_long = sum(part.num_tokens for part, _ in parts) > _SCANNED
    return None if is_long or any(part.is_remote for part, _ in parts) else scratch
