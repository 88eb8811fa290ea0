"""What the optimizer is told: learning rate and batch at a step, and which parameter gets what.

Invariant: all are pure functions of the config and the step, so a run that goes on, grows or
branches off needs no scheduler state. Imports no torch: anything with an `ndim` is a parameter.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from forescale.config.train import OptimizerConfig, ScheduleConfig, TrainJob
from forescale.errors import UserError
from forescale.models.parametrization import Factors


def learning_rate(
    schedule: ScheduleConfig, step: int, total_steps: int, tokens_per_step: int
) -> float:
    """The fraction of the peak, in [0, 1], that update `step` (from 0) is made with.

    1. Warm-up over W steps: linear, (step + 1) / W, so that the first update is not wasted (Goyal
       et al. 2017, arXiv 1706.02677, section 2.2).
    2. wsd: the peak, then over the last D steps linear to `final` (the name: MiniCPM, Hu et al.
       2024, arXiv 2404.06395, section 4; linear: Hägele et al. 2024, arXiv 2405.18392). Doubt:
       Hägele et al. find 1 - sqrt a little better than linear at long decays.
    3. cosine: half a period from the peak to `final` (Loshchilov & Hutter 2017, arXiv 1608.03983).
    4. constant: the peak.

    `final` itself belongs to step `total_steps`, which is never made: the last update still learns.
    """
    warmup = schedule.warmup.steps(tokens_per_step, total_steps) or 0
    if step < warmup:
        return (step + 1) / warmup
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "cosine":
        done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return schedule.final + (1 - schedule.final) * (1 + math.cos(math.pi * done)) / 2
    assert schedule.decay is not None  # a rule of ScheduleConfig
    decay = schedule.decay.steps(tokens_per_step, total_steps) or 0
    left = min(1.0, max(0, total_steps - step) / decay) if decay else 1.0
    return schedule.final + (1 - schedule.final) * left


def batch(job: TrainJob, step: int) -> int:
    """Windows of update `step`."""
    return job.train.global_batch


def first_window(job: TrainJob, step: int) -> int:
    """The global index g of the first window of update `step`, in a run without skips."""
    return step * job.train.global_batch


@dataclass
class Group:
    """Parameters that an optimizer treats alike, and their names; the learning rate is the peak,
    eps is AdamW's."""

    name: str
    use_muon: bool
    peak_learning_rate: float
    weight_decay: float
    eps: float = 1e-8
    names: list[str] = field(default_factory=list)
    params: list[Any] = field(default_factory=list)


_TABLES = re.compile(r"\w*embed\w*|wte|(\w+_)?head|unembed\w*|vocabulary")
_POSITIONS = re.compile(r"wpe|(\w+_)?pos(ition)?(s|al)?(_(emb|enc|table)\w*)?")


def parameter_groups(
    named_parameters: Iterable[tuple[str, Any]],
    optimizer: OptimizerConfig,
    muon_names: Collection[str] | None = None,
    factors: Mapping[str, Factors] | None = None,
) -> list[Group]:
    """Sort (name, parameter) pairs into at most three groups, in an order that never varies.

    1. muon: hidden matrices (Jordan et al. 2024, kellerjordan.github.io/posts/muon: embedding and
       head are better left to AdamW). `muon_names` says which; without it, those of two dimensions
       whose name tells of no embedding, head or position.
    2. decayed: the other matrices, by AdamW.
    3. undecayed: what has fewer than two dimensions (norms, biases) and positions: decay shrinks
       what has no scale to spare (the habit of GPT-2's reproductions; Loshchilov & Hutter 2019,
       arXiv 1711.05101, decays everything).

    With `factors` (by parameter; models/parametrization.py) the latter two fall into one group for
    each class, named as decayed_hidden, with its own learning rate, decay and eps; they leave muon
    as it is.

    Parameters with `requires_grad` False are left out. Raises UserError where `muon_names` names
    what isn't there or is no matrix.
    """
    every = dict(named_parameters)
    trained = {n: p for n, p in every.items() if getattr(p, "requires_grad", True)}
    by_muon = _muon_names(every, muon_names) if optimizer.kind == "muon" else set()
    adam_rate = optimizer.adam_learning_rate or optimizer.learning_rate
    groups: dict[str, dict[str, Group]] = {"muon": {}, "decayed": {}, "undecayed": {}}
    muon = Group("muon", True, optimizer.learning_rate, optimizer.weight_decay, optimizer.eps)
    for name, parameter in trained.items():
        if name in by_muon:
            kind, group = "muon", muon
        else:
            by = (factors or {}).get(name, Factors(""))
            kind = "undecayed" if parameter.ndim < 2 or _says(_POSITIONS, name) else "decayed"
            decay = optimizer.weight_decay * by.weight_decay if kind == "decayed" else 0.0
            rate, eps = adam_rate * by.learning_rate, optimizer.eps * by.epsilon
            group = Group(f"{kind}_{by.of}" if by.of else kind, False, rate, decay, eps)
        group = groups[kind].setdefault(group.name, group)
        group.names.append(name)
        group.params.append(parameter)
    return [group for of_kind in groups.values() for group in of_kind.values()]


def _says(pattern: re.Pattern, name: str) -> bool:
    return any(pattern.fullmatch(part) for part in name.lower().split("."))


def _muon_names(every: dict[str, Any], given: Collection[str] | None) -> set[str]:
    if given is None:
        tables = (_TABLES, _POSITIONS)
        matrices = (n for n, p in every.items() if p.ndim == 2)
        return {n for n in matrices if not any(_says(pattern, n) for pattern in tables)}
    for name in sorted(given):
        if name not in every or every[name].ndim < 2:
            what = f"muon_parameters() names {name!r}, which is no matrix of the model"
            raise UserError("model", what, "let it name parameters of two or more dimensions")
    return set(given)
