"""Builds the sequence of windows on which a job trains, from its config and opened data.

Invariant: only `feed_of` turns a config into a data order, so a run, its audit and its benchmarks
read the same windows.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from forescale.config.sections.objective import PairsConfig
from forescale.config.target import is_any_class, make
from forescale.config.train import TrainJob
from forescale.data.bin_kinds import (
    BinKind,
    ConversationKind,
    PackedConversationKind,
    PackedKind,
    PairKind,
    PreferenceKind,
)
from forescale.data.bins import Bins
from forescale.data.dataset import Sources
from forescale.data.feed import Feed
from forescale.data.mixture import Interval, MemberMixture, Mixture, MixtureStage
from forescale.data.objective import NEXT_TOKEN, Objective, extra_ids, window_length
from forescale.data.objectives.pairs import Pairs, separator_id, shown_separator
from forescale.data.objectives.responses import Preferences, Responses
from forescale.data.order import Order
from forescale.ground.console import progress_display
from forescale.ground.errors import UserError
from forescale.models.config import ModelConfig
from forescale.models.fp8 import rows_refused, sizes_refused

_MANY_EPOCHS = 4  # up to here repeated data is nearly as good as new (Muennighoff et al. 2023)


def feed_of(
    job: TrainJob,
    sources: Sources,
    skipped: Sequence[Interval] = (),
    cache: Path | None = None,
    references: Mapping[str, np.ndarray] | None = None,
) -> Feed:
    """Return the training feed of a settled job. cache: the folder of tables of pairs, if not the
    job's; references: see Feed. Raises UserError if a source has no window, or the run would read
    it more often than data.max_epochs allows."""
    if packs_documents(job):  # tables that are missing from the cache are made
        kind, folder = PackedKind(job.train.sequence_length), job.data.cache_directory
        bins = {
            name: Bins.open(kind, split, sources.datasets[name].identity, folder)
            for name, split in sources.split("train").items()
        }
    else:
        bins = whole_rows_of(job, sources, "train", cache, in_training=True)
    objective = objective_of(job, sources.vocab_size)
    length = window_length(objective, job.train.sequence_length)
    mixture = _mixture(job, sources, bins, length)
    times = mixture.epochs(job.total_windows)
    for name, limit in job.data.max_epochs.items():
        if times[name] > limit:
            problem = f"the run reads {name} {times[name]:.2f} times; the limit is {limit:g}"
            todo = "train shorter, lower its weight, or raise the limit"
            raise UserError(f"data.max_epochs.{name}", problem, todo)
    return Feed(
        sources.split("train"),
        mixture,
        sources.vocab_size,
        skipped=skipped,
        substitute=job.data.damaged == "substitute",
        documents=job.data.document_mask,
        bins=bins,
        objective=objective,
        references=references,
        seed=job.train.seed,
    )


def packs_documents(job: TrainJob) -> bool:
    """Return True if windows of next tokens are packed; examples may be, too, as whole rows."""
    return job.data.packing == "best_fit" and job.objective.is_next_token


def objective_of(job: TrainJob, vocab_size: int, held_out: bool = False) -> Objective:
    """Return a new objective of a job. held_out: for held-out text: its random choices are the same
    in all runs, so that losses compare models and not masks. Raises UserError if a class of the
    user's own can't be made, or hides no padding from a model that would see it."""
    if job.objective.is_next_token:
        return NEXT_TOKEN
    length, seed = job.train.sequence_length, 0 if held_out else job.train.seed
    offered = {"seed": seed, "vocab_size": vocab_size, "sequence_length": length}
    objective = make("objective", job.objective.made_with, **offered)
    if not (getattr(job.model, "causal", True) or hasattr(objective, "padding_mask")):
        problem = "its class does not hide padding, which a model with model.causal=false would see"
        raise UserError("objective._target_", problem, "give the class a method padding_mask")
    return objective


def reads_source(model: Any) -> bool:
    """Return True if the model of a job has an encoder, which reads the source of a row, beside its
    decoder; of a class of the user's own nobody knows."""
    if is_any_class(model):
        from forescale.models.hf.loading import has_encoder  # its room imports torch, and plan none

        return has_encoder(model.arguments["config"])
    return isinstance(model, ModelConfig) and model.has_encoder


def vocabulary_of(job: TrainJob, vocab_size: int) -> int:
    """Return the number of ids that a job's model needs: the tokenizer's vocab_size, and those that
    the objective adds."""
    return vocab_size + extra_ids(objective_of(job, vocab_size))


def resolved_model(job: TrainJob, vocab_size: int) -> ModelConfig:
    """Return the config of a job's model, completed from the tokenizer's vocab_size and the
    objective. Raises UserError if it doesn't fit them."""
    model, length = job.model, job.train.sequence_length
    assert isinstance(model, ModelConfig)
    if model.has_encoder:
        split = getattr(objective_of(job, vocab_size), "split", None)
        problem = f"the source of objective {job.objective.kind} has {split or 'no fixed'} columns"
        if split is None:
            todo = "write objective=seq2seq, prefix or pairs, or give your class a split"
            raise UserError("model.encoder_layers", problem, todo)
        if (model.source_length or split) != split:
            problem = f"{model.source_length} is given, and {problem}"
            raise UserError("model.source_length", problem, "leave it out, it follows from those")
        model = replace(model, source_length=split)
    vocabulary = vocabulary_of(job, vocab_size)
    for name, problem, todo in model.problems(vocabulary, length):
        raise UserError(f"model.{name}", problem, todo)
    model = model.resolved(vocabulary, length)
    if job.precision.fp8 != "none":
        refused = sizes_refused(model, job.engine.tensor_parallel)
        refused += rows_refused(model, job.rows_at_once, length, job.mesh(1).columns)
        for problem, todo in refused:
            raise UserError(f"precision.fp8={job.precision.fp8}", problem, todo)
    return model


def epochs(job: TrainJob, feed: Feed) -> dict[str, float]:
    """Return how often the whole run reads each source, without skipped samples."""
    return feed.mixture.epochs(job.total_windows)


def targets_of_a_window(job: TrainJob, feed: Feed) -> float:
    """Return the mean number of targets of the run's windows."""
    windows = job.total_windows
    if feed.are_whole:
        return int(feed.mixture.targets(0, windows).sum()) / windows
    full = np.array([feed.mixture.sequence_length + 1])
    return int(feed.objective.num_targets(full)[0])


def notes(job: TrainJob, feed: Feed) -> list[str]:
    """Return sentences for the user about data that is unusual but not wrong."""
    many = len(feed.names) > 1
    return [
        f"{name if many else 'The data'} is read {times:.1f} times; more than "
        f"{_MANY_EPOCHS} times teaches little that is new."
        for name, times in epochs(job, feed).items()
        if times > _MANY_EPOCHS
    ] + [f"{f'{name}: ' * many}{sentence}." for name, sentence in left_out(feed).items()]


def left_out(feed: Feed) -> dict[str, str]:
    """Return a sentence about the documents of each source that are in no row; none for sources
    without any."""
    if feed.bins is None:
        return {}
    sentences = {name: bins.left_out() for name, bins in zip(feed.names, feed.bins, strict=True)}
    return {name: sentence for name, sentence in sentences.items() if sentence}


def row_tokens(feed: Feed) -> dict[str, int]:
    """Return the tokens of each source's whole rows; nothing for a job that reads windows."""
    if not feed.are_whole or feed.bins is None:
        return {}
    return {n: bins.facts["row_tokens"] for n, bins in zip(feed.names, feed.bins, strict=True)}


def whole_rows_of(
    job: TrainJob,
    sources: Sources,
    split: str,
    cache: Path | None = None,
    in_training: bool = False,
) -> dict[str, Bins]:
    """Return the whole rows of a split of each source, such as pairs; none if the job reads
    windows. in_training: see row_kind. Tables that are missing from the cache are made. Raises
    UserError if there is nothing to train on."""
    if (kind := row_kind(job, sources, in_training)) is None:
        return {}
    cache, tables = cache or job.data.cache_directory, dict[str, Bins]()
    of_objective = {"responses": "examples", "preferences": "preferences"}.get(job.objective.kind)
    for name, part in sources.split(split).items():
        dataset = sources.datasets[name]
        of_data = (dataset.manifest.get("build") or {}).get("source", {}).get("kind")
        # `finetune` may have built it for another objective.
        if of_objective and of_data in {"examples", "preferences"} - {of_objective}:
            problem = f"holds {of_data}, which objective={job.objective.kind} doesn't read"
            raise UserError(dataset.where, problem, "give other data, or another objective")
        with progress_display() as progress:
            tables[name] = Bins.open(kind, part, dataset.identity, cache, progress)
        if split == "train":
            _check_rows(job, dataset.where, tables[name])
    return tables


def row_kind(job: TrainJob, sources: Sources, in_training: bool) -> BinKind | None:
    """Return the kind of whole rows that a job reads; None if it reads windows. in_training: rows
    of packed examples, which have a row each where they are scored. Raises UserError if the
    tokenizer of its data has no such separator."""
    objective = objective_of(job, sources.vocab_size)
    if isinstance(objective, Preferences):
        return PreferenceKind(job.train.sequence_length)
    if isinstance(objective, Responses):
        packs = job.data.packing == "best_fit" and in_training
        return (PackedConversationKind if packs else ConversationKind)(job.train.sequence_length)
    if not isinstance(objective, Pairs):
        return None
    separator = separator_id(sources.tokenizer, objective.separator, sources.end_of_text)
    return PairKind(separator, objective.split, objective.columns - objective.split)


def _check_rows(job: TrainJob, where: str, bins: Bins) -> None:
    """Raise UserError if no document is a row."""
    if bins.counts.any():
        return
    if not isinstance(bins.kind, PairKind):
        problem = f"has no {bins.unit} to train on: {bins.left_out() or 'it is empty'}"
        raise UserError(where, problem, "give other data, or a longer train.sequence_length")
    assert isinstance(job.objective, PairsConfig)
    facts, text = bins.facts, job.objective.separator or ""
    count = facts["documents"]
    if facts["without_separator"] == count:
        separator = shown_separator(text)
        if not text.isdecimal():
            separator += f" (token {bins.kind.separator})"
        none = "its only document lacks" if count == 1 else f"none of its {count:,} documents has"
        problem = f"{none} the separator {separator}"
        todo = "give another objective.separator, or data whose documents have it"
    else:
        problem = f"has no pair: {bins.left_out()}"
        todo = "give more columns, with train.sequence_length and objective.source"
    raise UserError(where, problem, todo)


def _mixture(job: TrainJob, sources: Sources, bins: Mapping[str, Bins], length: int) -> Mixture:
    seed, orders = job.train.seed, {}
    for name, split in sources.split("train").items():
        source_seed, block = seed, job.data.shuffle_shards
        if sources.is_mixture:  # two sources with the same shards must not run in lockstep
            digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
            source_seed = int.from_bytes(digest, "little") >> 1
        try:
            orders[name] = Order(split.shard_tokens, length, source_seed, block, bins.get(name))
        except UserError as e:
            raise UserError(sources.datasets[name].where, e.problem, e.todo) from None
    weights = job.data.weights or {n: o.windows_per_epoch for n, o in orders.items()}
    firsts = [0, *(job.batch_ramp.samples(job.steps_of(s) or 0) for s in job.data.stage_starts())]
    shares = [weights, *(stage["weights"] for stage in job.data.stages)]
    members = job.outer.count
    stages = [
        MixtureStage.of(first * members, [share.get(name, 0) for name in orders])
        for first, share in zip(firsts, shares, strict=True)
    ]
    if members > 1:
        return MemberMixture(orders, stages, seed, job.outer.index, members)
    return Mixture(orders, stages, seed)
