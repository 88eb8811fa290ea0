"""Decides for a study of recipes: next runs of each search, its end, the next budget, fresh seeds.

    trials_added     the runs that a recipe's search asks for next, once those before have ended
    rates_chosen     its best size and settings, which its seeds take
    recipe_dropped   a candidate whose search gave no loss: its later runs are left out
    stage_centred    once all have ended, the searches of the next budget, around the best so far
    fresh_planned    fresh seeds at the highest budget, once all else has ended, in three steps:
                     settings swapped with the base, all at the base's best, new seeds at each best

Invariant: a search is a function of the plan and of the losses, so that the same ones give the same
runs even if the process was killed in between.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from operator import itemgetter
from statistics import fmean

from forescale.ground.errors import UserError
from forescale.scaling.design.cells import Cell
from forescale.scaling.design.kinds import crossed_cells, highest_seeds, recipe_stage, reseeded
from forescale.scaling.design.plan import StudyPlan, StudyStage
from forescale.scaling.design.recipes import BASE
from forescale.scaling.study.directory import Study

Log = Callable[[str], None]
NO_LOSS = "no learning rate gave a loss"


def tune_recipe(study: Study, number: int, name: str, log: Log) -> None:
    """Add the next runs of a recipe's search, or end it: its seeds take the best size and settings.
    An excluded run has no loss, and counts as one of the search."""
    plan, stage, losses = study.plan, study.plan.stage(number), study.losses()
    swept, grid = stage.sweep(name), plan.recipe_grid
    if not {c.name for c in swept} <= set(losses):
        return
    excluded = study.excluded()
    tried = {c.trial: math.inf if c.name in excluded else losses[c.name] for c in swept}
    if {c.name for c in swept} <= excluded:
        _drop(study, number, name, "each of its runs is excluded", log)
        return
    recipe = next(r for r in plan.recipes if r.name == name)
    earlier = earlier_seeds(plan, name, number)
    if grid is None or grid.start(plan.common, recipe, number, earlier) not in tried:
        problem = "was planned by an earlier version, whose sweeps this one does not go on with"
        raise UserError(str(study.folder), problem, "fit it as it is, or plan a new study")
    search = grid.search(plan.common, recipe, number, earlier, tried)  # type: ignore[arg-type]
    if search.pending:
        parts = (plan.common, recipe, number, search.pending, earlier, len(swept))
        wider = stage.with_extra_rates(name, grid.trial_cells(*parts))
        wider = replace(wider, high=max(wider.high, wider.cost))
        study.revise(plan.with_exact(wider), "trials_added", stage=number, recipe=name)
        return
    if not search.has_loss:
        _drop(study, number, name, NO_LOSS, log)
        return
    best = grid.cell(plan.common, recipe, number, search.best, earlier)
    cells = tuple(
        replace(best, name=c.name, role="seed", seed=c.seed, edges=search.edges)
        if c.waits_for and c.recipe == name
        else c
        for c in stage.cells
    )
    facts = {"recipe": name, "runs": len(swept), "edges": list(search.edges)}
    tuned = plan.with_stage(replace(stage, cells=cells))
    study.revise(tuned, "rates_chosen", stage=number, **facts)
    log(f"Stage {number}, {name}: {_described(best)}, by {len(swept)} runs.")
    if search.edges:
        log(f"Note: {name}: best at the edge of what was tried, not an optimum: "
            f"{', '.join(search.edges)}.")  # fmt: skip


def _described(best: Cell) -> str:
    """Return the size and settings of a recipe's best trial."""
    n, trial = best.shape.parameters, best.trial
    assert trial is not None, "a cell of a search has its trial"
    dials = {"tables": trial.tables, "scalars": trial.scalars, "batch": trial.batch,
             "warmup": trial.warmup, "decay": trial.decay}  # fmt: skip
    text = f"N={n:,}, D/N {best.tokens / n:.3g}, learning rate {best.learning_rate:.2g}"
    return text + "".join(f", {name} x{x:.2g}" for name, x in dials.items() if x not in (None, 1))


def earlier_seeds(plan: StudyPlan, recipe: str, before: int) -> list[Cell]:
    """Return a seed of each budget of a recipe whose search has ended, below stage `before`; of the
    base if the recipe has none: else only the base would begin from an earlier search."""
    seeds = {s.number: c for s in plan.stages if s.exact and s.number < before for c in s.cells
             if c.recipe == recipe and c.role == "seed" and not c.waits_for}  # fmt: skip
    return [*seeds.values()] if seeds or recipe == BASE else earlier_seeds(plan, BASE, before)


def no_rate(study: Study, number: int, problem: str) -> UserError:
    """Return the error of a stage whose runs can't be tuned."""
    todo = "see forescale study status; then launch with launch.retry=true, or plan anew"
    return UserError(f"stage {number} of {study.folder}", problem, todo)


def _drop(study: Study, number: int, recipe: str, why: str, log: Log) -> None:
    """Drop all later runs of a candidate. Raises UserError for the base."""
    if recipe == BASE:
        raise no_rate(study, number, f"has no learning rate of the base: {why}")

    def stays(c: Cell) -> bool:
        return c.recipe != recipe or c.stage < number or (c.stage == number and not c.waits_for)

    stages = [replace(s, cells=tuple(filter(stays, s.cells))) for s in study.plan.stages]
    plan = replace(study.plan, stages=tuple(stages))
    study.revise(plan, "recipe_dropped", stage=number, recipe=recipe)
    log(f"{recipe}: {why} in stage {number}; it is left out from here on.")


def are_recipes_due(study: Study, stage: StudyStage) -> bool:
    """True for a budget once all searches before it have ended; for the fresh seeds once all else
    has."""
    if stage.cells:
        return not any(c.waits_for for s in study.plan.stages if s.exact for c in s.cells)
    return all(s.has_ended for s in study.states())


def decide_recipes(study: Study, stage: StudyStage, log: Log) -> None:
    """Make a draft stage exact: the searches of a budget, or fresh seeds. Raises UserError if it
    doesn't fit under the cap."""
    plan = study.plan
    if stage.cells:
        assert plan.recipe_grid is not None, "a study of recipes has a layout"
        left = {c.recipe for c in stage.cells}  # without those that were dropped
        recipes = [r for r in plan.recipes if r.name in left]
        earlier = {r.name: earlier_seeds(plan, r.name, stage.number) for r in recipes}
        exact = recipe_stage(plan.common, plan.recipe_grid, recipes, stage.number, earlier)
        exact = replace(exact, high=max(exact.cost, stage.high))
        study.revise(plan.with_exact(exact), "stage_centred", stage=stage.number)
        log(f"Stage {stage.number}: {stage.budget:.3g} FLOPs, searches around the best so far.")
        return
    plan_fresh(study, stage, log)


def plan_fresh(study: Study, stage: StudyStage, log: Log) -> None:
    """Add the next fresh seeds once those so far have ended: at settings swapped with the base's,
    then all at the base's best settings, then new seeds of each at its own best, to confirm it."""
    states, plan, losses, excluded = study.states(), study.plan, study.losses(), study.excluded()
    if {c.role for c in stage.cells} - {"crossed"} or not all(s.has_ended for s in states):
        return
    crossed = [c for c in stage.cells if c.name not in excluded]
    if failed := [s.cell.name for s in states if s.status == "failed" and s.cell in crossed]:
        # By an error, not by its settings, which would drop out of the choice unnoticed.
        raise no_rate(study, stage.number, f"can't compare settings: {failed[0]} failed")
    best = {name: (math.inf, c) for name, c in highest_seeds(plan).items()}
    for c in crossed:
        alike = [d.name for d in crossed if (d.recipe, d.cell_of) == (c.recipe, c.cell_of)]
        known = [losses[name] for name in alike if name in losses]
        mean = fmean(known) if known and all(map(math.isfinite, known)) else math.inf
        best[c.recipe] = min(best[c.recipe], (mean, c), key=itemgetter(0))
    names, of_base = {c.name for c in stage.cells}, best[BASE][1]
    cells = tuple(c for c in crossed_cells(plan, stage.number, of_base) if c.name not in names)
    where = "of its own and of others, to choose" if cells else "at which it was best, to confirm"
    if not cells and len(best) > 1:
        cells = reseeded(plan, stage.number, [c for _, c in best.values()], "confirm")
    if stage.exact and not cells:
        return
    cost = stage.cost + sum(c.cost for c in cells)
    exact = replace(stage, cells=stage.cells + cells, low=cost, high=cost, exact=True)
    study.revise(plan.with_exact(exact), "fresh_planned", stage=stage.number)
    if cells:
        log(f"Fresh seeds: {len(cells)} runs, each recipe at settings {where}.")
