"""The search for a recipe's size and settings at one budget, by the same number of runs for each.

    a trial    a size, and settings as factors of the study's rules; a run of the whole budget
    a round    one of them varied around the best trial so far, all else held: its neighbours, and
               one more beyond an edge while extra runs are left
    the end    runs that are left vary size and rate again, by ever smaller factors

Invariant: a pure function of the losses, so that a killed study goes on as it would have. A best
value has worse ones on both sides, or stands in `edges`. No round sees a later one's runs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle
from typing import Literal, get_args

from forescale.ground.typed import Positive
from forescale.scaling.design.tuning import tuned

Dial = Literal["tables", "scalars", "batch", "warmup", "decay"]
DIALS: tuple[Dial, ...] = get_args(Dial)
# Between neighbours of the first round of each. A rate of tables may be far from that of matrices.
_FACTORS = {"rate": 2.0, "tables": 4.0, "scalars": 4.0, "batch": 2.0, "warmup": 2.0, "decay": 2.0}
_SMOOTH = ("size", "rate")  # the minimum of their parabola is taken; of others, the best run
_LINE = 3  # values of a round, except for sizes


@dataclass(frozen=True)
class Trial:
    """What a search varies. size: N of the base's model with these layers and width; rate, batch,
    warmup, decay: factors of the study's rules; tables, scalars: their learning rate over that of
    the hidden matrices, None where nothing sets it."""

    size: Positive
    rate: Positive = 1.0
    tables: Positive | None = None
    scalars: Positive | None = None
    batch: Positive = 1.0
    warmup: Positive = 1.0
    decay: Positive = 1.0


@dataclass
class Search:
    """A search as far as its runs have ended.

    start: the first trial; rounds: size, rate or a dial, in order; sizes: tried in the first round
    of sizes, an odd number, a factor of `apart` from one to the next; most: its runs, of which
    `extra` are for edges; losses: of the runs so far; exists: whether there is such a run.

    pending: the runs that come next, none once it has ended; best: the best trial, of which size
    and rate may lie between those of runs; edges: what was best at the end of its tried values.
    """

    start: Trial
    rounds: Sequence[str]
    sizes: int
    apart: float
    most: int
    extra: int
    losses: Mapping[Trial, float]
    exists: Callable[[Trial], bool] = lambda trial: True
    pending: list[Trial] = field(default_factory=list)
    runs: dict[Trial, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.best, self._left = self.start, self.most
        self._inside, self._steps = dict[str, bool](), {**_FACTORS, "size": self.apart}
        again = cycle(["size", "rate"] if "size" in self.rounds else ["rate"])
        for name in self.rounds:
            if not self._round(name):
                return
        while self._left and self._round(next(again)):
            pass

    @property
    def edges(self) -> tuple[str, ...]:
        """What was best at the end of its tried values."""
        return tuple(name for name, is_inside in self._inside.items() if not is_inside)

    @property
    def has_loss(self) -> bool:
        """True if a run has a finite loss."""
        return any(map(math.isfinite, self.runs.values()))

    def _round(self, name: str) -> bool:
        """Vary one setting around the best trial. Return False if runs are pending."""
        factor = self._steps[name]
        self._steps[name] = math.sqrt(factor)  # the next round of it is finer
        is_first = name not in self._inside
        half = (self.sizes if name == "size" and is_first else _LINE) // 2
        value = getattr(self.best, name)
        nearest = sorted(range(-half, half + 1), key=abs)
        if not self._run([replace(self.best, **{name: value * factor**k}) for k in nearest]):
            return False
        while True:
            held = replace(self.best, **{name: value})
            line = {getattr(t, name): loss for t, loss in self.runs.items()
                    if replace(t, **{name: value}) == held}  # fmt: skip
            if len(line) < _LINE and not is_first:  # no runs were left for its neighbours
                return True
            optimum = tuned([*line], [*line.values()])
            # Of equal ones the value so far: warm-ups may round to the same steps.
            lowest = min(line, key=lambda v: (not math.isfinite(line[v]), line[v], v != value))
            is_inside = optimum.inside or (lowest == value and min(line) < value < max(line))
            beyond = optimum.next_rate(factor)
            if is_inside or beyond is None or not self.extra or not self._left:
                break
            self.extra -= 1
            if not self._run([replace(self.best, **{name: beyond})]):
                return False
        self._inside[name] = is_inside
        at = optimum.learning_rate if name in _SMOOTH and optimum.inside else lowest
        self.best = replace(self.best, **{name: at})
        return True

    def _run(self, trials: Sequence[Trial]) -> bool:
        """Take the losses of these trials. Return False if some of them have still to run."""
        new = [t for t in trials if t not in self.runs]
        self.runs |= {t: math.inf for t in new if not self.exists(t)}
        new = [t for t in new if t not in self.runs][: self._left]
        self._left -= len(new)
        self.pending = [t for t in new if t not in self.losses]
        self.runs |= {t: self.losses[t] for t in new if t in self.losses}
        return not self.pending
