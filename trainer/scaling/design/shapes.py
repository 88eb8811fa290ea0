"""Turns a number of parameters into a model: width, layers, heads and MLP of one family.

Also holds what all cells of a study have in common (Common): the family, FLOPs per token, and the
rule for batch and learning rate.

    aspect   layers = 12 (width / 768)^0.75, a straight line of log layers over log width
    width    a multiple of the head size (with grouped-query attention, of a group of heads)
    heads    of the base model's head_dim if at least eight fit into the width; in narrower models a
             half, a quarter, ... of it, since steps of 64 are too coarse for widths around 100
    MLP      the base model's ratio, or the rule of ModelConfig, rounded up to heads (at most 64)

Invariant: the possible shapes are one fixed list, and the one with the nearest log N is taken. So a
larger requested N never gives a smaller model.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Literal

from forescale.config.sections.optimizer import OptimizerConfig
from forescale.config.sections.training import STEP_LAW_BATCH
from forescale.ground.errors import UserError
from forescale.ground.typed import Count, Flag, Number, Positive, Size
from forescale.models.config import HEAD_DIM, ModelConfig
from forescale.models.flops import Counts, count, flops_6n, flops_per_token
from forescale.run.stored import StoredModel
from forescale.scaling.records.records import SIZES, Convention

# Tokens per parameter at the best N (Hoffmann et al. 2022, arXiv 2203.15556, table 3).
RATIO = 20.0
SEEDS = (5, 3)  # of the cheapest cell, and of an expensive one
_LEAST_HEAD = 8
_HEADS = 8  # with fewer, heads become smaller; so a step of the width is at most an eighth
_ASIDE = 1  # layers by which a shape may differ from the trend, to come nearer to its N
# Two layers can copy from their context, one can't (Olsson et al. 2022, arXiv 2209.11895). All
# sizes of a family can.
_SHALLOWEST = 2
_WIDEST = 1 << 17
_OFF, _FAR_OFF = 0.25, 0.6  # largest relative error of N: for one size, and for the nearest few


def trend(width: int) -> float:
    """Return layers = 12 (width / 768)^0.75, not rounded.

    It goes through both ends of GPT-3's family (Brown et al. 2020, arXiv 2005.14165, table 2.1: 12
    layers of 768, 96 of 12,288); at Llama 7B's width of 4,096 it gives 42 layers (Llama has 32).
    Kaplan et al. 2020 (arXiv 2001.08361, figure 5) find that the aspect changes the loss little
    over a factor of 40, so that one trend for all sizes matters more than which trend.
    """
    return 12.0 * (width / 768.0) ** 0.75


@dataclass(frozen=True)
class Shape:
    """A model of the family. model: resolved; target: the requested N, by the convention."""

    target: Positive
    convention: Convention
    model: StoredModel

    @property
    def counts(self) -> Counts:
        """Its parameters, by part."""
        return count(self.model)

    @property
    def parameters(self) -> int:
        """N by the convention."""
        return int(getattr(self.counts, self.convention))

    @property
    def error(self) -> float:
        """Relative difference of N from the requested one."""
        return self.parameters / self.target - 1


class Family:
    """All shapes of a base model, whose layers are `aspect` times the trend. base: its settings are
    kept except for the sizes, of which the ratios are kept. Raises UserError for an unknown
    convention, a missing vocabulary size, or a base whose sizes don't divide."""

    def __init__(
        self, base: ModelConfig, vocab_size: int | None, sequence_length: int,
        convention: str = "blocks_and_head", aspect: float = 1.0,
    ):  # fmt: skip
        if convention not in SIZES:
            problem = f"'{convention}' is no convention of N"
            raise UserError("size", problem, f"choose from {', '.join(SIZES)}")
        if not (base.vocab_size or vocab_size):
            todo = "give plan.vocab_size, the vocabulary size of the tokenizer"
            raise UserError("model.vocab_size", "is not known, but sizes depend on it", todo)
        self.convention, self.aspect = convention, aspect
        self._base = replace(base, depth=None, mlp_width=None, num_heads=None, num_kv_heads=None)
        self._data = (vocab_size, sequence_length)
        self._sizes: dict[tuple[int, int], int] = {}  # N by width and layers
        width = base.ruled_width
        self._mlp = self._ratio("mlp_width", base.mlp_width, width)
        usual = base.head_dim or HEAD_DIM
        heads = base.num_heads or (width // usual if width else None)
        self._group = 1
        if base.num_kv_heads:
            self._group = self._ratio("num_kv_heads", heads, base.num_kv_heads, whole=True)[0]
        self._head = usual
        if base.num_heads:
            self._head = self._ratio("num_heads", width, base.num_heads, whole=True)[0]

    @staticmethod
    def _ratio(
        name: str, over: int | None, under: int | None, whole: bool = False
    ) -> tuple[int, int]:
        """over / under as a reduced fraction; (0, 1) if no MLP width is given."""
        if over is None and name == "mlp_width":
            return 0, 1
        if not over or not under or (whole and over % under):
            todo = "give model.width too and sizes that divide it, or leave this key out"
            raise UserError(f"model.{name}", "of the base model has no ratio to keep", todo)
        return over // math.gcd(over, under), under // math.gcd(over, under)

    def head_dim(self, width: int) -> int:
        """Return the largest of head_dim, head_dim / 2, ... of which eight groups fit into the
        width."""
        head, least = self._head, min(self._head, _LEAST_HEAD)
        while head % 4 == 0 and head // 2 >= least and head * _HEADS * self._group > width:
            head //= 2
        return head

    def model(self, width: int, layers: int) -> ModelConfig:
        """Return the resolved model of this width and number of layers. Raises UserError if its
        heads make no whole groups, which those of `widths` do."""
        head = self.head_dim(width)
        if width % (self._group * head):
            problem = f"of width {width} has no whole groups of {self._group} heads"
            raise UserError("model", problem, "change the base model")
        over, under = self._mlp
        if not over:
            over, under = (8, 3) if self._base.mlp.is_gated else (4, 1)
        multiple = min(head, 64)
        mlp = -(-over * width // (under * multiple)) * multiple
        heads = width // head
        dim = self._base.head_dim and self._base.head_dim * head // self._head
        sized = replace(
            self._base, num_layers=layers, width=width, num_heads=heads,
            num_kv_heads=heads // self._group, head_dim=dim, mlp_width=mlp,
        )  # fmt: skip
        try:
            return sized.resolved(*self._data)
        except ValueError as e:
            raise UserError("model", str(e).rstrip("."), "change the base model") from None

    @cached_property
    def widths(self) -> list[int]:
        """All widths that a model may have, increasing."""
        widths = [self._group * min(self._head, self.head_dim(1))]
        while (width := widths[-1]) <= _WIDEST:
            step = self._group * self.head_dim(width)
            bigger = self._group * self.head_dim(width + step)
            widths.append((width // bigger + 1) * bigger if bigger > step else width + step)
        return widths[:-1]

    def _layers(self, width: int) -> range:
        middle = max(_SHALLOWEST, round(self.aspect * trend(width)))
        return range(max(_SHALLOWEST, middle - _ASIDE), middle + _ASIDE + 1)

    def _size(self, width: int, layers: int) -> int:
        """Return N by the convention. A plan asks for the same sizes a hundred times, which takes
        half a millisecond each: so they are kept."""
        if (width, layers) not in self._sizes:
            counts = count(self.model(width, layers))
            self._sizes[width, layers] = int(getattr(counts, self.convention))
        return self._sizes[width, layers]

    @cached_property
    def smallest(self) -> int:
        """Return N of the smallest model."""
        width = self.widths[0]
        return min(self._size(width, layers) for layers in self._layers(width))

    def solve(self, target: float, most: float = _OFF) -> Shape:
        """Return the model with the nearest N. Measured errors: within 15 % from 70k parameters on
        (vocabularies of 257 and 512), 9 % from 1M, 3 % from 100M on; with groups of two heads 18,
        10 and 10 %. Raises UserError if the relative error is more than `most`."""
        if not 0 < target < math.inf:
            raise UserError("N", f"{target} is no size of a model", "give a positive number")
        widths = self.widths

        def size(which: Callable[[range], int]) -> Callable[[int], int]:
            return lambda w: self._size(w, which(self._layers(w)))

        # N grows with the width along both edges of the trend; the nearest lie between the two.
        first = bisect_left(widths, target, key=size(max))
        last = bisect_left(widths, target, key=size(min))
        near = widths[max(0, first - 1) : last + 1]
        sizes = [(w, layers) for w in near for layers in self._layers(w)]
        best = self.model(*min(sizes, key=lambda s: abs(math.log(self._size(*s) / target))))
        shape = Shape(float(target), self.convention, best)
        if abs(shape.error) > most:
            problem = f"no model has about {target:.3g} parameters ({self.convention}); the "
            problem += f"nearest has {shape.parameters:,} with a vocabulary of "
            problem += f"{best.sizes.vocab_size:,}"
            raise UserError("N", problem, "choose another size, or a smaller vocabulary")
        return shape

    def nearest(self, targets: Sequence[float]) -> list[Shape]:
        """Return the nearest shapes in increasing order, each once; their N may differ much from
        the requested. Small models are few: between 8k and 15k parameters there are two."""
        shapes = {s.parameters: s for n in targets for s in [self.solve(n, most=_FAR_OFF)]}
        return [shapes[n] for n in sorted(shapes)]

    def series(self, targets: Sequence[float]) -> list[Shape]:
        """Return one shape for each N, strictly increasing. Raises UserError if two become the same
        shape, or if the targets do not increase."""
        shapes = [self.solve(n) for n in targets]
        for one, other in pairwise(shapes):
            if other.parameters <= one.parameters:
                problem = f"{one.target:.4g} and {other.target:.4g} parameters give the same model"
                if other.target <= one.target:
                    problem = f"{other.target:.4g} comes after {one.target:.4g}"
                raise UserError("sizes", problem, "give sizes in increasing order, further apart")
        return shapes


def shares_of(optimizer: OptimizerConfig) -> tuple[tuple[str, float], ...]:
    """Return the other learning rates of an optimizer over its first one, by key."""
    rate = optimizer.learning_rate
    return tuple((f"optimizer.{name}", x / rate) for name, x in optimizer.other_rates.items())


_SIZED = ("num_layers", "width", "num_heads", "num_kv_heads", "head_dim", "mlp_width")


def overrides(model: ModelConfig) -> dict[str, int]:
    """Return the config keys, by full name, that turn the base model into this one."""
    unread = {name for name, _, _ in model.unread()}  # such as heads, where no mixer has any
    sizes = {name: getattr(model, name) for name in _SIZED if name not in unread}
    return {f"model.{name}": size for name, size in sizes.items() if size is not None}


@dataclass(frozen=True)
class Rule:
    """Batch and learning rate of a run, by its N and D.

    batch = scale D^power tokens, within `bounds`; learning rate = k N^a D^b with rate = (k, a, b)
    and N non-embedding, at most `highest`. sizes, tokens: the ranges of N and D that the rule was
    fitted in; cells outside are flagged. The default is Step Law (Li et al. 2025, arXiv
    2503.04715), from runs of 60M to 1B parameters and 2B to 100B tokens. The bounds are ours.
    """

    scale: Positive = STEP_LAW_BATCH[0]
    power: Number = STEP_LAW_BATCH[1]
    bounds: tuple[Positive, Positive] = (1024.0, 8e6)
    rate: tuple[Positive, Number, Number] = (1.79, -0.713, 0.307)
    highest: Positive = 1e-2
    sizes: tuple[Positive, Positive] = (6e7, 1.1e9)
    tokens: tuple[Positive, Positive] = (2e9, 1e11)

    def batch(self, tokens: float) -> float:
        """Tokens per step for D = tokens."""
        return min(max(self.scale * tokens**self.power, self.bounds[0]), self.bounds[1])

    def learning_rate(self, parameters: float, tokens: float) -> float:
        """The learning rate for non-embedding N and D."""
        k, a, b = self.rate
        return min(k * parameters**a * tokens**b, self.highest)

    def covers(self, parameters: float, tokens: float) -> bool:
        """True if N and D are in the ranges that the rule was fitted in."""
        n, d = self.sizes, self.tokens
        return n[0] <= parameters <= n[1] and d[0] <= tokens <= d[1]


@dataclass(frozen=True)
class Common:
    """What all cells of a study have in common.

    size, cost: conventions of N and C; aspect: factor of the trend's layers; micro_batch: windows
    that all ranks feed at once; ranks: of a run, each of which feeds an equal part of them.
    decay: share of the run (WSD; Hägele et al. 2024, arXiv 2405.18392: 20 % do as well as a
    cosine schedule).
    rate: FLOP/s that a device reaches, counted by `cost`; unique: unique training tokens.
    seeds: number of the cheapest cell, and of an expensive one; joint_sweep: whether each tried
    batch is run at three learning rates.
    shares: the other learning rates that are given, by key, divided by optimizer.learning_rate.
    """

    base: StoredModel
    vocab_size: Size | None
    sequence_length: Size
    size: Convention = "blocks_and_head"
    cost: Literal["causal", "full", "6nd"] = "causal"
    aspect: Positive = 1.0
    rule: Rule = Rule()
    micro_batch: Size = 8
    ranks: Size = 1
    decay: Number = 0.2
    seed: Count = 1337
    seeds: tuple[Size, Size] = SEEDS
    joint_sweep: Flag = False
    shares: tuple[tuple[str, Positive], ...] = ()
    rate: Positive | None = None
    unique: Positive | None = None

    @cached_property
    def family(self) -> Family:
        """All shapes of the base model."""
        parts = (self.base, self.vocab_size, self.sequence_length, self.size, self.aspect)
        return Family(*parts)

    def per_token(self, model: ModelConfig) -> dict[str, float]:
        """Training FLOPs per token, by convention."""
        length = self.sequence_length
        return {
            "causal": flops_per_token(model, length, causal=True),
            "full": flops_per_token(model, length),
            "6nd": flops_6n(model),
        }

    def centre(self, budget: float, ratio: float = RATIO) -> float:
        """Return the N for which `budget` FLOPs, counted exactly, train D = ratio N tokens."""
        n = math.sqrt(budget / (6 * ratio))
        for _ in range(12):
            (shape,) = self.family.nearest([n])
            per = self.per_token(shape.model)[self.cost] / shape.parameters
            n = math.sqrt(budget / (ratio * per))
        return n
