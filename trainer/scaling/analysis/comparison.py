"""Comparison of two recipes or datasets: how many times less compute reaches the same loss.

    path        how N and D grow with C: along each law's own optimum, or at the D/N of the target
    multiplier  m(L) = C_A(L) / C_B(L): A's compute for a loss over B's; above 1, B needs less
    range       the losses that both laws reach within the compute of their own runs
    interval    of log C_A and log C_B apart, from the resampled fits of each; of their difference
                by the square-and-add rule (Zou and Donner 2008, Statistics in Medicine 27)

Invariant: nothing is shared by the two sides, and exchanging them gives exactly 1 / m. Each side
counts C in its own way, so that a recipe pays for the FLOPs that it adds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from forescale.ground.errors import UserError
from forescale.scaling.analysis.ratio import Ratio, inverse, ratios
from forescale.scaling.analysis.selection import law_of
from forescale.scaling.analysis.table_fit import Prediction, StudyFit
from forescale.scaling.config import StudyJob
from forescale.scaling.fitting import laws
from forescale.scaling.fitting.forms import Form
from forescale.scaling.fitting.points import Array, spent
from forescale.scaling.records.records import HELD

BEYOND = 1e6  # compute is looked for up to this many times below and above the runs
_STEPS = 50  # of the bisection
GRID = 25  # losses of the range
_NEAR = 1e-6  # log C this near an end of where it is looked for is beyond it


@dataclass(frozen=True)
class LossPath:
    """The loss of a law as a function of C alone, and its inverse.

    per_token: FLOPs per parameter and token; ratio: D/N, or None for the law's own optimum;
    least, greatest: ends of log C between which the inverse is looked for. Raises UserError for a
    law whose optimum is no power law of C.
    """

    form: Form
    per_token: float
    ratio: float | None
    least: float
    greatest: float

    def log_loss(self, values: Array, log_c: Array) -> Array:
        """Return log loss, (R, m), by published parameters, (R, p), at log C, (m,) or (R, m)."""
        return self._log_loss(values, self._line(values), log_c)

    def log_compute(self, values: Array, loss: Array) -> Array:
        """Return log C at which each law has these losses, (R, m), for losses (m,).

        It is `least` or `greatest` where the law has the loss at no C between them.
        """
        shape, line = (len(values), len(loss)), self._line(values)
        low, high, aim = np.full(shape, self.least), np.full(shape, self.greatest), np.log(loss)
        for _ in range(_STEPS):
            middle = (low + high) / 2
            above = self._log_loss(values, line, middle) > aim
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        low[high >= self.greatest] = self.greatest  # never reached
        low[low <= self.least] = self.least
        return low

    def _log_loss(self, values: Array, line: tuple[Array, Array], log_c: Array) -> Array:
        if self.form.columns == ("flops",):
            return np.log(self.form.predict(values, flops=np.exp(log_c)))
        level, slope = line
        n, nd = np.exp(level + slope * log_c), np.exp(log_c - np.log(self.per_token))
        return np.log(self.form.predict(values, parameters=n, tokens=nd / n))

    def _line(self, values: Array) -> tuple[Array, Array]:
        """Return level and slope of log N = level + slope log C along the path, (R, 1) each."""
        ones = np.ones((len(values), 1))
        if self.form.columns == ("flops",):
            return ones, ones
        if self.ratio is not None:
            return -np.log(self.per_token * self.ratio) / 2 * ones, ones / 2
        middle = (self.least + self.greatest) / 2
        best, _ = laws.compute_optimal(self.form, values, np.exp(middle), self.per_token)
        slope = laws.allocation(self.form, values)[:, None]
        return np.log(best) - slope * middle, slope


@dataclass(frozen=True)
class Side:
    """One recipe or dataset: its name, its fit and the path of its law."""

    name: str
    study: StudyFit
    path: LossPath

    @property
    def ends(self) -> tuple[float, float]:
        """Return C of its cheapest and of its most expensive fitted run."""
        c = spent(self.study.points)
        return float(c.min()), float(c.max())

    @property
    def losses(self) -> tuple[float, float]:
        """Return the loss by the law at both ends: the highest and the lowest within its runs."""
        high, low = self.loss(np.array(self.ends))
        return float(high), float(low)

    def loss(self, flops: Array) -> Array:
        """Return the loss by the law at C, (m,)."""
        return np.exp(self.path.log_loss(self.study.fit.vector[None], np.log(flops))[0])

    def band(self, flops: Array) -> Array:
        """Return the interval of the loss from the resampled fits at C, (2, m)."""
        return np.exp(self.study.replicates.interval(
            self.study.job.level, lambda values: self.path.log_loss(values, np.log(flops))
        ))  # fmt: skip

    def flops(self, loss: Array) -> Array:
        """Return C at which the law has these losses, (m,); infinite for a loss it never has."""
        log_c = self.path.log_compute(self.study.fit.vector[None], loss)[0]
        return np.exp(np.where(log_c >= self.path.greatest - _NEAR, np.inf, log_c))

    def with_ends(self, of: Callable[[Array], Array]) -> Array:
        """Return what `of` gives for the fit's parameters, and the ends of its interval, (3, K)."""
        ends = self.study.replicates.interval(self.study.job.level, of)
        return np.vstack((of(self.study.fit.vector[None]), ends))


@dataclass(frozen=True)
class Place:
    """One loss at which both sides are compared.

    flops: C of A and of B for this loss; multiplier: of compute; loss_ratio: the loss of B over
    that of A at A's compute.
    """

    loss: float
    flops: tuple[float, float]
    multiplier: Ratio
    loss_ratio: Ratio


class Comparison:
    """Two fits compared.

    places: of the common range, from its highest loss to its lowest, none if the two have no loss
    in common; mean: the geometric mean of the multiplier over them; trend: the multiplier at the
    lowest loss over that at the highest; target: at the loss that A reaches with the target's
    compute; predictions: of both sides for the target.
    """

    def __init__(self, a: Side, b: Side):
        self.a, self.b, self.level = a, b, a.study.job.level
        self.mean: Ratio | None = None
        self.trend: Ratio | None = None
        self.target: Place | None = None
        self.predictions: tuple[Prediction, Prediction] | None = None
        high, low = min(a.losses[0], b.losses[0]), max(a.losses[1], b.losses[1])
        common = GRID if low < high else 0  # the highest and lowest loss that both reach
        losses = np.geomspace(high, low, GRID) if common else np.empty(0)
        one, other = a.study.predict(), b.study.predict()
        if one is not None and other is not None:
            self.predictions = one, other
            at_target = a.loss(np.array([one.extrapolation_factor * a.ends[1]]))
            losses = np.append(losses, at_target)
        if not len(losses):
            spans = [f"{s.name} goes from {s.losses[0]:.4g} to {s.losses[1]:.4g}" for s in (a, b)]
            problem = "no loss is reached by both within the compute of their runs: "
            todo = "add runs to one of them, or compare beyond the runs with target.flops="
            raise UserError(f"{a.name}, {b.name}", problem + ", ".join(spans), todo)
        places = self._compare(losses, common)
        self.places = places[:common]
        if self.predictions is not None:
            self.target = places[-1]

    def _compare(self, losses: Array, common: int) -> list[Place]:
        """Return a place for each loss, and fill in the mean and the trend. losses: (m,); common:
        the number of those of the common range, first."""
        weights = np.eye(len(losses))
        if common:
            mean = (np.arange(len(losses)) < common) / common
            weights = np.column_stack((weights, mean, weights[:, common - 1] - weights[:, 0]))

        def log_c(side: Side) -> Array:
            """Return log C at the losses, their mean and their trend, with both ends, (3, K)."""
            rows = side.with_ends(lambda v: side.path.log_compute(v, losses) @ weights)
            inside = rows[:, : len(losses)]
            inside[inside >= side.path.greatest - _NEAR] = np.inf
            inside[inside <= side.path.least + _NEAR] = -np.inf
            return rows

        def log_loss(side: Side) -> Array:
            return side.with_ends(lambda v: side.path.log_loss(v, np.log(flops[0])))

        flops = [side.flops(losses) for side in (self.a, self.b)]
        factors = ratios(*map(log_c, (self.a, self.b)))
        lost = ratios(*map(log_loss, (self.b, self.a)))
        if common:
            self.mean, self.trend = factors[-2:]
        return [
            Place(float(losses[i]), (float(flops[0][i]), float(flops[1][i])), factors[i], lost[i])
            for i in range(len(losses))
        ]

    @property
    def headline(self) -> Ratio:
        """Return the multiplier to quote: the mean over the range, or that at the target."""
        if self.mean is not None:
            return self.mean
        assert self.target is not None  # Comparison refuses to have neither
        return self.target.multiplier

    @property
    def crossing(self) -> float | None:
        """Return the loss at which the side that needs less compute changes; None if none is shown.

        It is shown if one end of the range has an interval above 1 and the other one below 1.
        """
        if not self.places:
            return None
        first, last = (place.multiplier for place in (self.places[0], self.places[-1]))
        if not (first.low > 1 > last.high or first.high < 1 < last.low):
            return None
        logs = np.log([(place.multiplier.value, place.loss) for place in self.places])
        order = np.argsort(logs[:, 0])
        return float(np.exp(np.interp(0.0, *logs[order].T)))

    @property
    def summary(self) -> str:
        """Return in a sentence what the range shows, or the target if there is no range."""
        if (loss := self.crossing) is None:
            return self.verdict(self.headline)
        above, below = self.b.name, self.a.name
        if self.places[0].multiplier.value < 1:
            above, below = below, above
        text = f"above a loss of {loss:.4g} {above} needs less compute, below {below}"
        return f"The two cross: {text}."

    @property
    def notes(self) -> list[str]:
        """Return what makes the comparison doubtful, as sentences."""
        a, b = sides = (self.a, self.b)
        one, other = a.study, b.study
        sentences = []
        if one.form is not other.form:
            laws_of = f"{one.form.name} for {a.name}, {other.form.name} for {b.name}"
            sentences.append(f"The laws differ: {laws_of}.")
        if one.points.convention != other.points.convention:
            ways = f"{one.points.convention}; {other.points.convention}"
            sentences.append(f"N or C are counted in different ways: {ways}.")
        if not all("loss_definition" in side.study.table for side in sides):
            sentences.append(
                "The tables don't say what their losses are measured on: the comparison holds only "
                "if it is the same text and the same tokenizer."
            )
        if self.target is not None and self.predictions is not None:
            is_lower = self.predictions[1].loss < self.predictions[0].loss
            if (self.target.multiplier.value > 1) != is_lower:
                sentences.append(
                    f"At the target the laws and the predictions disagree: {sides[is_lower].name} "
                    "is predicted the lower loss."
                )
            factors = [c / side.ends[1] for c, side in zip(self.target.flops, sides, strict=True)]
            if max(factors) > 1:
                sentences.append(
                    f"At the target the compute is {factors[0]:.2g} times {a.name}'s and "
                    f"{factors[1]:.2g} times {b.name}'s most expensive run: there the interval, of "
                    "resampled fits alone, leaves out the error of the laws themselves."
                )
        for side in sides:
            notes = (*side.study.doubts, *side.study.notes)
            sentences += [f"{side.name}: {note}" for note in notes]
        return sentences

    def verdict(self, ratio: Ratio) -> str:
        """Return in a sentence which side needs less compute, or that it isn't shown."""
        a, b, level = self.a.name, self.b.name, f"{self.level:.0%}"
        is_better = ratio.value > 1 and not ratio.includes_one
        factor = ratio if is_better else inverse(ratio)
        high = f"{factor.high:.3g}" if np.isfinite(factor.high) else "no upper end"
        ends = f"({level}: {factor.low:.3g} to {high})"
        if ratio.includes_one:
            return (
                f"{b} needs {factor.value:.3g} times {ends} the compute of {a} for the same loss. "
                f"The {level} interval includes 1: these runs don't show which needs less."
            )
        better, worse = (b, a) if is_better else (a, b)
        if factor.value == np.inf:
            return f"By its law, {worse} never reaches that loss; {better} does."
        return (
            f"{better} reaches the same loss with {factor.value:.3g} times less compute than "
            f"{worse} {ends}."
        )


def compare(tables: Sequence[tuple[str, pd.DataFrame, str]], job: StudyJob) -> Comparison:
    """Return the comparison of two tables: (name, records, their name in messages) each.

    The first is the reference, A. With both target.parameters and target.tokens all is compared at
    their D/N, otherwise along the optimum of each law. Raises UserError if the losses are not
    comparable, if a law can't be fitted, or if the two have no loss in common and no target.
    """
    for name in HELD:  # what must be equal for losses to be compared
        if all(name in table for _, table, _ in tables):
            one, other = (sorted(map(str, t[name].dropna().unique())) for _, t, _ in tables)
            if one != other and one and other:
                values = f"{name} is {', '.join(one)} and {', '.join(other)}"
                problem = f"losses are not comparable: {values}"
                raise UserError("study compare", problem, "compare runs that share it")
    t = job.target
    ratio = t.tokens / t.parameters if t.tokens and t.parameters else None
    sides = []
    for i, (name, table, where) in enumerate(tables):
        study = law_of(table, replace(job, seed=job.seed + i), where)
        try:
            if study.form.columns != ("flops",):
                laws.allocation(study.form, study.fit.vector)
        except UserError as e:
            todo = "compare with form=chinchilla, or another law of N and D"
            raise UserError(f"form={job.form}", e.problem, todo) from None
        c = spent(study.points)
        least, greatest = np.log(c.min() / BEYOND), np.log(c.max() * BEYOND)
        at_ratio = None if study.form.columns == ("flops",) else ratio
        path = LossPath(study.form, study.points.per_token, at_ratio, float(least), float(greatest))
        sides.append(Side(name, study, path))
    return Comparison(*sides)


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """Return the comparison as plain values, for JSON; what is 0 or unbounded is None."""

    def place(p: Place) -> dict[str, Any]:
        return {
            "loss": p.loss, "flops": [c if c < np.inf else None for c in p.flops],
            "multiplier": p.multiplier.as_dict(), "loss_ratio": p.loss_ratio.as_dict(),
        }  # fmt: skip

    return {
        "sides": [
            {"name": s.name, "runs": len(s.study.points), "form": s.study.form.name,
             "values": s.study.fit.values, "flops": list(s.ends)}
            for s in (comparison.a, comparison.b)
        ],
        "level": comparison.level,
        "tokens_per_parameter": comparison.a.path.ratio,
        "multiplier": comparison.headline.as_dict(),
        "crossing": comparison.crossing,
        "mean": comparison.mean and comparison.mean.as_dict(),
        "trend": comparison.trend and comparison.trend.as_dict(),
        "range": [place(p) for p in comparison.places],
        "target": None if comparison.target is None else place(comparison.target),
        "predictions": comparison.predictions and [vars(p) for p in comparison.predictions],
        "notes": comparison.notes,
    }  # fmt: skip
