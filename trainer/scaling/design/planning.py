"""`study plan`: chooses the runs, prices them, and simulates how precise the prediction will be.

Invariant: nothing is launched here, and no plan costs more than its cap.
"""

from collections import Counter

from rich.console import Console
from rich.table import Table

from forescale.config.compose import compose
from forescale.config.train import TrainJob
from forescale.console import table
from forescale.errors import UserError
from forescale.models.config import ModelConfig
from forescale.run.start import embedded_vocabulary, open_sources
from forescale.scaling.config import StudyJob
from forescale.scaling.design.cells import Cell
from forescale.scaling.design.plan import Grid, StudyPlan, explicit, isoflop_grid, ladder
from forescale.scaling.design.recipe import RecipeGrid, recipes_of
from forescale.scaling.design.recipe_file import read_recipes
from forescale.scaling.design.recipe_plan import recipe_plan
from forescale.scaling.design.shapes import Common
from forescale.scaling.design.simulate import Expected, RunSet, Target, expected

_SECONDS_AN_HOUR = 3600.0
_STUDY_OWNED = {
    *("run.name", "run.root", "run.from.run", "run.from.step", "model", "train.steps"),
    *("train.tokens", "train.tokens_per_parameter", "train.global_batch", "train.micro_batch"),
    *("train.sequence_length", "train.seed", "train.init_seed", "optimizer.learning_rate"),
    *("schedule.kind", "schedule.warmup", "schedule.decay", "checkpoint.at", "launch.processes"),
}  # config keys of a run that its cell sets


def plan(job: StudyJob) -> tuple[StudyPlan, Expected | None]:
    """Return the plan, and the precision of its prediction if a target is given. Raises UserError
    if no such plan fits under the cap."""
    keys = job.plan
    if keys.cap is None:
        todo = "write plan.cap=1e16, the FLOPs that the study may spend"
        raise UserError("plan.cap", "is not given", todo)
    common = common_of(job, opened=True)
    if keys.kind == "recipes":
        return _of_recipes(job, common), None
    if keys.kind == "ladder":
        made = ladder(common, keys.ladder, keys.multiples, keys.cap)
    elif keys.kind == "list":
        made = explicit(common, [(n, d) for n, d in keys.runs], keys.cap)
    else:
        layout = (keys.budgets, keys.sizes, keys.spread, keys.step, keys.ratio)
        grid = Grid.within_cap(keys.cap, *layout, common.seeds, common.joint_sweep)
        made = isoflop_grid(common, grid, keys.cap)
    t = job.target
    if not t.is_given:
        return made, None
    target = Target.of(common, t)
    return made, expected(RunSet.of(made), target, seed=job.seed, near=job.near)


def _of_recipes(job: StudyJob, common: Common) -> StudyPlan:
    keys, cap = job.plan, job.plan.cap or 0.0
    if job.target.is_given:
        todo = "leave target.* out; study fit gives the multipliers at each budget, and their trend"
        raise UserError("target", "is predicted by a law of one recipe", todo)
    named = read_recipes(keys.recipes, keys.base, keys.candidates)
    recipes = recipes_of(keys.shared, named, frozenset(_STUDY_OWNED))
    grid = RecipeGrid.within_cap(
        cap,
        len(recipes),
        keys.budgets,
        keys.step,
        keys.ratio,
        common.seeds,
        keys.fresh,
        keys.beyond,
    )
    return recipe_plan(common, grid, recipes, cap)


def common_of(job: StudyJob, opened: bool = False) -> Common:
    """Return what all cells have in common: base model, vocabulary, data size and conventions.

    opened: the embedded corpus is opened too, for the number of its tokens, and prepared if it is
    missing; else runs that name no data may have any number of tokens. Raises UserError
    (ConfigError is one) if plan.arguments has keys that `train` doesn't know or that each cell sets
    itself.
    """
    keys = job.plan
    for argument in keys.arguments:
        if (key := argument.partition("=")[0]) in _STUDY_OWNED:
            todo = (
                "leave it out; forescale study plan --help lists the keys that a study has instead"
            )
            raise UserError("plan.arguments", f"{key} is set by the study itself", todo)
    train = compose(TrainJob, keys.shared)
    if train.train.first_batch is not None:
        problem = "would make runs shorter than their cells, whose steps have one batch each"
        raise UserError("train.first_batch", problem, "leave it out, and train.batch_ramp")
    if not isinstance(train.model, ModelConfig):
        todo = "choose a model=CHOICE whose width and layers forescale sets"
        raise UserError("plan.model", f"{keys.model} is a class of your own, without sizes", todo)
    if not train.objective.is_next_token:
        problem = (
            f"objective {train.objective.kind} has other targets than each next token, which D, "
        )
        problem += "C and the laws of a study count"
        todo = "take it out, and compare runs of it by `forescale eval`"
        raise UserError("plan.arguments", problem, todo)
    if keys.micro_batch % keys.ranks:
        problem = f"{keys.micro_batch} windows don't divide by plan.ranks={keys.ranks}"
        raise UserError("plan.micro_batch", problem, f"make it a multiple of {keys.ranks}")
    vocabulary, unique = keys.vocab_size, keys.unique
    adam = train.optimizer.adam_learning_rate
    embedded = embedded_vocabulary(train.data)
    if embedded and not opened:
        vocabulary = vocabulary or embedded
    elif vocabulary is None or unique is None:
        sources = open_sources(train.data)
        vocabulary = vocabulary or sources.vocab_size
        splits = sources.split("train").values()
        unique = unique or float(sum(split.num_tokens for split in splits))
    return Common(
        train.model,
        vocabulary,
        keys.sequence_length,
        size=job.size,
        cost=job.cost,
        micro_batch=keys.micro_batch,
        ranks=keys.ranks,
        seed=job.seed or train.train.seed,
        rate=keys.rate,
        unique=unique,
        seeds=_seeds(keys.seeds),
        joint_sweep=keys.joint_sweep,
        adam_share=adam / train.optimizer.learning_rate if adam else None,
    )


def _seeds(given: list[int]) -> tuple[int, int]:
    if len(given) != 2 or min(given) < 1:
        todo = "write plan.seeds=[5,3], for the cheapest cell and for an expensive one"
        raise UserError("plan.seeds", f"{given} are not two counts of 1 or more", todo)
    return given[0], given[1]


def show(made: StudyPlan, precision: Expected | None, console: Console) -> None:
    """Print the plan."""
    n = len(made.cells)
    console.print(
        f"{made.kind}: {n} runs in {len(made.stages)} stages; at most {made.high:.3g} of "
        f"{made.cap:.3g} FLOPs"
    )
    console.print()
    console.print(_stages(made))
    console.print()
    console.print(_cells(made))
    if precision is not None:
        half, noise = precision.half, precision.without_discrepancy
        console.print(
            f"\nThe target has {precision.extrapolation_factor:.3g} times the compute of the most "
            f"expensive run. Expected prediction interval: ± {half[0.5]:.1%} (50%), "
            f"± {half[0.9]:.1%} (90%). Of this, ± {noise[0.5]:.1%} and ± {noise[0.9]:.1%} come "
            "from the noise of the runs; more runs narrow that part, more expensive runs narrow "
            f"both. From {precision.draws} simulated studies, which assume seed noise and tuning "
            "gap; stage 1 measures both.",
            soft_wrap=True,
        )
    flags = Counter(flag for cell in made.cells for flag in cell.flags)
    for flag, count in flags.most_common():
        console.print(f"[yellow]Note:[/] {count} of {n} runs: {flag}.", soft_wrap=True)
    for note in made.notes:
        console.print(f"[yellow]Note:[/] {note}.")


def _stages(made: StudyPlan) -> Table:
    rows = table("stage", "budget", "runs", "FLOPs", "device-hours")
    rate = made.common.rate
    for stage in made.stages:
        ends = (stage.low, stage.high)
        cost = f"{ends[0]:.3g}" if stage.exact else f"{ends[0]:.3g} to {ends[1]:.3g}"
        hours = f"{ends[1] / rate / _SECONDS_AN_HOUR:,.2f}" if rate else "-"
        budget = f"{stage.budget:.3g}" if stage.budget else "-"
        rows.add_row(str(stage.number), budget, str(len(stage.cells)), cost, hours)
    return rows


def _cells(made: StudyPlan) -> Table:
    """Every run, or of recipes, which have the same runs at each budget, a row a recipe and budget;
    those of a draft stage with ~ before what may still change."""
    are_recipes = made.kind == "recipes"
    second = "runs" if are_recipes else "role"
    names = ("run", second, "N", "layers x width", "tokens", "D/N", "steps", "batch", "rate")
    rows = table(*names, "FLOPs", left=("run", "role"))
    for stage in made.stages:
        about = "" if stage.exact else "~"
        for c in stage.cells:
            if are_recipes and c.role != "grid":
                continue
            alike = [other for other in stage.cells if other.cell_of == c.name]
            s = c.shape.model.sizes
            rows.add_row(
                c.name,
                str(len(alike)) if are_recipes else c.role,
                f"{about}{c.shape.parameters:,}",
                f"{s.num_layers} x {s.width}",
                f"{about}{c.tokens:,}",
                f"{c.tokens / c.shape.parameters:.0f}",
                f"{c.steps:,}",
                str(c.global_batch),
                _rates(alike if are_recipes else [c], about),
                f"{about}{c.cost:.2e}",
            )
    return rows


def _rates(cells: list[Cell], about: str) -> str:
    """Return the learning rates of cells, as far as they are known."""
    known = sorted({c.learning_rate for c in cells if not c.waits_for})
    if len(known) > 1:
        return f"{about}{known[0]:.2g} to {known[-1]:.2g}"
    return f"{about}{known[0]:.2g}" if known else "pending"
