"""What the results so far decide: the learning rates that cells await, the centre of the next
budget, and a forecast of each of its runs before any of them begins.

    crosses ended   best at an edge -> one more rate, as far as the cap goes (widened)
                    else the rates of the sizes between (settled)
    stage ended     N* of its parabola -> the sizes of the next; the rule of its learning rates
                    law of all runs so far -> a card for each run of the next, then the stage

Invariant: `advance` decides what can be decided and nothing twice: the same results make the same
plan, whoever was killed in between. A card is written before its run can begin.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import numpy as np
import pandas as pd

from forescale.errors import UserError
from forescale.scaling.analysis.answer import StudyFit
from forescale.scaling.analysis.forecast import cards, predict
from forescale.scaling.analysis.selection import law_of
from forescale.scaling.config import StudyJob, TargetPoint
from forescale.scaling.design.cells import Cell, make_cell
from forescale.scaling.design.next_runs import Choice
from forescale.scaling.design.noise import noise_of
from forescale.scaling.design.plan import Plan, Stage, settled, widened
from forescale.scaling.design.shapes import Rule
from forescale.scaling.design.simulate import Design, Target, expected
from forescale.scaling.design.tuning import basin, learnt
from forescale.scaling.fitting.isoflop import Vertex, vertex
from forescale.scaling.study.directory import TARGET, Study

_SLOPE, _SLOPES = 0.5, (0.3, 0.7)  # of N* on C: until two budgets tell it, and never outside
_BUDGETS = 2  # fewer tell no law at all

Tell = Callable[[str], None]


def advance(study: Study, tell: Tell) -> None:
    """Decide all that can be decided now. Raises UserError where a later stage can't be had for the
    cap, and where all learning rates of a size came to nothing."""
    losses = study.losses()
    for number in [s.number for s in study.plan.stages]:
        stage = next(s for s in study.plan.stages if s.number == number)
        before = [c.name for s in study.plan.stages if s.number < number for c in s.cells]
        if not stage.exact:
            if not set(before) <= set(losses):
                return
            _centre(study, stage, tell)
            return
        awaited = {name for c in stage.cells for name in c.awaits}
        if awaited and awaited <= set(losses):
            _settle(study, stage, losses, tell)
        _judge_basin(study, stage, losses, tell)


def _settle(study: Study, stage: Stage, losses: dict[str, float], tell: Tell) -> None:
    _expect_some(stage, losses)
    if more := widened(stage, losses, stage.high - stage.cost):
        names = tuple(c.name for c in more)
        cells = [replace(c, awaits=(*c.awaits, *names)) if c.awaits else c for c in stage.cells]
        wide = replace(stage, cells=(*cells, *more))
        study.revise(study.plan.with_stage(wide), "widened", stage=stage.number, cells=names)
        tell(
            f"Stage {stage.number}: the best learning rate is at an edge; more: {', '.join(names)}."
        )
        return
    made = settled(stage, losses)
    edges = [n for n, t in made.tuned if not t.inside]
    rates = {str(n): t.learning_rate for n, t in made.tuned}
    facts = {"rates": rates, "gap": made.gap, "edges": edges}
    study.revise(study.plan.with_stage(made), "settled", stage=stage.number, **facts)
    said = ", ".join(f"{t.learning_rate:.2g} at N={n:,}" for n, t in made.tuned)
    tell(f"Stage {stage.number}: learning rates {said}; {made.gap:.2%} left untuned.")
    for n in edges:
        tell(f"Note: at N={n:,} that is the edge of what was tried, and no optimum.")


def _judge_basin(study: Study, stage: Stage, losses: dict[str, float], tell: Tell) -> None:
    """What the batches that were tried tell of batch and learning rate, once all have ended."""
    tried = [c for c in stage.cells if c.role in ("batch", "cross")]
    told = any(e["kind"] == "basin" and e["stage"] == stage.number for e in study.events)
    if not tried or told or not all(c.name in losses for c in tried):
        return
    cells = [c for c in stage.cells if c.name == tried[0].of] + tried
    if cells[0].name not in losses:
        return
    values = [(c.learning_rate, float(c.global_batch), losses[c.name]) for c in cells]
    found = basin(*zip(*values, strict=True))
    study.event("basin", stage=stage.number, cell=cells[0].name, **asdict(found))
    said = f"learning rate {found.learning_rate:.2g} with batch {found.batch:.3g}"
    if found.inside:
        tell(f"Stage {stage.number}: of {len(cells)} runs of {cells[0].name} the best is {said}.")
        return
    edges = ", ".join(found.edges)
    tell(f"Stage {stage.number}: {said} was best, at the edge of its {edges}: no optimum.")


def _expect_some(stage: Stage, losses: dict[str, float]) -> None:
    awaited = {name for c in stage.cells for name in c.awaits}
    tried: dict[int, list[float]] = {}
    for c in stage.cells:
        if c.name in awaited:
            tried.setdefault(c.shape.parameters, []).append(losses[c.name])
    for n, found in tried.items():
        if not np.isfinite(found).any():
            what = f"all {len(found)} learning rates of {n:,} parameters came to nothing"
            todo = "see forescale study status; then launch.retry=true, or plan a new study"
            raise UserError(f"stage {stage.number}", what, todo)


def _centre(study: Study, stage: Stage, tell: Tell) -> None:
    """The cells of a stage from the results of those before; then its cards; then the stage."""
    table = study.table()
    best = optimum(table, study.job)
    made = study.plan.recentred(best, rule_of(study.plan))
    own = next(s for s in made.stages if s.number == stage.number)
    if study.job.target.is_given and not any(e["kind"] == "measured" for e in study.events):
        _measure(study, table, tell)
    centre = best(stage.budget or 0.0)
    tell(f"Stage {stage.number}: {stage.budget:.3g} FLOPs, around N={centre:,.0f}.")
    grid = [c for c in own.cells if c.role == "grid"]
    foretell(study, table, grid, tell)
    study.revise(made, "centred", stage=stage.number, centre=centre)


def _measure(study: Study, table: pd.DataFrame, tell: Tell) -> None:
    """What the first stage says of noise and tuning, in place of what the plan assumed of it, and
    how sure of the target the same plan makes with that."""
    found, t, common = (
        noise_of(table, f"flops_{study.job.cost}"),
        study.job.target,
        study.plan.common,
    )
    target = Target.of(common, t.flops, t.parameters, t.tokens, t.device_hours)
    told = found.assumed()
    try:
        job = study.job
        sure = expected(Design.of(study.plan), target, told, seed=job.seed, near=job.near)
    except UserError as e:
        study.event("measured", noise=asdict(found), why=str(e))
        return
    study.event("measured", noise=asdict(found), expected=asdict(sure))
    levels = [f"{x.noise.sd:.2%} of {x.runs} runs at {x.flops:.2g} FLOPs" for x in found.levels]
    gap = "-" if found.gap is None else f"{found.gap:.2%}"
    tell(
        f"Measured: seed noise {', '.join(levels) or '-'}; {gap} lost to the learning rate. With "
        f"that the plan makes the target sure to ± {sure.half[0.5]:.1%} (50%), "
        f"± {sure.half[0.9]:.1%} (90%)."
    )


def add_runs(study: Study, choices: Sequence[Choice], tell: Tell) -> None:
    """Runs that were chosen, as one more stage, with the learning rates learnt so far; their cost
    goes on the cap. A forecast of each is written first."""
    number, cap = len(study.plan.stages) + 1, study.plan.cap
    ruled, cells = replace(study.plan.common, rule=rule_of(study.plan)), list[Cell]()
    for i, choice in enumerate(choices):
        shape = ruled.family.solve(choice.parameters)
        cells.append(make_cell(ruled, f"s{number}-next{i}", number, shape, tokens=choice.tokens))
    foretell(study, study.table(), cells, tell)
    cost = sum(c.cost for c in cells)
    stage = Stage(number, None, tuple(cells), cost, cost, exact=True)
    made = replace(study.plan, stages=(*study.plan.stages, stage), cap=cap + cost)
    study.revise(made, "added", stage=number, cells=[c.name for c in cells], cap=made.cap)


def foretell(study: Study, table: pd.DataFrame, cells: Sequence[Cell], tell: Tell) -> None:
    """A card for each of these that has none. Where the runs so far tell no law there is none, and
    that is said."""
    known = {card.facts["target"]["run"] for card in cards(study.forecasts)}
    wanted = [c for c in cells if c.name not in known]
    if not wanted:
        return
    fitted = table[table["fitted"]]
    if "budget" in fitted and fitted["budget"].nunique() < _BUDGETS:
        tell(f"No forecasts yet: {fitted['budget'].nunique()} budget tells no law.")
        return
    try:
        made = law_of(table, study.job, f"{len(fitted)} runs of {study.folder}")
    except UserError as e:
        study.event("no_forecast", why=str(e), runs=[c.name for c in wanted])
        tell(f"No forecasts: {e}")
        return
    written = sum(_card(study, made, c, tell) for c in wanted)
    tell(f"Forecast: {written} runs, in {study.forecasts}.")


def _card(study: Study, made: StudyFit, cell: Cell, tell: Tell) -> bool:
    """Whether it could be written: of what is known already there is none."""
    n, flops = float(cell.shape.parameters), cell.flops[study.plan.common.cost]
    target = TargetPoint(parameters=n, tokens=float(cell.tokens), flops=flops)
    try:
        predict(made, study.forecasts, cell.name, target)
    except UserError as e:
        study.event("no_forecast", why=str(e), runs=[cell.name])
        tell(f"No forecast of {cell.name}: {e}")
        return False
    return True


def add_target(study: Study, tell: Tell) -> None:
    """The run that all the others are for, as a last stage, with its card: N and D as they were
    asked for, or the best of its compute. It is paid for beside the cap. Raises UserError where no
    target is given, or the law says nothing of it."""
    t, common, table = study.job.target, study.plan.common, study.table()
    if not t.is_given:
        todo = "plan the study with target.flops=, or target.parameters= and target.tokens="
        raise UserError("target", "is not given", todo)
    flops = t.flops or (t.device_hours or 0) * 3600 * (common.rate or 0)
    wanted = t.parameters or _best_size(study, table, flops)
    shape = common.family.solve(wanted) if t.parameters else common.family.nearest([wanted])[0]
    tokens = t.tokens or flops / common.per_token(shape.model)[common.cost]
    ruled = replace(common, rule=rule_of(study.plan))
    number = len(study.plan.stages) + 1
    cell = make_cell(ruled, TARGET, number, shape, tokens=tokens, role="target")
    foretell(study, table, [cell], tell)
    if not any(c.facts["target"]["run"] == TARGET for c in cards(study.forecasts)):
        what = "could not be foretold, and is not trained for that reason"
        raise UserError("target", what, "see the sentence above")
    stage = Stage(number, None, (cell,), cell.cost, cell.cost, exact=True)
    made = replace(study.plan, stages=(*study.plan.stages, stage))
    study.revise(made, "target", stage=number, cell=cell.name)


def _best_size(study: Study, table: pd.DataFrame, flops: float) -> float:
    """N of the least loss for so much compute: by the parabolas where there are budgets, else by
    the law."""
    if "budget" in table:
        return optimum(table, study.job)(flops)
    made = law_of(table, study.job, f"{len(table)} runs of {study.folder}")
    return made.run_of(TargetPoint(flops=flops))[1]


def optimum(table: pd.DataFrame, job: StudyJob) -> Callable[[float], float]:
    """N*(C) through the vertex of the dearest budget. The exponent is that of all vertices, once
    two budgets have one; a budget whose parabola is refused counts by its best run, where there is
    nothing else."""
    fitted = table[table["fitted"]]
    size, cost = fitted[f"parameters_{job.size}"], fitted[f"flops_{job.cost}"]
    found = dict[float, float]()
    for budget, own in fitted.groupby("budget"):
        n = np.log(size[own.index].to_numpy(dtype=float))
        losses, spent = own["loss"].to_numpy(), cost[own.index].to_numpy()
        at = vertex(float(budget), n, losses, spent, 6.0)
        found[float(budget)] = (
            at.parameters if isinstance(at, Vertex) else float(np.exp(n[np.argmin(losses)]))
        )
    c, n = np.log(list(found)), np.log(list(found.values()))
    slope = _SLOPE
    if len(found) > 1:
        slope = float(np.clip(np.polyfit(c, n, 1)[0], *_SLOPES))
    level = float(np.mean(n - slope * c))
    return lambda flops: float(np.exp(level + slope * math.log(flops)))


def rule_of(plan: Plan) -> Rule:
    """Of batch and learning rate, as learnt from all crosses that are settled."""
    found = []
    for stage in plan.stages:
        own = {c.shape.parameters: c for c in stage.cells if c.role == "grid"}
        for n, t in stage.tuned:
            cell = own[n]
            found.append((cell.shape.counts.non_embedding, cell.tokens, t.learning_rate))
    return learnt(plan.common.rule, found)
