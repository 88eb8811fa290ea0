"""Decides from the results so far: learning rates, the next stage, forecasts, winners.

    a sweep ended   best rate at an edge -> one more rate on that side, within the stage's cost
                    (rates_added); else the learning rates of the cells that wait (rates_chosen)
    a law's stage   law_decisions.py
    of recipes      once all are tuned, the sweeps of the next budget, around the rates so far
                    (stage_centred); once all has ended, fresh seeds for recipes whose multiplier
                    is shown to be above 1 at the highest budget (winners_chosen)

Invariant: `advance` makes every decision that is due, and none twice; the same results give the
same plan even if the process was killed in between. A forecast is written before its run can start.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from forescale.ground.errors import UserError
from forescale.scaling.analysis.multipliers import Multipliers
from forescale.scaling.design.kinds import fresh_cells, highest_seeds, recipe_stage
from forescale.scaling.design.plan import EXTRA_RATES, StudyStage, extra_rates
from forescale.scaling.design.recipes import BASE, BestRates
from forescale.scaling.design.tuning import best_rates
from forescale.scaling.study import law_decisions
from forescale.scaling.study.directory import Study

Log = Callable[[str], None]


@dataclass(frozen=True)
class _Kind:
    """What a kind of study decides in its own way. is_due: whether a draft stage can be decided;
    decide: makes it exact; after: runs for each exact stage; extra_rates: most of a sweep."""

    is_due: Callable[[Study, StudyStage], bool]
    decide: Callable[[Study, StudyStage, Log], None]
    after: Callable[[Study, StudyStage, Log], None]
    extra_rates: int


def advance(study: Study, log: Log) -> None:
    """Make all decisions that are due. Raises UserError if the next stage doesn't fit under the
    cap, or if no learning rate gave a loss."""
    kind = _RECIPES if study.plan.recipes else _LAW
    for number in [s.number for s in study.plan.stages]:
        stage = study.plan.stage(number)
        if not stage.exact:
            if not kind.is_due(study, stage):
                return
            kind.decide(study, stage, log)
        for recipe in study.plan.stage(number).untuned:
            _tune(study, number, recipe, kind.extra_rates, log)
        kind.after(study, study.plan.stage(number), log)


def _tune(study: Study, number: int, recipe: str, most: int, log: Log) -> None:
    """Add learning rates to a sweep that has ended, or set those of the cells that wait for it. An
    excluded run counts as no result, but as one of the `most` extra rates."""
    stage, losses = study.plan.stage(number), study.losses()
    swept = stage.sweep(recipe)
    if not {c.name for c in swept} <= set(losses):
        return
    excluded = {s.cell.name for s in study.states() if s.status == "excluded"}
    runs = [
        (c.shape.parameters, c.learning_rate, losses[c.name])
        for c in swept
        if c.name not in excluded
    ]
    sizes = {c.shape.parameters for c in swept}
    if sizes - {n for n, _, _ in runs}:
        _end_without_loss(study, stage, recipe, "each of its learning rates is excluded", log)
        return
    best, gap = best_rates(runs)
    title = f"Stage {number}" + f", {recipe}" * bool(recipe)
    if cells := extra_rates(swept, best, most, stage.high - stage.cost):
        names = [c.name for c in cells]
        plan = study.plan.with_stage(stage.with_extra_rates(recipe, cells))
        study.revise(plan, "rates_added", stage=number, cells=names)
        log(
            f"{title}: the best learning rate is at an edge of its sweep; added {', '.join(names)}."
        )
        return
    if sizes - {n for n, _, loss in runs if math.isfinite(loss)}:
        _end_without_loss(study, stage, recipe, "no learning rate gave a loss", log)
        return
    edges = [n for n, tuned in best.items() if not tuned.inside]
    rates = {str(n): tuned.learning_rate for n, tuned in best.items()}
    facts = {"recipe": recipe, "rates": rates, "gap": gap, "edges": edges}
    plan = study.plan.with_stage(stage.with_rates(recipe, best, gap))
    study.revise(plan, "rates_chosen", stage=number, **facts)
    texts = ", ".join(f"{tuned.learning_rate:.2g} at N={n:,}" for n, tuned in best.items())
    log(f"{title}: best learning rates {texts}; tuning gap at most {gap:.2%}.")
    for n in edges:
        log(f"Note: at N={n:,} the best learning rate is at the edge of its sweep, not an optimum.")


def _end_without_loss(study: Study, stage: StudyStage, recipe: str, why: str, log: Log) -> None:
    """Drop all later runs of a candidate. Raises UserError for the base, and in the study of a
    law."""
    number = stage.number
    if recipe in ("", BASE):
        problem = f"has no learning rate{' of the base' * bool(recipe)}: {why}"
        todo = "see forescale study status; then launch with launch.retry=true, or plan anew"
        raise UserError(f"stage {number} of {study.folder}", problem, todo)
    stages = [
        replace(s, cells=tuple(
            c for c in s.cells
            if c.recipe != recipe or s.number < number or (s.number == number and not c.waits_for)
        ))
        for s in study.plan.stages
    ]  # fmt: skip
    plan = replace(study.plan, stages=tuple(stages))
    study.revise(plan, "recipe_dropped", stage=number, recipe=recipe)
    log(f"{recipe}: {why} in stage {number}; it is left out from here on.")


def _are_recipes_due(study: Study, stage: StudyStage) -> bool:
    """True for a budget once all cells before it have their learning rates, which its sweeps begin
    at; for the fresh seeds once all else has ended."""
    if stage.cells:
        return not any(c.waits_for for s in study.plan.stages if s.exact for c in s.cells)
    return all(s.has_ended for s in study.states())


def _decide_recipes(study: Study, stage: StudyStage, log: Log) -> None:
    """Make a draft stage exact: the sweeps of a budget, or fresh seeds for the winners. Raises
    UserError if it doesn't fit under the cap."""
    plan = study.plan
    if stage.cells:
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
        budget = f"{stage.budget:.3g} FLOPs"
        log(f"Stage {stage.number}: {budget}, sweeps around the rates found so far.")
        return
    reason, winners = "no recipe is shown to need less compute than the base", list[str]()
    try:
        candidates = Multipliers(study.table(), study.job, str(study.folder)).candidates
        winners = [c.name for c in candidates if c.is_winner]
    except UserError as e:
        reason = str(e)
    tuned = highest_seeds(plan)  # one that diverged there is no winner there
    winners = [name for name in winners if name in tuned]
    cells = fresh_cells(plan, winners, stage.number) if winners else ()
    cost = sum(c.cost for c in cells)
    exact = replace(stage, cells=cells, low=cost, high=cost, exact=True)
    study.revise(plan.with_exact(exact), "winners_chosen", stage=stage.number, winners=winners)
    if winners:
        log(f"Needs less compute than the base so far: {', '.join(winners)}. Fresh seeds follow.")
    else:
        log(f"No fresh seeds are needed: {reason.rstrip('.')}.")


_LAW = _Kind(
    law_decisions.is_due, law_decisions.centre, law_decisions.measure_response, EXTRA_RATES
)
_RECIPES = _Kind(_are_recipes_due, _decide_recipes, lambda *_: None, 4)
