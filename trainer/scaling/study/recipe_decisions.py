"""Decides the next budget of a study of recipes, and which recipes are confirmed.

all swept        the sweeps of the next budget, centred on the rates so far (stage_centred)
all seeds ended  fresh seeds for recipes whose multiplier is shown to be above 1 at the highest
                 budget (winners_chosen)
"""

from collections.abc import Callable
from dataclasses import replace

from forescale.ground.errors import UserError
from forescale.scaling.analysis.multipliers import Multipliers
from forescale.scaling.design.kinds import fresh_cells, highest_seeds, recipe_stage
from forescale.scaling.design.plan import StudyStage
from forescale.scaling.design.recipes import BestRates
from forescale.scaling.study.directory import Study

Log = Callable[[str], None]


def is_due(study: Study, stage: StudyStage) -> bool:
    """True for a budget once all cells before it have their learning rates, which its sweeps begin
    at; for the fresh seeds once all else has ended."""
    if stage.cells:
        return not any(c.waits_for for s in study.plan.stages if s.exact for c in s.cells)
    return all(s.has_ended for s in study.states())


def decide(study: Study, stage: StudyStage, log: Log) -> None:
    """Make a draft stage exact. Raises UserError if it doesn't fit under the cap."""
    plan = study.plan
    if not stage.cells:
        _confirm(study, stage, log)
        return
    assert plan.recipe_grid is not None, "a study of recipes has a layout"
    left = {c.recipe for c in stage.cells}  # without those that were dropped
    recipes = [r for r in plan.recipes if r.name in left]
    rates: dict[str, BestRates] = {}  # the best one of each sweep that has ended
    for r in recipes:
        seeds = {s.number: c for s in plan.stages if s.exact for c in s.cells
                 if c.recipe == r.name and c.role == "seed" and not c.waits_for}  # fmt: skip
        rates[r.name] = [
            (c.shape.counts.non_embedding, c.tokens, c.learning_rate) for c in seeds.values()
        ]
    exact = recipe_stage(plan.common, plan.recipe_grid, recipes, stage.number, rates)
    exact = replace(exact, high=max(exact.cost, stage.high))
    study.revise(plan.with_exact(exact), "stage_centred", stage=stage.number)
    log(f"Stage {stage.number}: {stage.budget:.3g} FLOPs, sweeps around the rates found so far.")


def _confirm(study: Study, stage: StudyStage, log: Log) -> None:
    """Plan fresh seeds for the winners."""
    reason, winners = "no recipe is shown to need less compute than the base", list[str]()
    try:
        recipes = Multipliers(study.table(), study.job, str(study.folder))
        winners = [c.name for c in recipes.candidates if c.is_winner]
    except UserError as e:
        reason = str(e)
    tuned = highest_seeds(study.plan)  # one that diverged there is no winner there
    winners = [name for name in winners if name in tuned]
    cells = fresh_cells(study.plan, winners, stage.number) if winners else ()
    cost = sum(c.cost for c in cells)
    exact = replace(stage, cells=cells, low=cost, high=cost, exact=True)
    plan = study.plan.with_exact(exact)
    study.revise(plan, "winners_chosen", stage=stage.number, winners=winners)
    if winners:
        log(f"Needs less compute than the base so far: {', '.join(winners)}. Fresh seeds follow.")
    else:
        log(f"No fresh seeds are needed: {reason.rstrip('.')}.")
