"""Decides in a study of recipes: learning rates, seeds, the next budget, fresh seeds for winners.

    a sweep ended    best rate at an edge -> one more rate on that side, at most four and as far as
                     the stage's cost allows (rates_added); else the rate of the runs with other
                     seeds (rates_chosen), which is a doubt of `study fit` if it is at an edge
    all swept        the sweeps of the next budget, centred on the rates so far (stage_centred)
    all seeds ended  fresh seeds for recipes whose multiplier is shown to be above 1 at the highest
                     budget (winners_chosen)

Invariant: as in decisions.py: all decisions that are due, none twice, the same after a kill. The
base is tuned by the same rules as every other recipe.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from forescale.errors import UserError
from forescale.scaling.analysis.multipliers import Multipliers
from forescale.scaling.design.cells import FACTOR, Cell, extra_rate
from forescale.scaling.design.plan import StudyPlan, StudyStage
from forescale.scaling.design.recipe import BASE, RATES
from forescale.scaling.design.recipe_plan import fresh_cells, highest_seeds, recipe_stage
from forescale.scaling.design.tuning import Tuned, tuned
from forescale.scaling.study.directory import Study

_MOST = 4  # extra rates of one sweep
Log = Callable[[str], None]


def advance_recipes(study: Study, log: Log) -> None:
    """Make all decisions that are due. Raises UserError if no learning rate of the base gives a
    loss, or if the next stage doesn't fit under the cap."""
    for number in [s.number for s in study.plan.stages]:
        stage = _stage(study.plan, number)
        if not stage.exact:
            if stage.cells:
                _centre(study, stage, log)
            elif _all_ended(study):
                _confirm(study, stage, log)
            stage = _stage(study.plan, number)
        losses = study.losses()
        for name in dict.fromkeys(c.recipe for c in stage.cells if c.waits_for):
            _tune(study, number, name, losses, log)
        if any(c.waits_for for c in _stage(study.plan, number).cells):
            return  # the next budget's rates begin at those of this one


def _stage(plan: StudyPlan, number: int) -> StudyStage:
    return next(s for s in plan.stages if s.number == number)


def _all_ended(study: Study) -> bool:
    return all(s.has_ended for s in study.states())


def _sweep(stage: StudyStage, recipe: str) -> list[Cell]:
    return [c for c in stage.cells if c.recipe == recipe and c.role in ("grid", "rate")]


def _tune(study: Study, number: int, recipe: str, losses: dict[str, float], log: Log) -> None:
    """Add a learning rate to the sweep of a recipe, or set that of its runs with other seeds."""
    stage = _stage(study.plan, number)
    swept = _sweep(stage, recipe)
    if not {c.name for c in swept} <= set(losses):
        return
    left_out = {s.cell.name for s in study.states() if s.status == "excluded"}
    own = [c for c in swept if c.name not in left_out]
    if not own:
        _drop(study, recipe, number, "each of its learning rates is excluded", log)
        return
    best = tuned([c.learning_rate for c in own], [losses[c.name] for c in own])
    rate, room = best.next_rate(FACTOR), stage.high - stage.cost
    if rate is not None and len(swept) < RATES + _MOST and own[0].cost <= room:
        more = extra_rate(own, rate)
        cells = [
            replace(c, waits_for=(*c.waits_for, more.name)) if _waits(c, recipe) else c
            for c in stage.cells
        ]
        made = replace(stage, cells=(*cells, more))
        study.revise(study.plan.with_stage(made), "rates_added", stage=number, cells=[more.name])
        log(f"{own[0].name}: the best learning rate is at the edge; added {more.name}.")
    elif all(math.isnan(losses[c.name]) for c in own):
        _drop(study, recipe, number, "no learning rate gave a loss", log)
    else:
        _choose(study, stage, recipe, best, log)


def _waits(cell: Cell, recipe: str) -> bool:
    return cell.recipe == recipe and bool(cell.waits_for)


def _choose(study: Study, stage: StudyStage, recipe: str, best: Tuned, log: Log) -> None:
    rate = best.learning_rate
    cells = [
        replace(c, learning_rate=rate, waits_for=()) if _waits(c, recipe) else c
        for c in stage.cells
    ]
    made = study.plan.with_stage(replace(stage, cells=tuple(cells)))
    facts = {"recipe": recipe, "rate": rate, "inside": best.inside}
    study.revise(made, "rates_chosen", stage=stage.number, **facts)
    edge = "" if best.inside else ", at the edge of its sweep: not an optimum"
    log(f"Stage {stage.number}, {recipe}: best learning rate {rate:.2g}{edge}.")


def _drop(study: Study, recipe: str, number: int, why: str, log: Log) -> None:
    """Take a recipe without a loss out of the runs that have not begun."""
    if recipe == BASE:
        problem = f"has no rate of the base in stage {number}: {why}"
        raise UserError(str(study.folder), problem, "see forescale study status; then plan anew")
    stages = [
        replace(s, cells=tuple(
            c for c in s.cells
            if c.recipe != recipe or s.number < number or (s.number == number and not c.waits_for)
        ))
        for s in study.plan.stages
    ]  # fmt: skip
    made = replace(study.plan, stages=tuple(stages))
    study.revise(made, "recipe_dropped", stage=number, recipe=recipe)
    log(f"{recipe}: {why} in stage {number}; it is left out from here on.")


def _centre(study: Study, stage: StudyStage, log: Log) -> None:
    """Make a draft stage exact: sweeps around the learning rates that each recipe had so far.
    Raises UserError if it doesn't fit under the cap."""
    plan = study.plan
    assert plan.recipe_grid is not None, "a study of recipes has a layout"
    left = {c.recipe for c in stage.cells}  # without those that were dropped
    recipes = [r for r in plan.recipes if r.name in left]
    found = {r.name: _rates(plan, r.name) for r in recipes}
    made = recipe_stage(plan.common, plan.recipe_grid, recipes, stage.number, found)
    made = replace(made, high=max(made.cost, stage.high))
    study.revise(plan.with_exact(made), "stage_centred", stage=stage.number)
    log(f"Stage {stage.number}: {stage.budget:.3g} FLOPs, sweeps around the rates found so far.")


def _rates(plan: StudyPlan, recipe: str) -> Sequence[tuple[float, float, float]]:
    """Return (non-embedding N, D, best rate) of each sweep of a recipe that has ended."""
    seen = {c.stage: c for c in plan.cells
            if c.recipe == recipe and c.role == "seed" and not c.waits_for
            and _stage(plan, c.stage).exact}  # fmt: skip
    return [(c.shape.counts.non_embedding, c.tokens, c.learning_rate) for c in seen.values()]


def _confirm(study: Study, stage: StudyStage, log: Log) -> None:
    """Plan fresh seeds for the winners, once all else has ended. Raises UserError if they don't fit
    under the cap."""
    none, winners = "no recipe is shown to need less compute than the base", list[str]()
    try:
        made = Multipliers(study.table(), study.job, str(study.folder))
        winners = [c.name for c in made.candidates if c.is_winner]
    except UserError as e:
        none = str(e)
    tuned_there = highest_seeds(study.plan)  # one that diverged there is no winner there
    winners = [name for name in winners if name in tuned_there]
    cells = fresh_cells(study.plan, winners, stage) if winners else ()
    cost = sum(c.cost for c in cells)
    done = replace(stage, cells=cells, low=cost, high=cost, exact=True)
    study.revise(study.plan.with_exact(done), "winners_chosen", stage=stage.number, winners=winners)
    if winners:
        log(f"Needs less compute than the base so far: {', '.join(winners)}. Fresh seeds follow.")
    else:
        log(f"No fresh seeds are needed: {none.rstrip('.')}.")
