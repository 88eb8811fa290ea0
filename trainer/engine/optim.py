"""The weight decay of each step, the parameter groups, and the construction of the optimizer.

Invariant: these are pure functions of the config and the step. So a run that resumes, gets longer
or branches off needs no scheduler state. Imports no torch: a parameter is anything with a `shape`.
"""

import importlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from forescale.config.sections.optimizer import OptimizerConfig, Update
from forescale.ground.errors import UserError
from forescale.models.parametrization import Factors

WHOLE = 64 << 20  # bytes of whole matrices that a rank has at once (spread.py, matrices.py)


def decay_multiplier(optimizer: OptimizerConfig, step: int, total_steps: int) -> float:
    """Return the weight decay of update `step` (from 0) as a fraction of optimizer.weight_decay:
    linear from 1 to `final_weight_decay`, which belongs to step `total_steps`, as the rate's
    `final` does.

    Each update multiplies a weight by 1 - rate * decay, so that a rate that falls lowers what decay
    does by itself. nanochat (Karpathy 2025, scripts/base_train.py) lets Muon's decay fall to 0.
    """
    final = optimizer.final_weight_decay
    return 1 - (1 - final) * min(1.0, step / total_steps)


@dataclass
class Group:
    """Parameters that the optimizer updates with the same settings. eps: of AdamW. parts: ranks
    that have different ones of these parameters, if they are experts; 1: others."""

    name: str
    update: Update
    peak_learning_rate: float
    weight_decay: float
    eps: float = 1e-8
    names: list[str] = field(default_factory=list)
    params: list[Any] = field(default_factory=list)
    parts: int = 1

    def as_dict(self) -> dict[str, Any]:
        """Return the group as a dict for torch's optimizers; DeepSpeed reads the keys use_muon and
        moe."""
        return {
            "name": self.name,
            "params": self.params,
            "use_muon": self.update.is_by_matrix,
            "peak_learning_rate": self.peak_learning_rate,
            "weight_decay": self.weight_decay,
            "eps": self.eps,
        } | ({"moe": True} if self.parts > 1 else {})


def build_optimizer(config: OptimizerConfig, groups: list[dict[str, Any]]) -> Any:
    """Return the torch.optim.Optimizer of this config. groups: dicts from Group.as_dict.

    Raises UserError if a class of the user's own can't be built.
    """
    module, _, name = config.build.rpartition(".")
    optimizer = getattr(importlib.import_module(module), name)(config, groups)
    if config.cautious_decay:
        from forescale.engine.optimizers.cautious import decay_cautiously  # imports torch

        decay_cautiously(optimizer)
    return optimizer


_TABLES = re.compile(r"\w*embed\w*|wte|(\w+_)?head|unembed\w*|vocabulary")
_POSITIONS = re.compile(r"wpe|(\w+_)?pos(ition)?(s|al)?(_(emb|enc|table)\w*)?")


def parameter_groups(
    named_parameters: Iterable[tuple[str, Any]],
    optimizer: OptimizerConfig,
    muon_names: Collection[str] | None = None,
    factors: Mapping[str, Factors] | None = None,
) -> list[Group]:
    """Sort (name, parameter) pairs into groups, always in the same order: muon, decayed, undecayed.

    1. muon: the hidden matrices, updated by Muon (Jordan et al. 2024,
       kellerjordan.github.io/posts/muon, recommend AdamW for embedding and head). `muon_names`
       lists them; without it, they are the parameters of two dimensions whose name does not
       indicate an embedding, a head or a position.
    2. decayed: the other matrices, updated by AdamW.
    3. undecayed: positions and parameters with fewer than two dimensions (norms, biases), because
       decay harms their scale. Reproductions of GPT-2 do the same; Loshchilov & Hutter 2019 (arXiv
       1711.05101) decay everything.

    Tables (all of two dimensions or more that Muon would leave to AdamW) and scalars (fewer than
    two) with a learning rate of their own are groups of their own, such as decayed_tables.

    With `factors` (by parameter; models/parametrization.py), decayed and undecayed are split into
    one group per class, such as decayed_hidden, with its own learning rate, decay and eps. The
    group muon does not change.

    Parameters with `requires_grad` False are left out. Raises UserError if a name in `muon_names`
    is missing or is not a matrix.
    """
    every = dict(named_parameters)
    trained = {n: p for n, p in every.items() if getattr(p, "requires_grad", True)}
    tables, scalars = optimizer.table_learning_rate, optimizer.scalar_learning_rate
    matrices = _matrix_names(every, muon_names) if optimizer.matrices or tables else set()
    eps_of_all = getattr(optimizer, "eps", Group.eps)
    groups: dict[str, dict[str, Group]] = {"muon": {}, "decayed": {}, "undecayed": {}}
    for name, parameter in trained.items():
        if optimizer.matrices and name in matrices:
            kind, rates = "muon", (optimizer.learning_rate, optimizer.weight_decay, eps_of_all)
            group = Group("muon", _of_config(optimizer, optimizer.matrices), *rates)
        else:
            by = (factors or {}).get(name, Factors(""))
            is_decayed = len(shape_of(parameter)) > 1 and not _matches(_POSITIONS, name)
            kind = "decayed" if is_decayed else "undecayed"
            decay = optimizer.weight_decay * by.weight_decay if is_decayed else 0.0
            is_table = len(shape_of(parameter)) > 1
            part = None if name in matrices else tables if is_table else scalars
            rate = (part or optimizer.rate_of_the_rest) * by.learning_rate
            eps = eps_of_all * by.epsilon
            name_of_part = ("tables" if is_table else "scalars") if part else ""
            name_of_group = "_".join(filter(None, (kind, by.of, name_of_part)))
            group = Group(name_of_group, _of_config(optimizer, optimizer.update), rate, decay, eps)
        group = groups[kind].setdefault(group.name, group)
        group.names.append(name)
        group.params.append(parameter)
    return [group for of_kind in groups.values() for group in of_kind.values()]


def _of_config(optimizer: OptimizerConfig, update: Update) -> Update:
    """Return an update with what the config adds: cautious decay copies the weights before it."""
    return replace(update, scratch=update.scratch + 1) if optimizer.cautious_decay else update


def divided_groups(groups: list[Group], experts: Collection[str], parts: int) -> list[Group]:
    """Split off the `experts` of each group, by name, into a group of the same name behind it, in
    the same order. parts: of Group; 1 splits nothing."""
    if parts == 1:
        return groups
    result = []
    for group in groups:
        pairs = list(zip(group.names, group.params, strict=True))
        for of in (1, parts):
            members = [(name, p) for name, p in pairs if (name in experts) == (of > 1)]
            names, params = [name for name, _ in members], [p for _, p in members]
            if members:
                result.append(replace(group, names=names, params=params, parts=of))
    return result


def shape_of(parameter: Any) -> tuple[int, ...]:
    """Return the shape of a parameter, also of one that ZeRO-3 has divided among the ranks."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def waves(
    params: Sequence[Any], ranks: int, size: int, least: int = 1
) -> Iterator[list[list[int]]]:
    """Yield the matrices that ranks bring together at once: for each rank the indices of those that
    it has whole, WHOLE bytes at most, or `least` matrices. The larger ones come first, and the
    first rank has the most.

    ranks: that have a part of each; size: bytes of an element.
    """
    shapes, most = [shape_of(p) for p in params], WHOLE // size
    order = sorted(range(len(params)), key=lambda i: (prod(shapes[i]), shapes[i]), reverse=True)
    start = 0
    while start < len(order):
        end, elements = start, 0
        least_end = start + ranks * (least - 1)
        while end < len(order) and (
            end <= least_end or elements + prod(shapes[order[end]]) <= most
        ):
            elements += prod(shapes[order[end]])
            end += ranks
        yield [order[start:end][rank::ranks] for rank in range(ranks)]
        start = end


def _matches(pattern: re.Pattern, name: str) -> bool:
    return any(pattern.fullmatch(part) for part in name.lower().split("."))


def _matrix_names(every: dict[str, Any], names: Collection[str] | None) -> set[str]:
    if names is None:
        tables = (_TABLES, _POSITIONS)
        matrices = (n for n, p in every.items() if len(shape_of(p)) == 2)
        return {n for n in matrices if not any(_matches(pattern, n) for pattern in tables)}
    for name in sorted(names):
        if name not in every or len(shape_of(every[name])) < 2:
            problem = f"muon_parameters() returns {name!r}, which is not a matrix of the model"
            raise UserError("model", problem, "return only parameters of two or more dimensions")
    return set(names)
