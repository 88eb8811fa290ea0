"""Batches and learning rates of published models by size, and notes on a job that is far from them.

Invariant: a note is one sentence: the number, the published ones, the keys to set. It never refuses
anything. A job of a recipe (conf/recipe/) has no note: the table has the recipes' own numbers.
Small models have none either, because they are cheap to try. Imports no torch.
"""

import math
from dataclasses import dataclass

from forescale.config.train import TrainJob
from forescale.models.config import ModelConfig


@dataclass(frozen=True)
class PublishedRun:
    """One published run: parameters, tokens of a step, peak learning rate of AdamW."""

    parameters: float
    step_tokens: float
    learning_rate: float
    name: str
    recipe: str  # the nearest file of conf/recipe


# By size. The sources of the first seven are in the recipes; the last is Grattafiori et al. 2024,
# arXiv 2407.21783, section 3.4.1 and table 3.
PUBLISHED = (
    PublishedRun(124e6, 491_520, 6e-4, "nanoGPT", "gpt2-124m"),
    PublishedRun(355e6, 524_288, 3e-4, "GPT-3 medium", "gpt2-350m"),
    PublishedRun(1.1e9, 2_097_152, 4e-4, "TinyLlama", "llama-1b"),
    PublishedRun(2.8e9, 4_194_304, 3.2e-4, "StableLM 3B", "llama-3b"),
    PublishedRun(6.7e9, 4_194_304, 3e-4, "Llama 7B", "llama-7b"),
    PublishedRun(13e9, 4_194_304, 3e-4, "Llama 13B", "llama-13b"),
    PublishedRun(69e9, 4_194_304, 1.5e-4, "Llama 2 70B", "llama-70b"),
    PublishedRun(405e9, 16_777_216, 8e-5, "Llama 3 405B", "llama-405b"),
)

_LEAST_PARAMETERS = 50e6
_BATCH_FACTOR = 10  # published batches of one size differ by up to 5: Pythia 160M takes 2M tokens
_OF_EXPERTS = 1.6  # times that: DeepSeek-V3 takes 15 times the tokens of Llama of its active size
_RATE_FACTOR = 3
_LEAST_WINDOW = 512  # BERT's; no published model of these sizes reads shorter ones
_TOKENS_PER_PARAMETER = (1, 5_000)  # GPT-3 175B: 1.7; Llama 3 8B: 1,900; T5's baseline: 570
_LONGEST_WARMUP = 0.2  # of the run; one that is cut short may need more than the published 1 %
# Muon's rate at 124M parameters and a width of 768 (Jordan et al. 2024). Elsewhere it goes with
# AdamW's, and with the root of the width, as Liu et al. 2025 (arXiv 2502.16982, section 2.2) find:
# the elements of an orthogonal matrix shrink with that root.
_MUON_RATE, _MUON_WIDTH = 0.02, 768
_LION_SHARE = 1 / 3  # of AdamW's rate, at most (Chen et al. 2023, arXiv 2302.06675, section 5)


def published_notes(job: TrainJob, parameters: float) -> list[str]:
    """Return a sentence for each number of `job` that is far from those of published models.

    parameters: those that are active for a token. A run that starts from another's weights is not
    compared in length and warm-up. The rate of the parameters that Muon leaves to AdamW is not
    compared: published ones differ by a factor of hundreds.
    """
    if parameters < _LEAST_PARAMETERS:
        return []
    model, notes = job.model, list[str]()
    nearest = min(PUBLISHED, key=lambda run: abs(math.log(run.parameters / parameters)))
    recipe = ""  # "add recipe=NAME, or "; a class of the user's own has no keys of our model
    if isinstance(model, ModelConfig):
        name = "mixtral-8x7b" if model.mlp.is_routed else nearest.recipe
        name = name if model.causal else "bert-base"
        recipe = f"add recipe={'t5-small' if model.has_encoder else name}, or "
    length, tokens = job.train.sequence_length, job.tokens_per_step
    if length < _LEAST_WINDOW:
        longer = 1024 if getattr(model, "causal", True) else 512
        notes.append(
            f"Windows have {length:,} tokens, and those of published models of this size 512 "
            f"(BERT) to 8,192 (Llama 3): {recipe}set train.sequence_length={longer}."
        )
    published = interpolated(parameters, "step_tokens")
    factor = _BATCH_FACTOR * (
        _OF_EXPERTS if isinstance(model, ModelConfig) and model.experts else 1
    )
    if not published / factor <= tokens <= published * factor:
        windows = max(1, int(job.train.global_batch * 2 ** round(math.log2(published / tokens))))
        notes.append(
            f"A step has {tokens:,} tokens, and about {_rounded(published)} in published models of "
            f"this size (nearest: {nearest.name}): {recipe}set train.global_batch={windows}."
        )
    if not job.run.origin.run:
        of_run, (least, most) = job.total_tokens, _TOKENS_PER_PARAMETER
        if not least <= of_run / parameters <= most:
            notes.append(
                f"The run reads {_rounded(of_run)} tokens, {_rounded(of_run / parameters)} for an "
                "active parameter, where GPT-3 175B read 1.7 and TinyLlama 2,700; about 20 need "
                "the least compute for their loss (Hoffmann et al. 2022): set "
                f"train.tokens={20 * parameters:.1e}."
            )
        steps, total = job.warmup_steps, job.total_steps
        if not 0 < steps <= _LONGEST_WARMUP * total:
            takes = f"takes {steps:,} of {total:,} steps" if steps else "is missing"
            notes.append(
                f"The warm-up {takes}, and in published runs it takes 0.1 % (TinyLlama) to 1 % "
                "(BERT, Pythia) of them: set schedule.warmup='1 %'."
            )
    rate, usual = job.optimizer.learning_rate, _published_rate(job, parameters)
    if usual is not None and rate > _RATE_FACTOR * usual:
        kind = job.optimizer.kind
        basis = "" if kind == "adamw" else f", as {kind}'s follows from AdamW's"
        notes.append(
            f"optimizer.learning_rate={rate:g} is {rate / usual:.2g} times that of published "
            f"models of this size (about {usual:.2g}; nearest: {nearest.name}"
            f"{basis}): {recipe}set optimizer.learning_rate={usual:.1g}."
        )
    return notes


def interpolated(parameters: float, name: str) -> float:
    """Return a field of PUBLISHED at a number of parameters: interpolated in both logarithms;
    beyond the smallest and the largest run, their values."""
    below = [run for run in PUBLISHED if run.parameters <= parameters]
    above = [run for run in PUBLISHED if run.parameters > parameters]
    if not below or not above:
        return getattr(below[-1] if below else above[0], name)
    low, high = below[-1], above[0]
    share = math.log(parameters / low.parameters) / math.log(high.parameters / low.parameters)
    return getattr(low, name) ** (1 - share) * getattr(high, name) ** share


def _published_rate(job: TrainJob, parameters: float) -> float | None:
    """Return the rate of the job's optimizer that compares with AdamW's in PUBLISHED; None if there
    is none, as for a parametrization whose rates are those of another width."""
    model, rate = job.model, interpolated(parameters, "learning_rate")
    if isinstance(model, ModelConfig) and model.parametrization.kind != "standard":
        return None
    if job.optimizer.kind == "adamw":
        return rate
    if job.optimizer.kind == "lion":
        return rate * _LION_SHARE
    if job.optimizer.kind == "muon" and isinstance(model, ModelConfig):
        wider = (model.sized().width or _MUON_WIDTH) / _MUON_WIDTH
        return _MUON_RATE * math.sqrt(wider) * rate / PUBLISHED[0].learning_rate
    return None


def _rounded(number: float) -> str:
    """Return a number with two significant digits: 2,100,000 or 0.0045."""
    return f"{float(f'{number:.2g}'):,.10g}"
