"""Decides from the results so far: learning rates, the centre of the next budget, and forecasts.

    sweeps ended   best rate at an edge -> one more rate, as far as the cap allows (rates_added)
                   else the learning rates of the waiting cells (rates_chosen)
    stage ended    N* of its parabola -> the sizes of the next stage, and the rule of its rates;
                   the law of all runs so far -> a forecast of each of its runs

Invariant: `advance` makes every decision that is due, and none twice; the same results give the
same plan even if the process was killed in between. A forecast is written before its run can start.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import numpy as np
import pandas as pd

from forescale.errors import UserError
from forescale.scaling.analysis.forecast import read_forecasts, write_forecast
from forescale.scaling.analysis.prediction import run_of
from forescale.scaling.analysis.selection import law_of
from forescale.scaling.analysis.table_fit import StudyFit
from forescale.scaling.config import StudyJob, TargetPoint
from forescale.scaling.design.cells import Cell, make_cell
from forescale.scaling.design.next_runs import NextRun
from forescale.scaling.design.noise import noise_of
from forescale.scaling.design.plan import StudyPlan, StudyStage, extra_rates, with_chosen_rates
from forescale.scaling.design.shapes import Rule
from forescale.scaling.design.simulate import RunSet, Target, expected
from forescale.scaling.design.tuning import rate_batch_response, updated_rule
from forescale.scaling.fitting.isoflop import Vertex, vertex
from forescale.scaling.study.directory import TARGET, Study
from forescale.scaling.study.recipes import advance_recipes

_SLOPE, _SLOPES = 0.5, (0.3, 0.7)  # exponent of N*(C): before two budgets give one; its limits
_BUDGETS = 2  # fewer budgets determine no law

Log = Callable[[str], None]


def advance(study: Study, log: Log) -> None:
    """Make all decisions that are due. Raises UserError if the next stage doesn't fit under the
    cap, or if no learning rate of a size gave a loss."""
    if study.plan.recipes:
        advance_recipes(study, log)
        return
    losses = study.losses()
    for number in [s.number for s in study.plan.stages]:
        stage = next(s for s in study.plan.stages if s.number == number)
        before = [c.name for s in study.plan.stages if s.number < number for c in s.cells]
        if not stage.exact:
            if not set(before) <= set(losses):
                return
            _centre(study, stage, log)
            return
        swept = {name for c in stage.cells for name in c.waits_for}
        if swept and swept <= set(losses):
            _choose_rates(study, stage, losses, log)
        _measure_response(study, stage, losses, log)


def _choose_rates(study: Study, stage: StudyStage, losses: dict[str, float], log: Log) -> None:
    _expect_a_loss(stage, losses)
    if more := extra_rates(stage, losses, stage.high - stage.cost):
        names = tuple(c.name for c in more)
        cells = [
            replace(c, waits_for=(*c.waits_for, *names)) if c.waits_for else c for c in stage.cells
        ]
        wide = replace(stage, cells=(*cells, *more))
        study.revise(study.plan.with_stage(wide), "rates_added", stage=stage.number, cells=names)
        log(
            f"Stage {stage.number}: the best learning rate is at the edge of its sweep; added "
            f"{', '.join(names)}."
        )
        return
    made = with_chosen_rates(stage, losses)
    edges = [n for n, t in made.tuned if not t.inside]
    rates = {str(n): t.learning_rate for n, t in made.tuned}
    facts = {"rates": rates, "gap": made.gap, "edges": edges}
    study.revise(study.plan.with_stage(made), "rates_chosen", stage=stage.number, **facts)
    best = ", ".join(f"{t.learning_rate:.2g} at N={n:,}" for n, t in made.tuned)
    log(f"Stage {stage.number}: best learning rates {best}; tuning gap at most {made.gap:.2%}.")
    for n in edges:
        log(f"Note: at N={n:,} the best learning rate is at the edge of its sweep, not an optimum.")


def _measure_response(study: Study, stage: StudyStage, losses: dict[str, float], log: Log) -> None:
    """Record the best batch and learning rate once all cells of the batch sweep have ended."""
    tried = [c for c in stage.cells if c.role in ("batch", "rate-batch")]
    done = any(
        e["kind"] == "response_measured" and e["stage"] == stage.number for e in study.events
    )
    if not tried or done or not all(c.name in losses for c in tried):
        return
    cells = [c for c in stage.cells if c.name == tried[0].cell_of] + tried
    if cells[0].name not in losses:
        return
    values = [(c.learning_rate, float(c.global_batch), losses[c.name]) for c in cells]
    found = rate_batch_response(*zip(*values, strict=True))
    study.event("response_measured", stage=stage.number, cell=cells[0].name, **asdict(found))
    best = f"learning rate {found.learning_rate:.2g} with batch {found.batch:.3g}"
    if found.inside:
        log(f"Stage {stage.number}: the best of {len(cells)} runs like {cells[0].name} is {best}.")
        return
    edges = ", ".join(found.edges)
    log(f"Note: stage {stage.number}: {best} is best, but at an edge ({edges}), not an optimum.")


def _expect_a_loss(stage: StudyStage, losses: dict[str, float]) -> None:
    swept = {name for c in stage.cells for name in c.waits_for}
    tried: dict[int, list[float]] = {}
    for c in stage.cells:
        if c.name in swept:
            tried.setdefault(c.shape.parameters, []).append(losses[c.name])
    for n, found in tried.items():
        if not np.isfinite(found).any():
            problem = f"none of {len(found)} learning rates at N={n:,} gave a loss"
            todo = "see forescale study status; then launch with launch.retry=true, or plan anew"
            raise UserError(f"stage {stage.number}", problem, todo)


def _centre(study: Study, stage: StudyStage, log: Log) -> None:
    """Make a draft stage exact by the results so far; write the forecasts of its runs first."""
    table = study.table()
    best = optimum(table, study.job)
    made = study.plan.centre_next_stage(best, rule_of(study.plan))
    own = next(s for s in made.stages if s.number == stage.number)
    if study.job.target.is_given and not any(e["kind"] == "noise_measured" for e in study.events):
        _measure(study, table, log)
    centre = best(stage.budget or 0.0)
    grid = [c for c in own.cells if c.role == "grid"]
    sizes = [c.shape.parameters for c in grid]
    log(
        f"Stage {stage.number}: {stage.budget:.3g} FLOPs, sizes from N={min(sizes):,} to "
        f"{max(sizes):,}; the optimum so far is N={centre:,.0f}."
    )
    forecast_cells(study, table, grid, log)
    study.revise(made, "stage_centred", stage=stage.number, centre=centre)


def _measure(study: Study, table: pd.DataFrame, log: Log) -> None:
    """Record the noise that the first stage measured, and the precision of the prediction with it
    in place of the assumed noise."""
    found = noise_of(table, f"flops_{study.job.cost}")
    target = Target.of(study.plan.common, study.job.target)
    try:
        job = study.job
        design, noise = RunSet.of(study.plan), found.assumed()
        precision = expected(design, target, noise, seed=job.seed, near=job.near)
    except UserError as e:
        study.event("noise_measured", noise=asdict(found), why=str(e))
        return
    study.event("noise_measured", noise=asdict(found), expected=asdict(precision))
    levels = [f"{x.noise.sd:.2%} at {x.flops:.2g} FLOPs ({x.runs} runs)" for x in found.levels]
    gap = "-" if found.gap is None else f"{found.gap:.2%}"
    log(
        f"Measured: seed noise {', '.join(levels) or '-'}; tuning gap {gap}. With these, the "
        f"expected prediction interval is ± {precision.half[0.5]:.1%} (50%), "
        f"± {precision.half[0.9]:.1%} (90%)."
    )


def add_runs(study: Study, choices: Sequence[NextRun], log: Log) -> None:
    """Add the chosen runs as one more stage, with the learning rates of the rule so far. The cap
    rises by their cost. A forecast of each is written first."""
    number, cap = len(study.plan.stages) + 1, study.plan.cap
    ruled, cells = replace(study.plan.common, rule=rule_of(study.plan)), list[Cell]()
    for i, choice in enumerate(choices):
        shape = ruled.family.solve(choice.parameters)
        cells.append(make_cell(ruled, f"s{number}-next{i}", number, shape, tokens=choice.tokens))
    forecast_cells(study, study.table(), cells, log)
    cost = sum(c.cost for c in cells)
    stage = StudyStage(number, None, tuple(cells), cost, cost, exact=True)
    made = replace(study.plan, stages=(*study.plan.stages, stage), cap=cap + cost)
    study.revise(made, "runs_added", stage=number, cells=[c.name for c in cells], cap=made.cap)


def forecast_cells(study: Study, table: pd.DataFrame, cells: Sequence[Cell], log: Log) -> None:
    """Write a forecast of each of these cells that has none; if the runs so far determine no law,
    log that."""
    known = {f.facts["target"]["run"] for f in read_forecasts(study.forecasts)}
    wanted = [c for c in cells if c.name not in known]
    if not wanted:
        return
    fitted = table[table["fitted"]]
    if "budget" in fitted and fitted["budget"].nunique() < _BUDGETS:
        log("No forecasts yet: one budget determines no law.")
        return
    try:
        made = law_of(table, study.job, f"{len(fitted)} runs of {study.folder}")
    except UserError as e:
        study.event("forecast_refused", why=str(e), runs=[c.name for c in wanted])
        log(f"No forecasts: {e}")
        return
    written = sum(_forecast_cell(study, made, c, log) for c in wanted)
    log(f"Wrote forecasts of {written} runs to {study.forecasts}.")


def _forecast_cell(study: Study, made: StudyFit, cell: Cell, log: Log) -> bool:
    """True if the forecast was written; a run that is already known gets none."""
    n, flops = float(cell.shape.parameters), cell.flops[study.plan.common.cost]
    target = TargetPoint(parameters=n, tokens=float(cell.tokens), flops=flops)
    try:
        write_forecast(made, study.forecasts, cell.name, target)
    except UserError as e:
        study.event("forecast_refused", why=str(e), runs=[cell.name])
        log(f"No forecast of {cell.name}: {e}")
        return False
    return True


def add_target(study: Study, log: Log) -> None:
    """Add the target as the last stage, and write its forecast.

    It has the given N and D, or the best ones for its compute. Its cost does not count against the
    cap. Raises UserError if no target is given, or if it can't be predicted.
    """
    t, common, table = study.job.target, study.plan.common, study.table()
    if not t.is_given:
        todo = "plan the study with target.flops, or with target.parameters and target.tokens"
        raise UserError("target", "is not given", todo)
    flops = t.flops or (t.device_hours or 0) * 3600 * (common.rate or 0)
    wanted = t.parameters or _best_size(study, table, flops)
    shape = common.family.solve(wanted) if t.parameters else common.family.nearest([wanted])[0]
    tokens = t.tokens or flops / common.per_token(shape.model)[common.cost]
    ruled = replace(common, rule=rule_of(study.plan))
    number = len(study.plan.stages) + 1
    cell = make_cell(ruled, TARGET, number, shape, tokens=tokens, role="target")
    forecast_cells(study, table, [cell], log)
    if not any(c.facts["target"]["run"] == TARGET for c in read_forecasts(study.forecasts)):
        problem = "has no forecast, so it is not trained"
        raise UserError("target", problem, "see the reason above")
    stage = StudyStage(number, None, (cell,), cell.cost, cell.cost, exact=True)
    made = replace(study.plan, stages=(*study.plan.stages, stage))
    study.revise(made, "target_added", stage=number, cell=cell.name)


def _best_size(study: Study, table: pd.DataFrame, flops: float) -> float:
    """N of the lowest loss for this compute: by the parabolas if there are budgets, else by the
    law."""
    if "budget" in table:
        return optimum(table, study.job)(flops)
    made = law_of(table, study.job, f"{len(table)} runs of {study.folder}")
    return run_of(made, TargetPoint(flops=flops))[1]


def optimum(table: pd.DataFrame, job: StudyJob) -> Callable[[float], float]:
    """Return N*(C), a power law through the vertices of the budgets' parabolas.

    Its exponent is fitted once there are two budgets. A budget whose parabola is refused counts by
    its best run.
    """
    fitted = table[table["fitted"]]
    size, cost = fitted[f"parameters_{job.size}"], fitted[f"flops_{job.cost}"]
    found = dict[float, float]()
    for budget, own in fitted.groupby("budget"):
        n, d = (np.log(c[own.index].to_numpy(dtype=float)) for c in (size, own["tokens"]))
        losses, spent = own["loss"].to_numpy(), cost[own.index].to_numpy()
        at = vertex(float(budget), n, d, losses, spent)
        found[float(budget)] = (
            at.parameters if isinstance(at, Vertex) else float(np.exp(n[np.argmin(losses)]))
        )
    c, n = np.log(list(found)), np.log(list(found.values()))
    slope = _SLOPE
    if len(found) > 1:
        slope = float(np.clip(np.polyfit(c, n, 1)[0], *_SLOPES))
    level = float(np.mean(n - slope * c))
    return lambda flops: float(np.exp(level + slope * math.log(flops)))


def rule_of(plan: StudyPlan) -> Rule:
    """Return the rule for batch and learning rate, fitted to all sweeps that have ended."""
    found = []
    for stage in plan.stages:
        own = {c.shape.parameters: c for c in stage.cells if c.role == "grid"}
        for n, t in stage.tuned:
            cell = own[n]
            found.append((cell.shape.counts.non_embedding, cell.tokens, t.learning_rate))
    return updated_rule(plan.common.rule, found)
