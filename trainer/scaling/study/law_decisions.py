"""Decides the next budget of a law's study, its forecasts, further runs and the target.

stage ended    N* of its parabola -> the sizes of the next stage, and the rule of its rates;
               the law of all runs so far -> a forecast of each of its runs
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import numpy as np
import pandas as pd

from forescale.ground.errors import UserError
from forescale.scaling.analysis.forecast import read_forecasts, write_forecast
from forescale.scaling.analysis.prediction import run_of
from forescale.scaling.analysis.selection import law_of
from forescale.scaling.config import StudyJob, TargetPoint
from forescale.scaling.design.cells import Cell, make_cell
from forescale.scaling.design.next_runs import NextRun
from forescale.scaling.design.noise import noise_of
from forescale.scaling.design.plan import StudyPlan, StudyStage
from forescale.scaling.design.shapes import Rule
from forescale.scaling.design.simulate import RunSet, expected
from forescale.scaling.design.tuning import rate_batch_response, updated_rule
from forescale.scaling.fitting.isoflop import Vertex, vertex
from forescale.scaling.study.directory import TARGET, Study

_SLOPE, _SLOPES = 0.5, (0.3, 0.7)  # exponent of N*(C): before two budgets give one; its limits
_BUDGETS = 2  # fewer budgets determine no law

Log = Callable[[str], None]


def is_due(study: Study, stage: StudyStage) -> bool:
    """True once all cells of earlier stages have ended."""
    return all(s.has_ended for s in study.states() if s.cell.stage < stage.number)


def centre(study: Study, stage: StudyStage, log: Log) -> None:
    """Make a draft stage exact by the results so far; write the forecasts of its runs first."""
    table = study.table()
    best = optimum(table, study.job)
    plan = study.plan.centre_next_stage(best, rule_of(study.plan))
    if study.job.target.is_given and not any(e["kind"] == "noise_measured" for e in study.events):
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


def measure_response(study: Study, stage: StudyStage, log: Log) -> None:
    """Record the best batch and learning rate once all cells of the batch sweep have ended."""
    tried = [c for c in stage.cells if c.role in ("batch", "rate-batch")]
    events = [e for e in study.events if e["kind"] == "response_measured"]
    if not tried or stage.number in [e.get("stage") for e in events]:
        return
    cells, losses = [c for c in stage.cells if c.name == tried[0].cell_of] + tried, study.losses()
    if not {c.name for c in cells} <= set(losses):
        return
    runs = [(c.learning_rate, float(c.global_batch), losses[c.name]) for c in cells]
    response = rate_batch_response(*zip(*runs, strict=True))
    study.event("response_measured", stage=stage.number, cell=cells[0].name, **asdict(response))
    best = f"learning rate {response.learning_rate:.2g} with batch {response.batch:.3g}"
    if response.inside:
        log(f"Stage {stage.number}: the best of {len(cells)} runs like {cells[0].name} is {best}.")
        return
    edges = ", ".join(response.edges)
    log(f"Note: stage {stage.number}: {best} is best, but at an edge ({edges}), not an optimum.")


def _measure_noise(study: Study, table: pd.DataFrame, log: Log) -> None:
    """Record the noise that the first stage measured, and the precision of the prediction with it
    in place of the assumed noise."""
    job, noise = study.job, noise_of(table, f"flops_{study.job.cost}")
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
        log("No forecasts yet: one budget determines no law.")
        return
    try:
        law = law_of(table, study.job, f"{len(fitted)} runs of {study.folder}")
    except UserError as e:
        study.event("forecast_refused", why=str(e), runs=[c.name for c in cells])
        log(f"No forecasts: {e}")
        return
    count = 0
    for c in cells:
        flops = c.flops[study.plan.common.cost]
        target = TargetPoint(float(c.shape.parameters), float(c.tokens), flops)
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
    else:  # by the parabolas if there are budgets, else by the law
        if "budget" in table:
            best = optimum(table, study.job)(flops)
        else:
            law = law_of(table, study.job, f"{len(table)} runs of {study.folder}")
            best = run_of(law, TargetPoint(flops=flops))[1]
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
    fitted = table[table["fitted"]]
    best = dict[float, float]()
    for budget, rows in fitted.groupby("budget"):
        n, d = (np.log(rows[c].to_numpy(dtype=float)) for c in (f"parameters_{job.size}", "tokens"))
        losses, spent = rows["loss"].to_numpy(), rows[f"flops_{job.cost}"].to_numpy()
        at, lowest = vertex(float(budget), n, d, losses, spent), float(np.exp(n[np.argmin(losses)]))
        best[float(budget)] = at.parameters if isinstance(at, Vertex) else lowest
    c, n = np.log(list(best)), np.log(list(best.values()))
    slope = _SLOPE
    if len(best) > 1:
        slope = float(np.clip(np.polyfit(c, n, 1)[0], *_SLOPES))
    level = float(np.mean(n - slope * c))
    return lambda flops: float(np.exp(level + slope * math.log(flops)))


def rule_of(plan: StudyPlan) -> Rule:
    """Return the rule for batch and learning rate, fitted to all sweeps that have ended."""
    rates = list[tuple[float, float, float]]()
    for stage in plan.stages:
        grid = {c.shape.parameters: c for c in stage.cells if c.role == "grid"}
        for n, tuned in stage.tuned:
            size = grid[n].shape.counts.non_embedding
            rates.append((size, grid[n].tokens, tuned.learning_rate))
    return updated_rule(plan.common.rule, rates)
