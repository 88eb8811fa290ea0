"""Simulates a design before anything is spent: how precise would its prediction be?

    law          Chinchilla laws, their parameters scattered around published ones
    runs         the design's (N, D, C), later stages as drafted; each loss has seed noise (less at
                 more compute) and an excess by its learning rate, half of it shared by a budget
    truth        beyond the most expensive run the loss leaves the law by some per cent per decade
    prediction   the fit and its interval at the target, made as `study fit` makes them

The prediction here is the law's, whereas `study fit` combines it with others if there are budgets,
on purpose: the truth is simulated as a law that is left by 2 % a decade, and the combination doubts
laws, so that it would be judged by what it is not made for. The width agrees with observation: on
the nine public tables of README.md the errors of the combination at the lowest losses are 2.6 % a
decade (root mean square, one and two budgets ahead; 0.7 to 4.5 % by table), those of the law 3.9 %.

Invariant: the fit never sees the simulated law. All assumed noise is a field of Assumptions, which
the study's own repeats and sweeps correct (noise.py).
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np

from forescale.ground.errors import UserError
from forescale.scaling.config import TargetPoint
from forescale.scaling.design.plan import StudyPlan
from forescale.scaling.design.shapes import Common
from forescale.scaling.fitting.laws import CHINCHILLA
from forescale.scaling.fitting.objective import Objective
from forescale.scaling.fitting.points import Array, Points, near_best
from forescale.scaling.forecasting.calibrated import fit_calibrated
from forescale.scaling.forecasting.predictor import BELIEF, PRIOR, Discrepancy

# Besiroglu et al. 2024, arXiv 2404.10102: the refit of Hoffmann et al. 2022.
PUBLISHED = {"A": 482.01, "B": 2085.43, "E": 1.8172, "alpha": 0.3478, "beta": 0.3658}
CENTRE = 1e18  # FLOPs at which the noise is given
_LEAST = 5  # different (N, D): as many as the law has parameters
_LEVELS = (0.5, 0.9)


@dataclass(frozen=True)
class Assumptions:
    """What is assumed of a study before its first results.

    law: published parameters that the simulated laws scatter around; scatter: standard deviation
    of log E, of both log exponents, and of the log of each term in the middle of the design.
    noise: standard deviation of log loss over new seeds, at 1e18 FLOPs (CENTRE); it falls as
    C^-fading from there, and is never less than `floor`.
    gap: typical excess of log loss by an untuned learning rate.
    discrepancy: log loss by which the law is off, per decade beyond the runs.
    All but the discrepancy (backtest.PRIOR) are guesses of the size seen in public studies.
    """

    law: Mapping[str, float] = field(default_factory=lambda: PUBLISHED)
    scatter: float = 0.1
    noise: float = 2e-3
    fading: float = 0.1
    floor: float = 5e-4
    gap: float = 2e-3
    discrepancy: float = PRIOR

    def seed_noise(self, flops: Array) -> Array:
        """Standard deviation of log loss over seeds, for each C."""
        return np.maximum(self.floor, self.noise * (flops / CENTRE) ** -self.fading)


@dataclass(frozen=True)
class RunSet:
    """N, D and C of n runs, (n,) each, without losses. budgets: FLOPs, None for a ladder."""

    parameters: Array
    tokens: Array
    flops: Array
    budgets: Array | None = None

    @classmethod
    def of(cls, plan: StudyPlan) -> "RunSet":
        """The grid cells of a plan; the law is not fitted to the others."""
        cells = [c for c in plan.cells if c.role == "grid"]
        columns = [(c.shape.parameters, c.tokens, c.flops[plan.common.cost]) for c in cells]
        n, d, f = np.array(columns, dtype=float).T
        budgets = [c.budget for c in cells if c.budget is not None]
        return cls(n, d, f, np.array(budgets) if len(budgets) == len(cells) else None)

    @classmethod
    def of_target(cls, common: Common, point: TargetPoint) -> "RunSet":
        """Return the run of C, or of device-hours at common.rate, with D/N = 20; or of N and D.
        Raises UserError for anything else."""
        flops, parameters, tokens = point.flops, point.parameters, point.tokens
        if point.device_hours is not None and common.rate is not None and flops is None:
            flops = point.device_hours * 3600 * common.rate
        if flops is not None and parameters is None and tokens is None:
            (shape,) = common.family.nearest([common.centre(flops)])
            parameters = shape.parameters
            tokens = flops / common.per_token(shape.model)[common.cost]
        elif parameters is not None and tokens is not None and flops is None:
            shape = common.family.solve(parameters)
            flops = tokens * common.per_token(shape.model)[common.cost]
        else:
            todo = "give flops, or parameters and tokens, or device_hours with plan.rate"
            raise UserError("target", "names no run", todo)
        return cls(*np.array([[parameters], [tokens], [flops]], dtype=float))


@dataclass(frozen=True)
class Expected:
    """How precise the simulated predictions of the target are.

    half: median half-width of the prediction interval in log loss, by level ({0.5: 0.01} is ± 1 %
    at 50 %); without_discrepancy: the same if the law held exactly, the part that more runs narrow.
    coverage: share of draws whose truth was inside, by level; error: median size of the fit's error
    in log loss.
    extrapolation_factor: the target's compute divided by the most expensive run's.
    failed: draws whose runs could not determine the law.
    """

    half: dict[float, float]
    coverage: dict[float, float]
    error: float
    without_discrepancy: dict[float, float]
    extrapolation_factor: float
    draws: int
    failed: int


def expected(
    design: RunSet,
    target: RunSet,
    assumptions: Assumptions | None = None,
    draws: int = 40,
    seed: int = 0,
    near: float | None = 0.04,
    bootstraps: int = 60,
) -> Expected:
    """Simulate the design `draws` times, and return how precise its predictions are. near: as the
    key of `study fit`; it applies only to runs with budgets. Raises UserError for too few runs, and
    if most draws fail."""
    if len({*zip(design.parameters.tolist(), design.tokens.tolist(), strict=True)}) < _LEAST:
        todo = f"plan {_LEAST} or more"
        raise UserError("design", f"{len(design.flops)} runs can't determine the law", todo)
    assumed, rng = assumptions or Assumptions(), np.random.default_rng(seed)
    at = {"parameters": target.parameters, "tokens": target.tokens}
    flops, factor = target.flops, float(target.flops[0] / design.flops.max())
    decades = max(0.0, float(np.log10(factor)))
    rows, errors = list[list[list[float]]](), list[float]()
    for draw in range(draws):
        law = _law(assumed, design, rng)
        loss = _losses(assumed, design, law, rng)
        # The size of the discrepancy is known only by a prior worth BELIEF backtests: Student's t.
        off = assumed.discrepancy * decades * rng.standard_t(BELIEF)
        noise = assumed.seed_noise(flops)[0] * rng.standard_normal()
        truth = float(np.log(CHINCHILLA.predict(law, **at)[0]) + off + noise)
        points = Points(loss, design.parameters, design.tokens, design.flops)
        if design.budgets is not None:
            points = points.take(near_best(loss, design.budgets, near))
        with suppress(UserError):
            fitted = fit_calibrated(
                CHINCHILLA, points, Objective(), bootstraps, draw, Discrepancy()
            )
            bare = replace(fitted, discrepancy=Discrepancy(0.0))
            predicted, exact = (each.predicted(dict(at), flops) for each in (fitted, bare))
            rows.append([[float(p.half(x)[0]) for x in _LEVELS] for p in (predicted, exact)])
            errors.append(abs(float(predicted.log_loss[0]) - truth))
    if len(rows) * 2 < draws:
        problem = f"in {draws - len(rows)} of {draws} draws its runs could not determine the law"
        raise UserError("design", problem, "plan more sizes and budgets, further apart")
    half, bare = np.array(rows).transpose(1, 0, 2)  # (draws, levels) each
    inside = np.array(errors)[:, None] <= half
    medians = np.median(half, axis=0), inside.mean(0), np.median(bare, axis=0)
    by_level = [dict(zip(_LEVELS, each.tolist(), strict=True)) for each in medians]
    return Expected(
        by_level[0], by_level[1], float(np.median(errors)), by_level[2], factor,
        draws, draws - len(rows),
    )  # fmt: skip


def _law(assumed: Assumptions, design: RunSet, rng: np.random.Generator) -> dict[str, float]:
    """One simulated law. Each term is scattered at the middle of the design; scattered as
    published, at N = 1 or D = 1, it would change with its exponent."""
    scatter = dict(zip(assumed.law, np.exp(assumed.scatter * rng.standard_normal(5)), strict=True))
    law = {s: assumed.law[s] * scatter[s] for s in assumed.law}
    for term, exponent, column in (("A", "alpha", "parameters"), ("B", "beta", "tokens")):
        middle = float(np.log(getattr(design, column)).mean())
        law[term] *= float(np.exp((law[exponent] - assumed.law[exponent]) * middle))
    return law


def _losses(
    assumed: Assumptions, design: RunSet, law: Mapping[str, float], rng: np.random.Generator
) -> Array:
    """The simulated losses of the runs, (n,)."""
    n = len(design.flops)
    groups = design.parameters if design.budgets is None else design.budgets
    place = np.unique(groups, return_inverse=True)[1]
    common = np.abs(rng.standard_normal(place.max() + 1))[place]
    gap = assumed.gap * (common + np.abs(rng.standard_normal(n))) / 2
    noise = assumed.seed_noise(design.flops) * rng.standard_normal(n)
    pure = CHINCHILLA.predict(law, parameters=design.parameters, tokens=design.tokens)
    return pure * np.exp(gap + noise)
