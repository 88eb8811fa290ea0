"""How sure a design makes a prediction, before anything is spent: it is run on made-up surfaces.

    surface      a Chinchilla law, its parameters scattered around published ones
    runs         the design's (N, D, C), later stages as drafted; off by seed noise (less at more
                 compute) and by the learning rate (to one side, half of it common to a budget)
    truth        beyond the dearest run it leaves the law by some per cent a decade
    answer       the fit and its interval at the target, as `study fit` makes them

Invariant: nothing that the answer is made from knows the surface; and what is assumed of the noise
is a field of Assumptions, to be put right by the seeds and crosses of the study (noise.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from forescale.errors import UserError
from forescale.scaling.design.plan import Plan
from forescale.scaling.design.shapes import Common
from forescale.scaling.fitting.backtest import BELIEF, PRIOR, Discrepancy, sure
from forescale.scaling.fitting.laws import CHINCHILLA
from forescale.scaling.fitting.objective import Objective
from forescale.scaling.fitting.points import Array, Points, near_best

# Besiroglu et al. 2024, arXiv 2404.10102: the refit of Hoffmann et al. 2022.
PUBLISHED = {"A": 482.01, "B": 2085.43, "E": 1.8172, "alpha": 0.3478, "beta": 0.3658}
CENTRE = 1e18  # FLOPs at which the noise is told
_LEAST = 5  # different (N, D): as many as the law has parameters
_LEVELS = (0.5, 0.9)


@dataclass(frozen=True)
class Assumptions:
    """law: published parameters that surfaces scatter around, by `scatter` (standard deviation of
    the logarithm of E, of both exponents and of what each term is at the middle of the design).
    noise: of a run that is new in its seeds, standard deviation of log loss at 1e18 FLOPs (CENTRE),
    C^-fading from there, never less than `floor`; gap: typical size of what is lost to an untuned
    learning rate, log loss; discrepancy: log loss a decade beyond the runs. But for the discrepancy
    (rollouts.PRIOR) the numbers are guesses, of the size of what public studies scatter by."""

    law: Mapping[str, float] = field(default_factory=lambda: PUBLISHED)
    scatter: float = 0.1
    noise: float = 2e-3
    fading: float = 0.1
    floor: float = 5e-4
    gap: float = 2e-3
    discrepancy: float = PRIOR

    def seed_noise(self, flops: Array) -> Array:
        return np.maximum(self.floor, self.noise * (flops / CENTRE) ** -self.fading)


@dataclass(frozen=True)
class Design:
    """What the simulation reads of a plan: (n,) each. budgets: FLOPs, or None for a ladder."""

    parameters: Array
    tokens: Array
    flops: Array
    budgets: Array | None = None

    @classmethod
    def of(cls, plan: Plan) -> "Design":
        """Its grid cells: the others tune and measure, and are no runs of the fit."""
        cells = [c for c in plan.cells if c.role == "grid"]
        columns = [(c.shape.parameters, c.tokens, c.flops[plan.common.cost]) for c in cells]
        n, d, f = np.array(columns, dtype=float).T
        budgets = [c.budget for c in cells if c.budget is not None]
        return cls(n, d, f, np.array(budgets) if len(budgets) == len(cells) else None)


@dataclass(frozen=True)
class Target:
    """A run to come, by the design's conventions."""

    parameters: float
    tokens: float
    flops: float

    @classmethod
    def of(
        cls,
        common: Common,
        flops: float | None = None,
        parameters: float | None = None,
        tokens: float | None = None,
        device_hours: float | None = None,
    ) -> "Target":
        """Of C (or device-hours, at the rate of the machine), with D/N = 20 where it is thought
        best; or of N and D. Raises UserError for anything else."""
        if device_hours is not None and common.rate is not None and flops is None:
            flops = device_hours * 3600 * common.rate
        if flops is not None and parameters is None and tokens is None:
            (shape,) = common.family.nearest([common.centre(flops)])
            tokens = flops / common.per_token(shape.model)[common.cost]
            return cls(shape.parameters, tokens, flops)
        if parameters is None or tokens is None or flops is not None:
            todo = (
                "give flops, or parameters and tokens, or device-hours on a machine of known rate"
            )
            raise UserError("target", "names no run", todo)
        shape = common.family.solve(parameters)
        return cls(parameters, tokens, tokens * common.per_token(shape.model)[common.cost])


@dataclass(frozen=True)
class Expected:
    """Of the interval at the target. half: median half-width in log loss by level (0.5: 0.01 is
    "± 1 % at 50 %"); coverage: share of draws whose truth was inside; error: median size of
    what the fit itself was off by, log loss; bare: the same half-widths without discrepancy: what
    more runs would narrow; beyond: the target's compute over the dearest run's; failed: draws whose
    runs could not tell the law."""

    half: dict[float, float]
    coverage: dict[float, float]
    error: float
    bare: dict[float, float]
    beyond: float
    draws: int
    failed: int


def expected(
    design: Design,
    target: Target,
    assumptions: Assumptions | None = None,
    draws: int = 40,
    seed: int = 0,
    near: float | None = 0.04,
    bootstraps: int = 60,
) -> Expected:
    """near: runs that the law is fitted to, as `study fit` has it (only where there are budgets).
    Raises UserError for too few runs, and where most draws fail."""
    if len({*zip(design.parameters.tolist(), design.tokens.tolist(), strict=True)}) < _LEAST:
        todo = f"plan {_LEAST} or more"
        raise UserError("design", f"{len(design.flops)} runs can't tell the law", todo)
    told, rng = assumptions or Assumptions(), np.random.default_rng(seed)
    at = {"parameters": np.array([target.parameters]), "tokens": np.array([target.tokens])}
    flops, greatest = np.array([target.flops]), float(design.flops.max())
    decades = max(0.0, float(np.log10(target.flops / greatest)))
    rows = []
    for draw in range(draws):
        law = _law(told, design, rng)
        loss = _losses(told, design, law, rng)
        # How much a law is off is not known but by a prior worth BELIEF origins: Student's t.
        off = told.discrepancy * decades * rng.standard_t(BELIEF)
        noise = told.seed_noise(flops)[0] * rng.standard_normal()
        truth = float(np.log(CHINCHILLA.predict(law, **at)[0]) + off + noise)
        try:
            rows.append(_answer(design, loss, near, bootstraps, draw, at, flops, truth))
        except UserError:
            continue
    if len(rows) * 2 < draws:
        what = f"in {draws - len(rows)} of {draws} draws its runs could not tell the law"
        raise UserError("design", what, "plan more sizes and budgets, further apart")
    found = np.array(rows)
    return Expected(
        half=dict(zip(_LEVELS, np.median(found[:, 0:2], axis=0).tolist(), strict=True)),
        coverage=dict(zip(_LEVELS, found[:, 2:4].mean(0).tolist(), strict=True)),
        error=float(np.median(found[:, 4])),
        bare=dict(zip(_LEVELS, np.median(found[:, 5:7], axis=0).tolist(), strict=True)),
        beyond=target.flops / greatest,
        draws=draws,
        failed=draws - len(rows),
    )


def _law(told: Assumptions, design: Design, rng: np.random.Generator) -> dict[str, float]:
    """A surface. The terms are scattered as they stand in the middle of the design: scattered as
    published, at one parameter, they would move with the exponents."""
    scatter = dict(zip(told.law, np.exp(told.scatter * rng.standard_normal(5)), strict=True))
    law = {s: told.law[s] * scatter[s] for s in told.law}
    for term, exponent, column in (("A", "alpha", "parameters"), ("B", "beta", "tokens")):
        middle = float(np.log(getattr(design, column)).mean())
        law[term] *= float(np.exp((law[exponent] - told.law[exponent]) * middle))
    return law


def _losses(
    told: Assumptions, design: Design, law: Mapping[str, float], rng: np.random.Generator
) -> Array:
    """(n,) of the runs."""
    n = len(design.flops)
    groups = design.parameters if design.budgets is None else design.budgets
    place = np.unique(groups, return_inverse=True)[1]
    common = np.abs(rng.standard_normal(place.max() + 1))[place]
    gap = told.gap * (common + np.abs(rng.standard_normal(n))) / 2
    noise = told.seed_noise(design.flops) * rng.standard_normal(n)
    pure = CHINCHILLA.predict(law, parameters=design.parameters, tokens=design.tokens)
    return pure * np.exp(gap + noise)


def _answer(
    design: Design,
    loss: Array,
    near: float | None,
    bootstraps: int,
    seed: int,
    at: Mapping[str, Array],
    flops: Array,
    truth: float,
) -> Sequence[float]:
    """Of one draw: half-widths, whether the truth is inside, the error, bare half-widths."""
    points = Points(loss, design.parameters, design.tokens, design.flops)
    if design.budgets is not None:
        points = points.take(near_best(loss, design.budgets, near))
    law = sure(CHINCHILLA, points, Objective(), bootstraps, seed, Discrepancy())
    bare = replace(law, discrepancy=Discrepancy(0.0))
    answers = [[np.log(s.interval(dict(at), flops, x)) for x in _LEVELS] for s in (law, bare)]
    halves = [[float(high[0] - low[0]) / 2 for low, high in each] for each in answers]
    inside = [float(low[0] <= truth <= high[0]) for low, high in answers[0]]
    error = abs(float(np.log(law.fit.predict(**at)[0])) - truth)
    return [*halves[0], *inside, error, *halves[1]]
