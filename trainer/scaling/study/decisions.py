"""Decides from the results so far: learning rates, the next stage, forecasts, winners.

    a sweep ended   best rate at an edge -> one more rate on that side, within the stage's cost
                    (rates_added); else the learning rates of the cells that wait (rates_chosen)
    a law's stage   N* of the parabolas so far -> its sizes, and the rule of its rates; of a budget
                    without a vertex the best run counts, and it is said, so that sizes move
                    towards an optimum beyond them, by up to plan.spread a budget;
                    the law of all runs so far -> a forecast of each of its runs
    of recipes      recipe_decisions.py
    of mixtures     once all small runs have ended, larger ones at the best shares by the law, and
                    at the current ones (weights_chosen)

Invariant: `advance` makes every decision that is due, and none twice; the same results give the
same plan even if the process was killed in between. A forecast is written before its run can start.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd

from forescale.ground.errors import UserError
from forescale.scaling.analysis.forecast import read_forecasts, write_forecast
from forescale.scaling.analysis.mixture_fit import MixtureFit
from forescale.scaling.analysis.prediction import run_of
from forescale.scaling.analysis.selection import law_of
from forescale.scaling.config import StudyJob, TargetPoint
from forescale.scaling.design.cells import Cell, make_cell
from forescale.scaling.design.mixtures import check_cells
from forescale.scaling.design.next_runs import NextRun
from forescale.scaling.design.noise import noise_of
from forescale.scaling.design.pilot import PILOT, with_batch
from forescale.scaling.design.plan import EXTRA_RATES, StudyPlan, StudyStage, extra_rates
from forescale.scaling.design.shapes import Rule
from forescale.scaling.design.simulate import RunSet, expected
from forescale.scaling.design.tuning import (
    RateBatchResponse,
    best_rates,
    rate_batch_response,
    updated_rule,
)
from forescale.scaling.fitting.isoflop import Refusal, Vertex, vertex
from forescale.scaling.study.contradiction import ask_if_contradicted
from forescale.scaling.study.directory import TARGET, Study
from forescale.scaling.study.recipe_decisions import (
    NO_LOSS,
    Log,
    are_recipes_due,
    decide_recipes,
    no_rate,
    plan_fresh,
    tune_recipe,
)

_SLOPE, _SLOPES = 0.5, (0.3, 0.7)  # exponent of N*(C): before two budgets give one; its limits


@dataclass(frozen=True)
class _Kind:
    """What a kind of study decides in its own way. is_due: whether a draft stage can be decided;
    decide: makes it exact; after: runs for each exact stage; tune: goes on with a
    sweep or search."""

    is_due: Callable[[Study, StudyStage], bool]
    decide: Callable[[Study, StudyStage, Log], None]
    after: Callable[[Study, StudyStage, Log], None]
    tune: Callable[[Study, int, str, Log], None]


def advance(study: Study, log: Log, goes_on: Callable[[str], bool] = lambda _: True) -> None:
    """Make all decisions that are due. goes_on: answers whether to go on after a stage that
    contradicts its forecasts. Raises UserError if not, if the next stage doesn't fit under the cap,
    or if no learning rate gave a loss."""
    kind = _KINDS.get(study.plan.kind, _LAW)
    for number in [s.number for s in study.plan.stages]:
        stage = study.plan.stage(number)
        if not stage.exact:
            if not kind.is_due(study, stage):
                return
            kind.decide(study, stage, log)
        for recipe in study.plan.stage(number).untuned:
            kind.tune(study, number, recipe, log)
        kind.after(study, study.plan.stage(number), log)
        ask_if_contradicted(study, study.plan.stage(number), goes_on, log)


def _tune(study: Study, number: int, recipe: str, log: Log) -> None:
    """Add learning rates to a sweep that has ended, or set those of the cells that wait for it. An
    excluded run counts as no result, but as one of the extra rates. recipe: "", of a law. Raises
    UserError if no rate gave a loss."""
    stage, losses = study.plan.stage(number), study.losses()
    swept = stage.sweep(recipe)
    if not {c.name for c in swept} <= set(losses):
        return
    excluded = study.excluded()
    runs = [
        (c.shape.parameters, c.learning_rate, losses[c.name])
        for c in swept
        if c.name not in excluded
    ]
    sizes = {c.shape.parameters for c in swept}
    best, gap = best_rates(runs)
    cells = extra_rates(swept, best, EXTRA_RATES, stage.high - stage.cost)
    if cells and sizes == {n for n, _, _ in runs}:
        names = [c.name for c in cells]
        plan = study.plan.with_stage(stage.with_extra_rates(recipe, cells))
        study.revise(plan, "rates_added", stage=number, cells=names)
        log(
            f"Stage {number}: the best learning rate is at an edge of its sweep; added "
            f"{', '.join(names)}."
        )
        return
    if sizes - {n for n, _, loss in runs if math.isfinite(loss)}:
        is_excluded = sizes - {n for n, _, _ in runs}
        why = "each of its learning rates is excluded" if is_excluded else NO_LOSS
        raise no_rate(study, number, f"has no learning rate: {why}")
    edges = [n for n, tuned in best.items() if not tuned.inside]
    rates = {str(n): tuned.learning_rate for n, tuned in best.items()}
    facts = {"recipe": recipe, "rates": rates, "gap": gap, "edges": edges}
    plan = study.plan.with_stage(stage.with_rates(recipe, best, gap))
    study.revise(plan, "rates_chosen", stage=number, **facts)
    texts = ", ".join(f"{tuned.learning_rate:.2g} at N={n:,}" for n, tuned in best.items())
    log(f"Stage {number}: best learning rates {texts}; tuning gap at most {gap:.2%}.")
    for n in edges:
        log(f"Note: at N={n:,} the best learning rate is at the edge of its sweep, not an optimum.")


def _decide_check(study: Study, stage: StudyStage, log: Log) -> None:
    """Make the draft exact: runs of the best and of the current mixture. Raises UserError if the
    small runs determine no law, or if the stage doesn't fit under the cap."""
    fit, plan = MixtureFit(study.table(), study.job, str(study.folder)), study.plan
    current = dict(plan.stage(1).cells[0].weights)
    common = replace(plan.common, rule=rule_of(plan))
    cells = check_cells(common, study.job.plan, stage, fit.best, current)
    cost = sum(c.cost for c in cells)
    exact = replace(stage, cells=cells, low=cost, high=cost, exact=True)
    study.revise(plan.with_exact(exact), "weights_chosen", stage=stage.number, weights=fit.best)
    shares = ", ".join(f"{name} {share:.1%}" for name, share in fit.best.items())
    log(f"The best shares by the {fit.law.name} law: {shares}. Larger runs check them.")


def _is_law_due(study: Study, stage: StudyStage) -> bool:
    """True once all cells of earlier stages have ended."""
    return all(s.has_ended for s in study.states() if s.cell.stage < stage.number)


def _centre(study: Study, stage: StudyStage, log: Log) -> None:
    """Make a draft stage exact by the results so far; write the forecasts of its runs first."""
    table = study.table()
    say_if_no_vertex(table, study.job, log)
    best = optimum(table, study.job)
    plan = _after_pilot(study, log) if stage.number == PILOT + 1 else study.plan
    plan = plan.centre_next_stage(best, rule_of(plan))
    measured = any(e["kind"] == "noise_measured" for e in study.events)
    if study.job.target.is_given and stage.number > PILOT + 1 and not measured:
        _measure_noise(study, table, log)
    middle = best(stage.budget or 0.0)
    grid = [c for c in plan.stage(stage.number).cells if c.role == "grid"]
    sizes = [c.shape.parameters for c in grid]
    log(
        f"Stage {stage.number}: {stage.budget:.3g} FLOPs, sizes from N={min(sizes):,} to "
        f"{max(sizes):,}; the optimum so far is N={middle:,.0f}."
    )
    forecast_cells(study, table, grid, log)
    study.revise(plan, "stage_centred", stage=stage.number, centre=middle)


def _after_pilot(study: Study, log: Log) -> StudyPlan:
    """Return the plan with the batch and learning rates that its pilot found."""
    plan, stages = study.plan, [s for s in study.plan.stages if s.number == PILOT]
    for stage in stages:
        common = replace(plan.common, rule=_fitted(plan.common.rule, stages))
        if measured := _response(study, stage):
            middle = next(c for c in stage.cells if c.name == measured[0])
            common, batch = with_batch(common, middle, measured[1]), measured[1].batch
            log(
                f"The pilot found a batch of {batch:.3g} windows where the rule has "
                f"{middle.global_batch}: all later ones are {batch / middle.global_batch:.2g} "
                "times the rule's."
            )
        plan = replace(plan, common=common)
    return plan


def _measure_response(study: Study, stage: StudyStage, log: Log) -> None:
    """Record the best batch and learning rate once all cells of the batch sweep have ended."""
    events = [e for e in study.events if e["kind"] == "response_measured"]
    is_known = stage.number in [e.get("stage") for e in events]
    if is_known or (measured := _response(study, stage)) is None:
        return
    cell, response = measured
    study.event("response_measured", stage=stage.number, cell=cell, **asdict(response))
    best = f"learning rate {response.learning_rate:.2g} with batch {response.batch:.3g}"
    if response.inside:
        log(f"Stage {stage.number}: the best of the runs like {cell} is {best}.")
        return
    edges = ", ".join(response.edges)
    log(f"Note: stage {stage.number}: {best} is best, but at an edge ({edges}), not an optimum.")


def _response(study: Study, stage: StudyStage) -> tuple[str, RateBatchResponse] | None:
    """Return the cell whose batch a stage varies, and its best batch and learning rate; None
    without such runs, or before they have ended."""
    tried = [c for c in stage.cells if c.role in ("batch", "rate-batch")]
    cells = [c for c in stage.cells if tried and c.name == tried[0].cell_of] + tried
    losses = study.losses()
    if not tried or not {c.name for c in cells} <= set(losses):
        return None
    runs = [(c.learning_rate, float(c.global_batch), losses[c.name]) for c in cells]
    return cells[0].name, rate_batch_response(*zip(*runs, strict=True))


def _measure_noise(study: Study, table: pd.DataFrame, log: Log) -> None:
    """Record the noise that the first stage measured, and the precision of the prediction with it
    in place of the assumed noise."""
    job, noise = study.job, noise_of(table, f"flops_{study.job.cost}")
    if noise.warning:
        log(f"Warning: {noise.warning}")
    target = RunSet.of_target(study.plan.common, job.target)
    try:
        design = RunSet.of(study.plan)
        precision = expected(design, target, noise.assumed(), seed=job.seed, near=job.near)
    except UserError as e:
        study.event("noise_measured", noise=asdict(noise), why=str(e))
        return
    study.event("noise_measured", noise=asdict(noise), expected=asdict(precision))
    levels = [f"{x.noise.sd:.2%} at {x.flops:.2g} FLOPs ({x.runs} runs)" for x in noise.levels]
    gap = "-" if noise.gap is None else f"{noise.gap:.2%}"
    log(
        f"Measured: seed noise {', '.join(levels) or '-'}; tuning gap {gap}. With these, the "
        f"expected prediction interval is ± {precision.half[0.5]:.1%} (50%), "
        f"± {precision.half[0.9]:.1%} (90%)."
    )


def add_runs(study: Study, choices: Sequence[NextRun], log: Log) -> None:
    """Add the chosen runs as one more stage, with the learning rates of the rule so far. The cap
    rises by their cost. A forecast of each is written first."""
    number, cells = len(study.plan.stages) + 1, list[Cell]()
    common = replace(study.plan.common, rule=rule_of(study.plan))
    for i, choice in enumerate(choices):
        shape = common.family.solve(choice.parameters)
        cells.append(make_cell(common, f"s{number}-next{i}", number, shape, tokens=choice.tokens))
    forecast_cells(study, study.table(), cells, log)
    cost = sum(c.cost for c in cells)
    stage = StudyStage(number, None, tuple(cells), cost, cost, exact=True)
    plan = replace(study.plan.with_stage(stage), cap=study.plan.cap + cost)
    study.revise(plan, "runs_added", stage=number, cells=[c.name for c in cells], cap=plan.cap)


def forecast_cells(study: Study, table: pd.DataFrame, cells: Sequence[Cell], log: Log) -> None:
    """Write a forecast of each of these cells that has none; if the runs so far determine no law,
    log that."""
    known = {f.facts["target"]["run"] for f in read_forecasts(study.forecasts)}
    cells = [c for c in cells if c.name not in known]
    if not cells:
        return
    fitted = table[table["fitted"]]
    if "budget" in fitted and fitted["budget"].nunique() < _BUDGETS:
        log("No forecasts yet: fewer than two budgets determine no law.")
        return
    try:
        law = law_of(table, study.job, f"{len(fitted)} runs of {study.folder}")
    except UserError as e:
        study.event("forecast_refused", why=str(e), runs=[c.name for c in cells])
        log(f"No forecasts: {e}")
        return
    for gain in law.gains:
        log(f"Warning: {gain}")
    count = 0
    for c in cells:
        flops = c.flops[study.plan.common.cost]
        unique = study.job.target.unique
        target = TargetPoint(float(c.shape.parameters), float(c.tokens), flops, unique=unique)
        try:
            write_forecast(law, study.forecasts, c.name, target)
            count += 1
        except UserError as e:  # such as a run that is already known
            study.event("forecast_refused", why=str(e), runs=[c.name])
            log(f"No forecast of {c.name}: {e}")
    log(f"Wrote forecasts of {count} runs to {study.forecasts}.")


def add_target(study: Study, log: Log) -> None:
    """Add the target as the last stage, and write its forecast. It has the given N and D, or the
    best ones for its compute. Its cost does not count against the cap. Raises UserError if no
    target is given, or if it can't be predicted."""
    t, common, table = study.job.target, study.plan.common, study.table()
    if not t.is_given:
        todo = "plan the study with target.flops, or with target.parameters and target.tokens"
        raise UserError("target", "is not given", todo)
    flops = t.flops or (t.device_hours or 0) * 3600 * (common.rate or 0)
    if t.parameters:
        shape = common.family.solve(t.parameters)
    else:  # by the parabolas if there are budgets, else by the law, as where more is given
        if "budget" in table and not (t.tokens or t.unique or t.served or t.most_parameters):
            best = optimum(table, study.job)(flops)
        else:
            law = law_of(table, study.job, f"{len(table)} runs of {study.folder}")
            _, best, _, flops = run_of(law, replace(t, flops=flops))
        (shape,) = common.family.nearest([best])
    tokens = t.tokens or flops / common.per_token(shape.model)[common.cost]
    ruled = replace(common, rule=rule_of(study.plan))
    number = len(study.plan.stages) + 1
    cell = make_cell(ruled, TARGET, number, shape, tokens=tokens, role="target")
    forecast_cells(study, table, [cell], log)
    if not any(c.facts["target"]["run"] == TARGET for c in read_forecasts(study.forecasts)):
        problem = "has no forecast, so it is not trained"
        raise UserError("target", problem, "see the reason above")
    stage = StudyStage(number, None, (cell,), cell.cost, cell.cost, exact=True)
    study.revise(study.plan.with_stage(stage), "target_added", stage=number, cell=cell.name)


def optimum(table: pd.DataFrame, job: StudyJob) -> Callable[[float], float]:
    """Return N*(C), a power law through the vertices of the budgets' parabolas. Its exponent is
    fitted once there are two budgets. Without a valid parabola, the best run of the budget
    counts."""
    best = {
        budget: at.parameters if isinstance(at, Vertex) else lowest
        for budget, at, lowest in _vertices(table, job)
    }
    c, n = np.log(list(best)), np.log(list(best.values()))
    slope = _SLOPE
    if len(best) > 1:
        slope = float(np.clip(np.polyfit(c, n, 1)[0], *_SLOPES))
    level = float(np.mean(n - slope * c))
    return lambda flops: float(np.exp(level + slope * math.log(flops)))


def _vertices(
    table: pd.DataFrame, job: StudyJob
) -> Iterator[tuple[float, Vertex | Refusal, float]]:
    """Yield each budget, the vertex of its parabola or the refusal, and N of its best run."""
    runs = table[table["fitted"]]
    if runs.empty:  # before the first budget of the law: the pilot
        swept = table[table["role"].isin(("pilot", "rate"))]
        runs = table.loc[swept.groupby("cell_of")["loss"].idxmin()]
    for budget, rows in runs.groupby("budget"):
        n, d = (np.log(rows[c].to_numpy(dtype=float)) for c in (f"parameters_{job.size}", "tokens"))
        losses, spent = rows["loss"].to_numpy(), rows[f"flops_{job.cost}"].to_numpy()
        at = vertex(float(budget), n, d, losses, spent)
        yield float(budget), at, float(np.exp(n[np.argmin(losses)]))


def say_if_no_vertex(table: pd.DataFrame, job: StudyJob, log: Log) -> None:
    """Log that the largest budget so far shows no optimum of N, and where the next sizes are."""
    *_, (budget, at, lowest) = _vertices(table, job)
    if isinstance(at, Refusal):
        log(
            f"Note: {budget:.3g} FLOPs show no optimum of N: {at.why}. The next sizes are around "
            f"its best run, N={lowest:,.0f}."
        )


def rule_of(plan: StudyPlan) -> Rule:
    """Return the rule for batch and learning rate, fitted to all sweeps of the law that have
    ended. The plan's own rule knows those of the pilot, which had other batches."""
    return _fitted(plan.common.rule, [s for s in plan.stages if s.number > PILOT])


def _fitted(rule: Rule, stages: Sequence[StudyStage]) -> Rule:
    """Return the rule, fitted to the sweeps of these stages that have ended."""
    rates = list[tuple[float, float, float]]()
    for stage in stages:
        grid = {c.shape.parameters: c for c in stage.cells if c.role in ("grid", "pilot")}
        for n, tuned in stage.tuned:
            size = grid[n].shape.counts.non_embedding
            rates.append((size, grid[n].tokens, tuned.learning_rate))
    return updated_rule(rule, rates)


_LAW = _Kind(_is_law_due, _centre, _measure_response, _tune)
_KINDS = {
    "recipes": _Kind(are_recipes_due, decide_recipes, plan_fresh, tune_recipe),
    "mixtures": _Kind(_is_law_due, _decide_check, lambda *_: None, _tune),
}


_BUDGETS = 2  # fewer budgets determine no law
