"""What makes a pair fair: both sides differ in the change alone.

    before a run    the two composed jobs: keys that decide what is measured are the base's
    after a pair    what both really trained on and were scored on, from the rows of their metrics

Invariant: a change that touches what is measured is refused by the name of its key; a pair whose
sides had another text, order, compute, held-out text or code counts for nothing, and says why.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from forescale.config.compose import compose
from forescale.config.frozen import diff
from forescale.config.layers import LENGTHS
from forescale.config.schema import ConfigError, display
from forescale.config.train import TrainJob
from forescale.ground.errors import UserError
from forescale.models.config import ModelConfig
from forescale.models.flops import flops_per_token
from forescale.monitor.status import Status
from forescale.run.directory import Run
from forescale.run.rows import read_rows
from forescale.run.start import open_sources, settle, versions

# Keys that a change may not have, by why: they decide what is measured, or what a run costs.
_REFUSED = {
    "data.": "decides which text is read",
    "validation.": "decides how a run is scored",
    "objective.": "decides what the loss is",
    "train.seed": "is set by the trial, alike for both sides",
    "train.init_seed": "is set by the trial, alike for both sides",
    "train.sequence_length": "decides how much text is before a token that is scored",
    "run.": "names the run, which the trial does",
    **dict.fromkeys(
        ("outer.members", "outer.member", "outer.store"), "brings in what other runs train"
    ),
    "faults": "damages a run on purpose",
    "callbacks": "is code that runs beside the training and could read or change anything",
    **dict.fromkeys(LENGTHS, "decides how long a run is; write equal=tokens or equal=flops"),
}
_SAME = 1e-3  # relative difference of two runs' compute or tokens that counts as none
_SCORED = ("dataset", "targets", "windows", "bytes")


@dataclass(frozen=True)
class Side:
    """The base, or the change: words of `train` and what a run costs. job: composed and settled;
    tokens: of a whole run; flops: of one, 0 for a class of the user's own; uniform: the loss of a
    uniform guess."""

    words: tuple[str, ...]
    job: TrainJob
    tokens: int
    flops: float
    uniform: float


def side(words: Sequence[str]) -> Side:
    """Return the side with these words. Raises UserError (ConfigError is one) if `train` would
    refuse them, or if its loss isn't that of each next token."""
    composed = compose(TrainJob, [*words])
    if not composed.objective.is_next_token:
        problem = f"objective {composed.objective.kind} has another loss than that of next tokens"
        raise UserError("base", problem, "leave it out")
    sources = open_sources(composed.data)
    job = settle(composed, sources)
    tokens, flops = job.total_tokens, 0.0
    if isinstance(job.model, ModelConfig):
        flops = tokens * flops_per_token(job.model, job.train.sequence_length, causal=True)
    return Side(tuple(words), job, tokens, flops, math.log(sources.vocab_size))


def joined(words: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    """Return both lists of words; a length among the others replaces the first one's."""
    has_length = any(word.partition("=")[0] in LENGTHS for word in others)
    rest = [w for w in words if not (has_length and w.partition("=")[0] in LENGTHS)]
    return (*rest, *others)


def with_tokens(words: Sequence[str], tokens: int) -> tuple[str, ...]:
    """Return words with this length, and without another one."""
    return joined(words, [f"train.tokens={tokens}"])


def changed_side(base: Side, change: Sequence[str], equal: str, has_code: bool = False) -> Side:
    """Return the side of a change, which costs as much as the base: as many FLOPs, or tokens,
    rounded down to whole steps, so that no change trains longer.

    Raises UserError for a key that a change may not have, for one that changes nothing, for a batch
    that is more than the run, or for a class of the user's own with equal=flops, whose compute
    isn't known. has_code: the change has code of its own, so that no key need differ.
    """
    for word in change:
        name = word.partition("=")[0].lstrip("+~")
        for refused, why in _REFUSED.items():
            if name == refused or name == refused.rstrip(".") or name.startswith(refused):
                raise UserError(name, f"{why}, so a change can't have it", "leave it out")
    words = with_tokens([*_held(base.words, change), *change], base.tokens)
    changed = side(words)
    keys = [c.key for c in diff(base.job, changed.job) if c.key not in LENGTHS]
    for key in keys:  # a choice of a group can change it too
        for refused, why in _REFUSED.items():
            if key == refused or (refused.endswith(".") and key.startswith(refused)):
                problem = f"the change sets it, and it {why}"
                raise UserError(key, problem, "give the base this key, or leave it out")
    if not keys and not has_code:
        raise UserError(" ".join(change), "changes nothing", "see forescale train --help")
    if equal == "flops" and not (base.flops and changed.flops):
        problem = "the compute of a class of your own or of transformers isn't known"
        raise UserError("equal", problem, "write equal=tokens")
    ratio = base.flops / changed.flops if equal == "flops" else base.tokens / changed.tokens
    most, step = changed.tokens * ratio * (1 + _SAME), changed.job.tokens_per_step
    if ratio > 1 + _SAME:  # cheaper than the base: it trains longer
        changed = side(with_tokens(words, int(most)))
    while changed.tokens > most:
        tokens = min(int(most), changed.tokens - step)
        if tokens < step:
            problem = f"a step of {step:,} tokens is more than the {int(most):,} that it may have"
            raise UserError(" ".join(change), problem, "lower train.global_batch, or a longer base")
        changed = side(with_tokens(words, tokens))
    return changed


def _held(words: Sequence[str], change: Sequence[str]) -> list[str]:
    """Return the base's words without keys of a choice that the change replaces, where the new
    choice has no such key: the momentum of optimizer=muon in a trial of optimizer=adamw."""
    try:
        compose(TrainJob, [*words, *change])
    except ConfigError as e:
        lost = {problem.key for problem in e.problems}
        chosen = {word.partition("=")[0] for word in change}
        lost = {key for key in lost if any(key.startswith(f"{name}.") for name in chosen)}
        return [w for w in words if w.partition("=")[0] not in lost]
    return [*words]


def changes_of(base: Side, changed: Side) -> dict[str, list[str]]:
    """Return what the change changes: each key with its old and new value, as texts."""
    return {
        c.key: [str(c.old), str(c.new)] for c in diff(base.job, changed.job) if c.key not in LENGTHS
    }


def unwritten(keys: Mapping[str, Sequence[str]], change: Sequence[str]) -> str:
    """Return what a change changes though no word of it says so: values of another choice's file,
    such as the weight decay of optimizer=adamw. keys: of changes_of; "" if there are none."""
    words = {word.partition("=")[0] for word in change}
    others = [
        f"{key} {old} -> {new}"
        for key, (old, new) in keys.items()
        if "None" not in (old, new) and key not in words and key.removesuffix(".kind") not in words
    ]
    return ", ".join(others)


@dataclass(frozen=True)
class Outcome:
    """How a run ended. state: "complete", "diverged", "open" for one that can go on; loss: of the
    held-out text, that of a uniform guess for one that diverged; facts: what it trained on."""

    state: str
    loss: float
    facts: dict[str, Any]


def outcome(run: Run, uniform: float) -> Outcome:
    """Return how a run ended. uniform: the loss of a uniform guess, which a diverged run has."""
    if not run.config.is_file():
        return Outcome("open", uniform, {})
    status = Status(run)
    if status.state == "halted":
        return Outcome("diverged", uniform, facts_of(run, status))
    score = status.validation
    if status.state != "complete" or not score or score["step"] != status.job.total_steps:
        return Outcome("open", uniform, {})
    loss = float(score["loss"])
    facts = facts_of(run, status)
    return Outcome("complete", loss, facts) if loss < uniform else Outcome(
        "diverged", uniform, facts
    )  # fmt: skip


def unplanned(run: Run, job: TrainJob, seed: int) -> list[str]:
    """Return in what the frozen config of a run isn't the planned one; a sentence each. What a
    run's own words set, and keys that can't move its weights or its score, aren't compared."""
    frozen = Status(run).job
    changes = [
        f"{c.key} is {display(c.new)} where the trial plans {display(c.old)}"
        for c in diff(job, frozen)
        if c.key not in ("train.seed", "validation.every")
        and (c.kind != "free" or c.key.split(".")[0] in ("data", "validation", "callbacks"))
    ]
    if frozen.train.seed != seed:
        changes.append(f"train.seed is {frozen.train.seed} where the trial plans {seed}")
    return changes


def facts_of(run: Run, status: Status) -> dict[str, Any]:
    """Return what a run trained on and was scored on, what it took, and the hash of its order."""
    rows = read_rows(run.metrics, kind="train")
    order = hashlib.sha256()
    for row in rows:
        order.update(f"{row.get('g0')} {row.get('g1')} {row.get('tokens_hash')}\n".encode())
    seconds = sorted(sum((row.get("seconds") or {}).values()) for row in rows) or [0.0]
    identity = run.read_identity()
    score = status.validation or {}
    return {
        "data": identity["dataset"].get("identity"),
        "seed": status.job.train.seed,
        "batch": status.job.tokens_per_step,
        "tokens": status.tokens,
        "order": order.hexdigest(),
        "flops": status.last.get("flops_causal") or 0.0,
        "scored": [score.get(name) for name in _SCORED],
        "seconds": seconds[len(seconds) // 2] * len(rows),
        "wall": status.goodput.wall,
        "memory": max((row.get("memory_bytes") or 0 for row in rows), default=0),
    }


def unfair(base: dict[str, Any], changed: dict[str, Any], equal: str) -> list[str]:
    """Return in what a pair differs beside the change; a sentence each, none for a fair pair."""
    problems = []
    for name, noun in (("data", "the text"), ("seed", "the seed"), ("scored", "the held-out text")):
        if base[name] != changed[name]:
            problems.append(f"{noun} is {changed[name]} where the base has {base[name]}")
    alike = base["batch"] == changed["batch"] and base["tokens"] == changed["tokens"]
    if alike and base["order"] != changed["order"]:
        problems.append("the same windows came in another order, or hold other tokens")
    much, other = base[equal], changed[equal]
    step = changed["batch"] / max(changed["tokens"], 1)  # less than one is lost by rounding
    if not much or not -step < other / much - 1 + _SAME <= 2 * _SAME:
        problems.append(f"it had {other:.6g} {equal} where the base had {much:.6g}")
    return problems


@cache
def code_hash() -> str:
    """Return the SHA-256 of the project's own code and configs, and of the versions of the packages
    that train and score a run."""
    root = Path(__file__).resolve().parents[1]
    tops = [root, *(root / name for name in ("models", "conf", "slurm"))]
    if not (root / "models").is_dir():  # a checkout, where they stand beside
        tops = [root, *(root.parent / name for name in ("models", "conf", "slurm"))]
    files = {p.resolve() for top in tops for kind in ("*.py", "*.yaml") for p in top.rglob(kind)}
    total = hashlib.sha256(repr(versions()).encode())
    for path in sorted(files, key=str):
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()
