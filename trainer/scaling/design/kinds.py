"""The kinds of plans: which runs a study trains, in which stages.

    isoflop   several sizes within each compute budget, one stage per budget; the first stage is
              exact, later ones are drafts with a range of costs until the stage before has given
              its optimum; with a pilot (pilot.py), that is the first stage
    ladder    sizes times multiples of 20 tokens per parameter; one trunk per size
    list      the given (N, D)
    recipes   one stage per budget of a base and its candidates (recipes.py); later stages are
              drafts; the last one has fresh seeds of all
    mixtures  one stage of small runs with different shares, and a draft that checks the best ones
              at more compute (mixtures.py)

Invariant: the highest cost of a plan is within its cap, or there is no plan.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from statistics import geometric_mean

from forescale.ground.errors import UserError
from forescale.scaling.config import StudyJob
from forescale.scaling.design.cells import (
    UNRULED,
    Cell,
    Role,
    make_cell,
    seed_repeats,
    share_trunks,
    with_rate_sweeps,
)
from forescale.scaling.design.mixtures import mixtures_plan
from forescale.scaling.design.pilot import PILOT, pilot_cells
from forescale.scaling.design.plan import SIZES, Grid, Kind, StudyPlan, StudyStage, reserve
from forescale.scaling.design.recipe_grid import RecipeGrid
from forescale.scaling.design.recipes import BASE, Recipe, read_recipes, recipes_of
from forescale.scaling.design.shapes import RATIO, Common

_DRIFT = 2.0  # factor by which the best N may differ from its guess, for the range of costs
_FRESH = 1000  # added to the seed of runs that confirm a recipe
# Config keys of a run that its cell sets.
STUDY_KEYS = frozenset({
    "run.name", "run.root", "run.from.run", "run.from.step", "model", "train.steps",
    "train.tokens", "train.tokens_per_parameter", "train.global_batch", "train.micro_batch",
    "train.sequence_length", "train.seed", "train.init_seed", "optimizer.learning_rate",
    "schedule.kind", "schedule.warmup", "schedule.decay", "checkpoint.at", "launch.processes",
})  # fmt: skip


def isoflop_plan(job: StudyJob, common: Common) -> StudyPlan:
    """Return an isoFLOP plan. Raises UserError if no models of its sizes exist, or if it costs more
    than the cap."""
    if job.plan.sizes < SIZES:
        problem = f"{job.plan.sizes} sizes determine no parabola"
        raise UserError("plan.sizes", problem, f"write plan.sizes={SIZES} or more")
    keys, grid = job.plan, Grid.within_cap(job.plan, common)
    stages = list[StudyStage]()
    try:
        if keys.pilot:
            start = grid.budgets[0]
            cells = pilot_cells(common, start, common.centre(start, grid.ratio), grid.spread)
            cost = sum(c.cost for c in cells)
            stages.append(StudyStage(PILOT, start, cells, cost, cost + reserve(cells), True))
        for number, budget in enumerate(grid.budgets, 1):
            centre = common.centre(budget, grid.ratio)
            tried = [grid.cells(common, number, centre)]
            # A draft has the range of costs over the centres that it may get.
            for factor in (1 / _DRIFT, _DRIFT) if stages else ():
                with suppress(UserError):  # no models there, so no cost
                    tried.append(grid.cells(common, number, centre * factor))
            costs = [sum(c.cost for c in cells) for cells in tried]
            high = max(cost + reserve(cells) for cost, cells in zip(costs, tried, strict=True))
            stages.append(StudyStage(number, budget, tried[0], min(costs), high, not stages))
    except UserError as e:
        problem = f"no grid can start at {grid.budgets[0]:.3g} FLOPs ({e.where}: {e.problem})"
        raise UserError("cap", problem, "raise it, or plan fewer budgets or sizes") from None
    notes = [f"{keys.budgets} budgets; 5 or more are better"] * (keys.budgets < 5)
    notes += [f"{keys.sizes} sizes per budget; 5 to 7 are better"] * (not 5 <= keys.sizes <= 7)
    is_known = keys.pilot or not any(UNRULED in c.flags for s in stages for c in s.cells)
    notes += ["plan.pilot=true finds batch and learning rate by cheap runs first"] * (not is_known)
    plan = StudyPlan("isoflop", common, tuple(stages), keys.cap or 0.0, grid, tuple(notes))
    return _within_cap(plan)


def ladder_plan(job: StudyJob, common: Common) -> StudyPlan:
    """Return a plan with D = 20 N times every multiple for each size.

    The runs of a size branch off one trunk and share the batch and learning rate for the geometric
    mean of their D. The learning-rate sweeps are at the smallest multiple; the others wait for
    them. Raises UserError if the runs determine no law, or if they cost more than the cap.
    """
    sizes, multiples = sorted(job.plan.ladder), sorted(set(job.plan.multiples))
    if len(sizes) < SIZES or len(multiples) < 2 or multiples[0] <= 0:
        problem = f"{len(sizes)} sizes and {len(multiples)} multiples determine no law"
        raise UserError("sizes", problem, "give three or more sizes, and two or more multiples")

    def plan(n: int, k: int) -> StudyPlan:
        middle = RATIO * geometric_mean(multiples[:k])
        shapes, cells = common.family.series(sizes[:n]), list[Cell]()
        for m in multiples[:k]:
            drafts = [
                partial(make_cell, common, f"n{i}-x{m:g}", 1, s, tokens=RATIO * m * s.parameters,
                        recipe_of=middle * s.parameters)
                for i, s in enumerate(shapes)
            ]  # fmt: skip
            if cells:
                cells += [replace(draft(), waits_for=cells[1].waits_for) for draft in drafts]
            else:
                cells = with_rate_sweeps(drafts)
        return _listed("ladder", common, cells, job)

    smaller = (
        (n, k) for n in range(len(sizes), SIZES - 1, -1) for k in range(len(multiples), 1, -1)
    )
    text = "{} sizes up to {:.3g} at {} multiples"
    cheaper = ((text.format(n, sizes[n - 1], k), plan(n, k)) for n, k in smaller)
    return _within_cap(plan(len(sizes), len(multiples)), cheaper)


def list_plan(job: StudyJob, common: Common) -> StudyPlan:
    """Return a plan of the given (N, D), D in tokens, without learning-rate sweeps. Runs of one
    size branch off one trunk. Raises UserError as `ladder_plan` does."""
    runs = [(n, d) for n, d in job.plan.runs]
    sizes = sorted({n for n, _ in runs})
    if len(sizes) < SIZES:
        problem = f"{len(runs)} runs have fewer than {SIZES} different sizes"
        raise UserError("runs", problem, "give (N, D) of three or more sizes")
    shapes, cells = dict(zip(sizes, common.family.series(sizes), strict=True)), list[Cell]()
    for i, (n, d) in enumerate(runs):
        aim = geometric_mean([other for size, other in runs if size == n])
        cells.append(make_cell(common, f"r{i}", 1, shapes[n], tokens=d, recipe_of=aim))
    return _within_cap(_listed("list", common, cells, job))


def _listed(kind: Kind, common: Common, cells: Sequence[Cell], job: StudyJob) -> StudyPlan:
    """Return a plan of one exact stage, with repeats of the cheapest and of the second most
    expensive cell."""
    grown = sorted((c for c in cells if c.role == "grid"), key=lambda c: c.cost)
    seeds = [*seed_repeats(grown[0], common.seeds[0]), *seed_repeats(grown[-2], common.seeds[1])]
    shared = share_trunks([*cells, *seeds])
    cost = sum(c.cost for c in shared)
    stage = StudyStage(1, None, shared, cost, cost + reserve(shared), True)
    return StudyPlan(kind, common, (stage,), job.plan.cap or 0.0)


def _within_cap(plan: StudyPlan, cheaper: Iterable[tuple[str, StudyPlan]] = ()) -> StudyPlan:
    """Return the plan. If it costs more than its cap, raise UserError with the first cheaper plan
    that fits, or with the cheapest."""
    if plan.high <= plan.cap:
        return plan
    problem = f"the plan costs up to {plan.high:.3g} FLOPs, more than the cap of {plan.cap:.3g}"
    todo = "raise it, or remove runs"
    over = max(plan.cells, key=lambda c: c.cost - (c.budget or c.cost))
    if over.budget and over.cost > over.budget:  # by rounding to whole steps
        problem += f": {over.name} costs {over.cost:.3g}, and its budget is {over.budget:.3g}"
        todo = "raise it, or plan fewer budgets or recipes with smaller batches"
    for text, other in cheaper:
        if other.high <= plan.cap:
            raise UserError("plan.cap", problem, f"{text} cost {other.high:.3g} and fit")
        todo = f"raise it; the cheapest such plan, {text}, costs {other.high:.3g}"
    raise UserError("plan.cap", problem, todo)


def recipes_plan(job: StudyJob, common: Common) -> StudyPlan:
    """Return a plan that compares recipes. Raises UserError if there is no model of a budget, or no
    candidate, or if the runs cost more than their budgets and so than the cap."""
    keys = job.plan
    if job.target.is_given:
        todo = "leave target.* out; study fit gives the multipliers at each budget, and their trend"
        raise UserError("target", "is predicted by a law of one recipe", todo)
    named = read_recipes(keys.recipes, keys.base, keys.candidates)
    recipes = recipes_of(keys.shared, named, STUDY_KEYS)
    if len(recipes) < 2:
        todo = "name some: plan.candidates=[swiglu,muon]"
        raise UserError("plan.candidates", "names no recipe to compare with the base", todo)
    common = recipes[0].common(common)
    for recipe in recipes:
        try:
            recipe.common(common).family  # noqa: B018 - raises UserError for sizes without a ratio
        except UserError as e:
            raise UserError(f"recipe {recipe.name}", f"{e.where} {e.problem}", e.todo) from None
    grid = RecipeGrid.within_cap(keys, common, len(recipes))
    try:
        stages = [recipe_stage(common, grid, recipes, i + 1) for i in range(len(grid.budgets))]
    except UserError as e:
        problem = f"no budget can be as low as {grid.budgets[0]:.3g} FLOPs ({e.where}: {e.problem})"
        raise UserError("plan.cap", problem, "raise it, or plan fewer recipes or budgets") from None
    notes = [
        f"each recipe has {grid.trials(2)} runs to find its size and settings at the lowest "
        f"budget, and {grid.trials(3)} at later ones, which begin where earlier ones ended",
        *[f"the last stage has {grid.fresh} fresh seeds of each at its own and others' settings, "
          "then as many more at the best of these, which alone count"] * bool(grid.fresh),
    ]  # fmt: skip
    notes += [note for stage in stages[1 : grid.top] for note in _without_effect(stage, recipes)]
    if grid.fresh:
        highest = stages[grid.top - 1]
        costs = {c.recipe: c.cost for c in highest.cells}
        most = grid.fresh * (5 * sum(costs.values()) - 4 * costs[BASE])
        stages.append(StudyStage(len(stages) + 1, highest.budget, (), 0.0, most, exact=False))
    cap = keys.cap or 0.0
    return _within_cap(
        StudyPlan("recipes", common, tuple(stages), cap, None, tuple(notes), recipes, grid)
    )


def recipe_stage(
    common: Common, grid: RecipeGrid, recipes: Sequence[Recipe], stage: int,
    earlier: Mapping[str, Sequence[Cell]] | None = None,
) -> StudyStage:  # fmt: skip
    """Return the stage of a budget; exact if it is the first, or with a seed of each recipe's
    earlier budgets, around which it searches."""
    trained = recipes if 1 < stage <= grid.top else recipes[:1]  # or the base alone
    known = earlier or {}
    cells = [c for r in trained for c in grid.cells(common, r, stage, known.get(r.name, ()))]
    cost = sum(c.cost for c in cells)
    each = grid.trials(stage) + grid.runs_with_seeds(stage)
    high = sum(each * c.cost for c in cells if c.role == "grid")
    is_exact = stage == 1 or earlier is not None
    budget = grid.budgets[stage - 1]
    return StudyStage(stage, budget, tuple(cells), cost, max(cost, high), is_exact)


def _without_effect(stage: StudyStage, recipes: Sequence[Recipe]) -> list[str]:
    """Return a note for each recipe whose factors and sizes give it the model of the base."""
    keys = {"model.num_heads", "model.num_kv_heads", "model.head_dim", "model.mlp_width"}
    sizes = [{t for t in r.arguments if t.partition("=")[0] in keys} for r in recipes]
    first = {c.recipe: c for c in reversed(stage.cells)}
    base = first[BASE]
    return [
        f"at {stage.budget:.2g} FLOPs {r.name} has the sizes and batch of the base: models and "
        "batches of that size come in larger steps"
        for r, ratios in zip(recipes, sizes, strict=True)
        if ((r.batch, r.aspect) != (1.0, 1.0) or ratios != sizes[0])
        and first[r.name].shape.model.sizes == base.shape.model.sizes
        and first[r.name].global_batch == base.global_batch
    ]


def highest_seeds(plan: StudyPlan) -> dict[str, Cell]:
    """Return a run with another seed of each recipe at the highest budget; a recipe that was left
    out has none."""
    assert plan.recipe_grid is not None, "a study of recipes has a layout"
    return {c.recipe: c for c in plan.stage(plan.recipe_grid.top).cells if c.role == "seed"}


def crossed_cells(plan: StudyPlan, stage: int, of_base: Cell) -> tuple[Cell, ...]:
    """Return fresh seeds at the highest budget: each recipe at its best settings, each candidate at
    the base's and the base at each candidate's, where they differ and can be trained; () if none
    differ. of_base: the base's best cell; if it is one of these, all get its settings too."""
    grid, best = plan.recipe_grid, highest_seeds(plan)
    assert grid is not None, "a study of recipes has a layout"
    every, cells = [(r, best[r.name]) for r in plan.recipes if r.name in best], [*best.values()]
    pairs = [(every[0], one) for one in every[1:]] + [(one, every[0]) for one in every[1:]]
    if of_base.role == "crossed":
        pairs += [((every[0][0], of_base), one) for one in every[1:]]
    for other, one in pairs:
        with suppress(UserError):  # such as a quarter of a batch of one window
            moved = grid.at_settings_of(plan.common, *other, *one)
            is_new = (moved.trial, moved.learning_rate) != (one[1].trial, one[1].learning_rate)
            cells += [moved] * is_new
    return reseeded(plan, stage, cells, "crossed") if len(cells) > len(every) else ()


def reseeded(plan: StudyPlan, stage: int, cells: Sequence[Cell], role: Role) -> tuple[Cell, ...]:
    """Return runs of these cells with new seeds; crossed ones, which choose, are named fresh."""
    assert plan.recipe_grid is not None, "a study of recipes has a layout"
    number, name = plan.recipe_grid.fresh, "fresh" if role == "crossed" else role
    first = plan.common.seed + _FRESH + number * (role == "confirm")
    return tuple(
        replace(c, name=f"{name}-{c.recipe}-at-{c.cell_of}-seed{i + 1}", stage=stage, role=role,
                seed=first + i)
        for c in cells
        for i in range(number)
    )  # fmt: skip


PLANS: Mapping[str, Callable[[StudyJob, Common], StudyPlan]] = {
    "isoflop": isoflop_plan, "ladder": ladder_plan, "list": list_plan, "recipes": recipes_plan,
    "mixtures": lambda job, common: _within_cap(mixtures_plan(job, common)),
}  # fmt: skip
