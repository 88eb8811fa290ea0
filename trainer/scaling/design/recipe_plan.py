"""The plan of a study of recipes: a base and its candidates, tuned alike, at equal compute.

    a stage    one budget: of each recipe three learning rates, and runs with other seeds at the
               best of them, which wait for it
    the last   fresh seeds for the winners and the base at the highest budget

    size       the base's layers and width; a recipe with other parts has another N, and as many
               tokens as its budget pays for by its own FLOPs a token

Invariant: stages but the first are drafts; their sweeps begin at the rates that the budgets before
gave (study/recipes.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from forescale.errors import UserError
from forescale.scaling.design.cells import FACTOR, Cell, Role, make_cell
from forescale.scaling.design.plan import StudyPlan, StudyStage
from forescale.scaling.design.recipe import BASE, Found, Recipe, RecipeGrid
from forescale.scaling.design.shapes import Common, Shape

_FRESH = 1000  # added to the seed of runs that confirm a winner


def shape_of(common: Common, own: Common, recipe: Recipe, budget: float, ratio: float) -> Shape:
    """Return the model of a recipe at a budget: with the base's layers and width, or, where its
    aspect or heads forbid that, the one with the nearest N. common: the base's."""
    (base,) = common.family.nearest([common.centre(budget, ratio)])
    sizes = base.model.sizes
    if recipe.aspect == 1.0:
        try:
            model = own.family.model(sizes.width, sizes.num_layers)
        except UserError:
            return own.family.nearest([base.parameters])[0]
        return Shape(float(base.parameters), own.size, model)
    return own.family.nearest([base.parameters])[0]


def recipe_cells(
    common: Common, grid: RecipeGrid, recipe: Recipe, stage: int,
    found: Found = (),
) -> list[Cell]:  # fmt: skip
    """Return the sweep of a recipe and its seeds, which wait for it. found: as in
    Recipe.common."""
    budget, own = grid.budgets[stage - 1], recipe.common(common, found)
    shape = shape_of(common, own, recipe, budget, grid.ratio)
    name = f"b{stage}-{recipe.name}"

    def made(suffix: str, factor: float, role: Role) -> Cell:
        cell = make_cell(
            own, name, stage, shape, budget, role="grid", rate_factor=factor,
            batch_factor=recipe.batch, first_batch=recipe.first_batch, suffix=suffix,
        )  # fmt: skip
        return replace(cell, role=role, recipe=recipe.name)

    factors: list[tuple[float, str, Role]] = [
        (1.0, "", "grid"), (1 / FACTOR, "-lr-low", "rate"), (FACTOR, "-lr-high", "rate"),
    ]  # fmt: skip
    sweep = [made(suffix, factor, role) for factor, suffix, role in factors]
    # Both seeds change at once: the noise of a run is that of its weights and its data together.
    seeds = [
        replace(made(f"-seed{i + 1}", 1.0, "seed"), seed=common.seed + 1 + i,
                waits_for=tuple(c.name for c in sweep))
        for i in range(grid.seeds[grid.is_high(stage)])
    ]  # fmt: skip
    return [*sweep, *seeds]


def recipe_stage(
    common: Common, grid: RecipeGrid, recipes: Sequence[Recipe], stage: int,
    found: Mapping[str, Found] | None = None,
) -> StudyStage:  # fmt: skip
    """Return the stage of a budget; exact if it is the first, or if the rates so far are given.
    found: of each recipe, as in Recipe.common."""
    own = recipes if grid.has_candidates(stage) else recipes[:1]
    known = found or {}
    cells = [c for r in own for c in recipe_cells(common, grid, r, stage, known.get(r.name, ()))]
    cost = sum(c.cost for c in cells)
    reserve = grid.extra(stage) * sum(c.cost for c in cells if c.role == "grid")
    is_exact = stage == 1 or found is not None
    return StudyStage(stage, grid.budgets[stage - 1], tuple(cells), cost, cost + reserve, is_exact)


def recipe_plan(
    common: Common, grid: RecipeGrid, recipes: Sequence[Recipe], cap: float
) -> StudyPlan:
    """Return the plan. cap: FLOPs, counted by common.cost. Raises UserError if there is no model
    of a budget, or no candidate, or if the runs cost more than their budgets and so than the cap.
    """
    if len(recipes) < 2:
        todo = "name some: plan.candidates=[swiglu,muon]"
        raise UserError("plan.candidates", "names no recipe to compare with the base", todo)
    common = recipes[0].common(common)
    for recipe in recipes:
        try:
            recipe.common(common).family  # noqa: B018 - raises UserError for sizes without a ratio
        except UserError as e:
            raise UserError(f"recipe {recipe.name}", f"{e.where} {e.problem}", e.todo) from None
    try:
        stages = [recipe_stage(common, grid, recipes, i + 1) for i in range(len(grid.budgets))]
    except UserError as e:
        problem = f"no budget can be as low as {grid.budgets[0]:.3g} FLOPs ({e.where}: {e.problem})"
        raise UserError("plan.cap", problem, "raise it, or plan fewer recipes or budgets") from None
    number, highest = len(stages) + 1, stages[grid.top - 1]
    once = sum({c.recipe: c.cost for c in highest.cells}.values())
    fresh = StudyStage(number, highest.budget, (), 0.0, grid.fresh * once, exact=False)
    notes = [f"the last stage has {grid.fresh} fresh seeds of each winner and of the base, if "
             "there is a winner"]  # fmt: skip
    notes += [note for stage in stages[1 : grid.top] for note in _without_effect(stage, recipes)]
    made = StudyPlan(
        "recipes", common, (*stages, *[fresh] * bool(grid.fresh)), cap, None, tuple(notes),
        tuple(recipes), grid,
    )  # fmt: skip
    _expect_within_cap(made)
    return made


def _expect_within_cap(plan: StudyPlan) -> None:
    """Raise UserError if runs cost more than their budgets, by rounding to whole steps, and so all
    of them more than the cap."""
    if plan.high <= plan.cap:
        return
    over = max(plan.cells, key=lambda c: c.cost - (c.budget or 0.0))
    problem = f"the plan costs up to {plan.high:.3g} FLOPs, more than the cap of {plan.cap:.3g}: "
    problem += f"{over.name} costs {over.cost:.3g}, and its budget is {over.budget:.3g}"
    todo = "raise it, or plan fewer budgets or recipes with smaller batches"
    raise UserError("plan.cap", problem, todo)


def _without_effect(stage: StudyStage, recipes: Sequence[Recipe]) -> list[str]:
    """Return a note for each recipe whose factors and sizes give it the model of the base."""
    first = {c.recipe: c for c in reversed(stage.cells)}
    base = first[BASE]
    return [
        f"at {stage.budget:.2g} FLOPs {r.name} has the sizes and batch of the base: models and "
        "batches of that size come in larger steps"
        for r in recipes
        if ((r.batch, r.aspect) != (1.0, 1.0) or _sizes(r) != _sizes(recipes[0]))
        and first[r.name].shape.model.sizes == base.shape.model.sizes
        and first[r.name].global_batch == base.global_batch
    ]


def _sizes(recipe: Recipe) -> set[str]:
    """Return the arguments of a recipe that set sizes, of which it keeps the ratios."""
    keys = {"model.num_heads", "model.num_kv_heads", "model.head_dim", "model.mlp_width"}
    return {text for text in recipe.arguments if text.partition("=")[0] in keys}


def highest_seeds(plan: StudyPlan) -> dict[str, Cell]:
    """Return a run with another seed at the highest budget, of each recipe that has one there; one
    that always diverged has none."""
    grid = plan.recipe_grid
    assert grid is not None, "a study of recipes has a layout"
    return {c.recipe: c for c in plan.cells if (c.stage, c.role) == (grid.top, "seed")}


def fresh_cells(plan: StudyPlan, names: Sequence[str], stage: StudyStage) -> tuple[Cell, ...]:
    """Return the runs that confirm these recipes, and those of the base: copies of their seeds at
    the highest budget, with seeds that no other run has. names: of `highest_seeds`."""
    grid, likes = plan.recipe_grid, highest_seeds(plan)
    assert grid is not None, "a study of recipes has a layout"
    found = list[Cell]()
    for name in (BASE, *names):
        like = likes[name]
        for i in range(grid.fresh):
            seed = plan.common.seed + _FRESH + i
            found.append(replace(like, name=f"fresh-{name}-seed{i + 1}", stage=stage.number,
                                 role="confirm", seed=seed))  # fmt: skip
    return tuple(found)
