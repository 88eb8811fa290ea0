"""A wanted number of parameters turned into a model: width, layers, heads and MLP of one family;
and what all cells of a study share: that family, what a token costs, batch and learning rate.

    aspect   layers = 12 (width / 768)^0.75, a straight line of log layers on log width
    width    in whole heads (whole groups of them with grouped-query attention)
    heads    of the base's head_dim from a width of eight on; below that a half, a quarter, ... of
             it, since steps of 64 are no family for models of width 100
    MLP      the ratio of the base, or the rule of ModelConfig, rounded up to heads (at most 64)

Invariant: what a number may become does not depend on the number: shapes are one fixed ladder, and
the nearest of it by log N is taken. So a greater number never gets a smaller model.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Literal

from forescale.errors import UserError
from forescale.models.config import HEAD_DIM, WIDTH_PER_LAYER, ModelConfig
from forescale.models.flops import Counts, count, flops_6n, flops_per_token
from forescale.scaling.records.records import SIZES

# Tokens a parameter at the best N (Hoffmann et al. 2022, arXiv 2203.15556, table 3).
RATIO = 20.0
SEEDS = (5, 3)  # of the cheapest cell, and of one near the top
_LEAST_HEAD = 8
_HEADS = 8  # at least, before heads become smaller: then a step of the width is an eighth at most
_ASIDE = 1  # layers that a shape may be off the trend, for the sake of its N
# One layer can't copy from its context, which two can (Olsson et al. 2022, arXiv 2209.11895): sizes
# of one family do not differ in that.
_SHALLOWEST = 2
_WIDEST = 1 << 17
_OFF, _FAR_OFF = 0.25, 0.6  # of N: more than that is no answer; nor is it the nearest of a few


@dataclass(frozen=True)
class Aspect:
    """layers = `layers` (width / `width`)^exponent. The default goes through both ends of GPT-3's
    family (Brown et al. 2020, arXiv 2005.14165, table 2.1: 12 layers of 768, 96 of 12,288); it
    gives 42 layers at Llama 7B's width of 4,096 (it has 32). Doubt: Kaplan et al. 2020 (arXiv
    2001.08361, figure 5) find that the aspect changes the loss little over a factor of 40: that all
    sizes of a study follow one trend matters more than which."""

    layers: float = 12.0
    width: float = 768.0
    exponent: float = 0.75

    def at(self, width: int) -> float:
        return self.layers * (width / self.width) ** self.exponent


GPT3 = Aspect()
PROPORTIONAL = Aspect(1.0, float(WIDTH_PER_LAYER), 1.0)  # the rule of ModelConfig's depth


@dataclass(frozen=True)
class Shape:
    """model: resolved; wanted: parameters by the convention."""

    wanted: float
    convention: str
    model: ModelConfig

    @property
    def counts(self) -> Counts:
        return count(self.model)

    @property
    def parameters(self) -> int:
        """By the convention."""
        return int(getattr(self.counts, self.convention))

    @property
    def error(self) -> float:
        """Relative, of what was wanted."""
        return self.parameters / self.wanted - 1


class Family:
    """All shapes of a base model along an aspect trend. base: what it says beyond sizes is kept,
    and of its sizes the ratios. Raises UserError for an unknown convention, without a vocabulary,
    and for a base that contradicts itself."""

    def __init__(
        self,
        base: ModelConfig,
        vocab_size: int | None,
        sequence_length: int,
        convention: str = "blocks_and_head",
        aspect: Aspect = GPT3,
    ):
        if convention not in SIZES:
            what = f"'{convention}' is no convention of N"
            raise UserError("size", what, f"choose from {', '.join(SIZES)}")
        if not (base.vocab_size or vocab_size):
            todo = "give the vocabulary of the tokenizer, or model.vocab_size"
            raise UserError("model.vocab_size", "is not known, and sizes depend on it", todo)
        self.convention, self.aspect = convention, aspect
        self._base = replace(base, depth=None, mlp_width=None, num_heads=None, num_kv_heads=None)
        self._data = (vocab_size, sequence_length)
        width = base.width or (WIDTH_PER_LAYER * base.depth if base.depth else None)
        self._mlp = self._ratio("mlp_width", base.mlp_width, width)
        heads = base.num_heads or (width // HEAD_DIM if width else None)
        self._group = 1
        if base.num_kv_heads:
            self._group = self._ratio("num_kv_heads", heads, base.num_kv_heads, whole=True)[0]
        self._head = HEAD_DIM
        if base.num_heads:
            self._head = self._ratio("num_heads", width, base.num_heads, whole=True)[0]

    @staticmethod
    def _ratio(
        name: str, over: int | None, under: int | None, whole: bool = False
    ) -> tuple[int, int]:
        """over / under as a fraction; (0, 1) where nothing is given."""
        if over is None and name == "mlp_width":
            return 0, 1
        if not over or not under or (whole and over % under):
            todo = "give width with it, and sizes that divide, or leave it out"
            raise UserError(f"model.{name}", "of the base has no ratio to keep", todo)
        return over // math.gcd(over, under), under // math.gcd(over, under)

    def head_dim(self, width: int) -> int:
        """The largest of head_dim, head_dim / 2, ... of which eight groups fit into the width."""
        head, least = self._head, min(self._head, _LEAST_HEAD)
        while head % 4 == 0 and head // 2 >= least and head * _HEADS * self._group > width:
            head //= 2
        return head

    def model(self, width: int, layers: int) -> ModelConfig:
        """Resolved. width: one of `_next`'s."""
        head = self.head_dim(width)
        over, under = self._mlp
        if not over:
            over, under = (8, 3) if self._base.mlp == "swiglu" else (4, 1)
        multiple = min(head, 64)
        mlp = -(-over * width // (under * multiple)) * multiple
        heads = width // head
        sized = replace(
            self._base,
            num_layers=layers,
            width=width,
            num_heads=heads,
            num_kv_heads=heads // self._group,
            mlp_width=mlp,
        )
        try:
            return sized.resolved(*self._data)
        except ValueError as e:
            raise UserError("model", str(e).rstrip("."), "change the base model") from None

    def _widths(self) -> Iterator[int]:
        width = self._group * min(self._head, self.head_dim(1))
        while width <= _WIDEST:
            yield width
            step = self._group * self.head_dim(width)
            bigger = self._group * self.head_dim(width + step)
            width = (width // bigger + 1) * bigger if bigger > step else width + step

    def _layers(self, width: int) -> range:
        trend = max(_SHALLOWEST, round(self.aspect.at(width)))
        return range(max(_SHALLOWEST, trend - _ASIDE), trend + _ASIDE + 1)

    def _size(self, model: ModelConfig) -> int:
        return int(getattr(count(model), self.convention))

    def solve(self, wanted: float, most: float = _OFF) -> Shape:
        """The model whose N is nearest; measured: within 15 % from 70k parameters on (vocabularies
        of 257 and 512), 9 % from 1M, 3 % from 100M on; groups of two heads, 18, 10 and 10 %. Raises
        UserError where none is as near as `most`, of N."""
        if not 0 < wanted < math.inf:
            raise UserError("N", f"{wanted} is no size", "give a positive number of parameters")
        widths = list(self._widths())

        def size(which: Callable[[range], int]) -> Callable[[int], int]:
            return lambda w: self._size(self.model(w, which(self._layers(w))))

        # N grows with the width along either edge of the trend: between the two all that is near.
        first = bisect_left(widths, wanted, key=size(max))
        last = bisect_left(widths, wanted, key=size(min))
        near = widths[max(0, first - 1) : last + 1]
        models = [self.model(w, layers) for w in near for layers in self._layers(w)]
        best = min(models, key=lambda m: abs(math.log(self._size(m) / wanted)))
        found = Shape(float(wanted), self.convention, best)
        if abs(found.error) > most:
            what = f"{wanted:.3g} parameters ({self.convention}) can't be had: the nearest model "
            what += f"has {found.parameters:,} with a vocabulary of {best.sizes.vocab_size:,}"
            raise UserError("N", what, "ask for another size, or take a smaller vocabulary")
        return found

    def nearest(self, wanted: Sequence[float]) -> list[Shape]:
        """The nearest shape of each, growing, and none twice: where sizes are to lie about there,
        and none must be met. Small models are few: between 8k and 15k parameters there are two."""
        found = {s.parameters: s for n in wanted for s in [self.solve(n, most=_FAR_OFF)]}
        return [found[n] for n in sorted(found)]

    def series(self, wanted: Sequence[float]) -> list[Shape]:
        """One shape each, strictly growing. Raises UserError where two become the same shape, or
        do not grow."""
        found = [self.solve(n) for n in wanted]
        for one, other in pairwise(found):
            if other.parameters <= one.parameters:
                what = f"{one.wanted:.4g} and {other.wanted:.4g} parameters become the same model"
                if other.wanted <= one.wanted:
                    what = f"{other.wanted:.4g} comes after {one.wanted:.4g}"
                raise UserError("sizes", what, "spread the sizes further, and let them grow")
        return found


def solve(
    wanted: float,
    convention: str,
    vocab_size: int | None,
    sequence_length: int,
    base: ModelConfig,
    aspect: Aspect = GPT3,
) -> Shape:
    """One size; see Family."""
    return Family(base, vocab_size, sequence_length, convention, aspect).solve(wanted)


_SIZED = ("num_layers", "width", "num_heads", "num_kv_heads", "mlp_width")


def overrides(model: ModelConfig) -> dict[str, int]:
    """The config keys that make the base this model, by their full names."""
    return {f"model.{name}": getattr(model, name) for name in _SIZED}


@dataclass(frozen=True)
class Rule:
    """batch = scale D^power tokens, within `bounds`; rate = (k, a, b): k N^a D^b, N non-embedding,
    at most `highest`. sizes, tokens: the ranges of N and D that it was fitted in; beyond them a
    cell is flagged. The default is Step Law (Li et al. 2025, arXiv 2503.04715); its runs
    were of 60M to 1B parameters and 2B to 100B tokens. The bounds are ours."""

    scale: float = 0.58
    power: float = 0.571
    bounds: tuple[float, float] = (1024.0, 8e6)
    rate: tuple[float, float, float] = (1.79, -0.713, 0.307)
    highest: float = 1e-2
    sizes: tuple[float, float] = (6e7, 1.1e9)
    tokens: tuple[float, float] = (2e9, 1e11)

    def batch(self, tokens: float) -> float:
        """Tokens a step."""
        return min(max(self.scale * tokens**self.power, self.bounds[0]), self.bounds[1])

    def learning_rate(self, parameters: float, tokens: float) -> float:
        k, a, b = self.rate
        return min(k * parameters**a * tokens**b, self.highest)

    def covers(self, parameters: float, tokens: float) -> bool:
        n, d = self.sizes, self.tokens
        return n[0] <= parameters <= n[1] and d[0] <= tokens <= d[1]


@dataclass(frozen=True)
class Common:
    """What all cells share. size, cost: conventions of N and C; micro_batch: windows that all ranks
    feed at once; decay: share of the run (WSD; Hägele et al. 2024, arXiv 2405.18392:
    20 % do as well as a cosine); rate: FLOPs a second that a device reaches, by `cost`; unique:
    tokens of the data; seeds: how many, of the cheapest cell and of one near the top; cross:
    whether batches are tried at three learning rates each; adam_share: the learning rate of what
    AdamW takes beside Muon, over Muon's."""

    base: ModelConfig
    vocab_size: int | None
    sequence_length: int
    size: str = "blocks_and_head"
    cost: Literal["causal", "full", "6nd"] = "causal"
    aspect: Aspect = GPT3
    rule: Rule = Rule()
    micro_batch: int = 8
    decay: float = 0.2
    seed: int = 1337
    seeds: tuple[int, int] = SEEDS
    cross: bool = False
    adam_share: float | None = None
    rate: float | None = None
    unique: float | None = None

    @cached_property
    def family(self) -> Family:
        parts = (self.base, self.vocab_size, self.sequence_length, self.size, self.aspect)
        return Family(*parts)

    def per_token(self, model: ModelConfig) -> dict[str, float]:
        """FLOPs of training, by each convention."""
        length = self.sequence_length
        return {
            "causal": flops_per_token(model, length, causal=True),
            "full": flops_per_token(model, length),
            "6nd": flops_6n(model),
        }

    def centre(self, budget: float, ratio: float = RATIO) -> float:
        """N with D = ratio N at this budget, by exact FLOPs."""
        n = math.sqrt(budget / (6 * ratio))
        for _ in range(12):
            (shape,) = self.family.nearest([n])
            per = self.per_token(shape.model)[self.cost] / shape.parameters
            n = math.sqrt(budget / (ratio * per))
        return n
