"""A study of mixtures: small runs over the simplex of shares, larger ones that check the answer.

    stage 1   `plan.points` mixtures: the current one, the uniform one, one near each corner, and
              others that fill the space between them; all of one size and length. The current one
              has three learning rates, which all others wait for, and repeats with other seeds
    stage 2   a draft without cells: the predicted best mixture and the current one, at plan.step
              times the compute, with the same seeds for both

Invariant: the same keys give the same mixtures. Shares have four decimals and sum to 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from forescale.config.compose import compose
from forescale.config.train import TrainJob
from forescale.ground.errors import UserError
from forescale.run.start import open_sources
from forescale.scaling.config import PlanKeys, StudyJob
from forescale.scaling.design.cells import FACTOR, RATES, Cell, make_cell
from forescale.scaling.design.plan import EXTRA_RATES, StudyPlan, StudyStage
from forescale.scaling.design.shapes import Common
from forescale.scaling.fitting.mixing import BEST, CURRENT, rounded_shares
from forescale.scaling.fitting.points import Array

_ROUNDING = 0.97  # of the cap: runs round to whole steps
_DRAWS, _ROUNDS = 4000, 30  # of the design that fills the space
_FRESH = 1000  # added to the seed of runs that check the answer


def current_shares(keys: PlanKeys) -> dict[str, float]:
    """Return the share of each source in the data of all runs: data.weights, or by their sizes.
    Raises UserError for fewer than two sources, or for data whose shares change in a run."""
    data = compose(TrainJob, keys.shared).data
    if len(data.sources) < 2:
        todo = "give two or more after --: data=mixture 'data.sources={web: DIR, code: DIR}'"
        raise UserError("data.sources", f"has {len(data.sources)} sources to mix", todo)
    if data.stages:
        problem = "changes the shares within a run, which a study of mixtures sets itself"
        raise UserError("data.stages", problem, "leave it out")
    weights = data.weights or open_sources(data).default_weights()
    return rounded_shares({name: float(weights.get(name, 0.0)) for name in data.sources})


def mixtures(current: Sequence[float], number: int, least: float, seed: int) -> Array:
    """Return the shares of all runs, (number, S), the current ones first. least: of a source in
    all others.

    Those between are the centres of clusters of uniform draws, beside the fixed ones (fast flexible
    filling, Lekivetz and Jones 2015): they leave no large gap, and few of them are at the border.
    """
    sources = len(current)
    room = 1 - sources * least
    uniform, corners = np.full((1, sources), 1 / sources), least + room * np.eye(sources)
    fixed = np.concatenate((np.array([current]), uniform, corners))
    fixed = fixed[np.sort(np.unique(fixed.round(3), axis=0, return_index=True)[1])]
    rng = np.random.default_rng(seed)
    draws = least + room * rng.dirichlet(np.ones(sources), _DRAWS)
    centres = draws[: number - len(fixed)]
    for _ in range(_ROUNDS):
        every = np.concatenate((fixed, centres))
        owner = np.square(draws[:, None] - every).sum(-1).argmin(axis=1) - len(fixed)
        centres = np.stack([
            draws[owner == i].mean(axis=0) if (owner == i).any() else centre
            for i, centre in enumerate(centres)
        ]) if len(centres) else centres  # fmt: skip
    return np.concatenate((fixed, centres))


def mixtures_plan(job: StudyJob, common: Common) -> StudyPlan:
    """Return a plan of mixtures. Raises UserError if the data has fewer than two sources, if the
    points are too few for a law, or if there is no model of their budget."""
    keys, current = job.plan, current_shares(job.plan)
    if job.target.is_given:
        todo = "leave target.* out; the check at plan.step times the compute is a part of the plan"
        raise UserError("target", "is predicted by a law of one mixture", todo)
    if unknown := [name for name in job.goal if name not in current]:
        todo = f"use {', '.join(current)}"
        raise UserError("goal", f"{unknown[0]!r} is no source of data.sources", todo)
    least = 2 * len(current) + 2
    if keys.points < least:
        problem = f"{keys.points} mixtures of {len(current)} sources determine no law"
        raise UserError("plan.points", problem, f"write plan.points={least} or more")
    if keys.least * len(current) >= 1:
        problem = f"{keys.least:g} of each of {len(current)} sources leaves nothing to vary"
        raise UserError("plan.least", problem, f"give less than {1 / len(current):.2g}")
    small, large = common.seeds
    runs = keys.points + RATES - 1 + EXTRA_RATES + small - 1
    budget = _ROUNDING * (keys.cap or 0.0) / (runs + 2 * large * keys.step)
    try:
        cells = _points(common, keys, current, budget, job.seed)
    except UserError as e:
        problem = f"no run can be as small as {budget:.3g} FLOPs ({e.where}: {e.problem})"
        raise UserError("plan.cap", problem, "raise it, or plan fewer points") from None
    cost, check = sum(c.cost for c in cells), 2 * large * keys.step * budget / _ROUNDING
    high = cost + EXTRA_RATES * max(c.cost for c in cells)
    first = StudyStage(1, budget, tuple(cells), cost, high, exact=True)
    second = StudyStage(2, budget * keys.step, (), 0.0, check, exact=False)
    note = f"stage 2 has {large} seeds each of the predicted best mixture and of the current one"
    return StudyPlan("mixtures", common, (first, second), keys.cap or 0.0, notes=(note,))


def _points(
    common: Common, keys: PlanKeys, current: Mapping[str, float], budget: float, seed: int
) -> list[Cell]:
    """Return the cells of stage 1."""
    points = mixtures([*current.values()], keys.points, keys.least, seed)
    (shape,) = common.family.nearest([common.centre(budget, keys.ratio)])
    cells = [
        replace(make_cell(common, f"m{i:02d}", 1, shape, budget), weights=_weights(current, shares))
        for i, shares in enumerate(points)
    ]
    first = cells[0]
    sweep = [
        replace(first, name=f"{first.name}-lr-{label}", role="rate", rate_factor=by,
                learning_rate=first.learning_rate * by)
        for by, label in ((1 / FACTOR, "low"), (FACTOR, "high"))
    ]  # fmt: skip
    names = tuple(c.name for c in (first, *sweep))
    # Both seeds change at once, so that the noise of weights and data is measured together.
    seeds = [
        replace(first, name=f"{first.name}-seed{i}", role="seed", seed=first.seed + i)
        for i in range(1, common.seeds[0])
    ]
    return [first, *sweep, *(replace(c, waits_for=names) for c in (*cells[1:], *seeds))]


def _weights(names: Mapping[str, float], shares: Array) -> tuple[tuple[str, float], ...]:
    return tuple(rounded_shares(dict(zip(names, map(float, shares), strict=True))).items())


def check_cells(
    common: Common, keys: PlanKeys, stage: StudyStage, best: Mapping[str, float],
    current: Mapping[str, float],
) -> tuple[Cell, ...]:  # fmt: skip
    """Return the runs that check the answer: best and current mixture, with equal seeds."""
    budget = stage.budget or 0.0
    (shape,) = common.family.nearest([common.centre(budget, keys.ratio)])
    return tuple(
        replace(
            make_cell(common, f"check-{name}", stage.number, shape, budget, role="confirm",
                      suffix=f"-seed{i + 1}"),
            seed=common.seed + _FRESH + i, weights=tuple(shares.items()),
        )
        for name, shares in ((BEST, best), (CURRENT, current))
        for i in range(common.seeds[1])
    )  # fmt: skip
