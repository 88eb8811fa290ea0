"""`study plan`: chooses the runs, prices them, and simulates how precise the prediction will be.

Invariant: nothing is launched here, and no plan costs more than its cap.
"""

from collections import Counter

from rich.console import Console
from rich.table import Table

from forescale.config.compose import compose
from forescale.config.train import TrainJob
from forescale.ground.console import table
from forescale.ground.errors import UserError
from forescale.models.config import ModelConfig
from forescale.run.start import embedded_vocabulary, open_sources
from forescale.scaling.config import StudyJob
from forescale.scaling.design.kinds import PLANS, STUDY_KEYS
from forescale.scaling.design.plan import StudyPlan
from forescale.scaling.design.shapes import Common, shares_of
from forescale.scaling.design.simulate import Expected, RunSet, expected


def plan(job: StudyJob) -> tuple[StudyPlan, Expected | None]:
    """Return the plan, and the precision of its prediction if a target is given. Raises UserError
    if no such plan fits under the cap."""
    if job.plan.cap is None:
        todo = "write plan.cap=1e16, the FLOPs that the study may spend"
        raise UserError("plan.cap", "is not given", todo)
    common = common_of(job, opened=True)
    planned = PLANS[job.plan.kind](job, common)
    if not job.target.is_given:
        return planned, None
    target = RunSet.of_target(common, job.target)
    return planned, expected(RunSet.of(planned), target, seed=job.seed, near=job.near)


def common_of(job: StudyJob, opened: bool = False) -> Common:
    """Return what all cells have in common: base model, vocabulary, data size and conventions.
    opened: the embedded corpus is opened too, for the number of its tokens, and prepared if it is
    missing. Raises UserError (ConfigError is one) for arguments that runs of a study can't have."""
    keys = job.plan
    for argument in keys.arguments:
        if (key := argument.partition("=")[0]) in STUDY_KEYS:
            todo = "leave it out; forescale study plan --help lists the keys of a study instead"
            raise UserError("plan.arguments", f"{key} is set by the study itself", todo)
    train = compose(TrainJob, keys.shared)
    if train.train.first_batch is not None:
        problem = "would make runs shorter than their cells, whose steps have one batch each"
        raise UserError("train.first_batch", problem, "leave it out, and train.batch_ramp")
    if not isinstance(train.model, ModelConfig):
        todo = "choose a model=CHOICE of forescale: a study sets width and layers"
        raise UserError("plan.model", f"{keys.model} is a class without sizes", todo)
    if not train.objective.is_next_token:
        problem = f"objective {train.objective.kind} has other targets than each next token, which "
        problem += "D, C and the laws of a study count"
        todo = "take it out, and compare runs of it by `forescale eval`"
        raise UserError("plan.arguments", problem, todo)
    if keys.micro_batch % keys.ranks:
        problem = f"{keys.micro_batch} windows don't divide by plan.ranks={keys.ranks}"
        raise UserError("plan.micro_batch", problem, f"make it a multiple of {keys.ranks}")
    if len(keys.seeds) != 2 or min(keys.seeds) < 1:
        todo = "write plan.seeds=[5,3], for the cheapest cell and for an expensive one"
        raise UserError("plan.seeds", f"{keys.seeds} are not two counts of 1 or more", todo)
    vocabulary, unique = keys.vocab_size, keys.unique
    embedded = embedded_vocabulary(train.data)
    if embedded and not opened:
        vocabulary = vocabulary or embedded
    elif vocabulary is None or unique is None:
        sources = open_sources(train.data)
        vocabulary = vocabulary or sources.vocab_size
        splits = sources.split("train").values()
        unique = unique or float(sum(split.num_tokens for split in splits))
    return Common(
        train.model, vocabulary, keys.sequence_length, size=job.size, cost=job.cost,
        micro_batch=keys.micro_batch, ranks=keys.ranks, seed=job.seed or train.train.seed,
        rate=keys.rate, unique=unique, seeds=(keys.seeds[0], keys.seeds[1]),
        joint_sweep=keys.joint_sweep, shares=shares_of(train.optimizer),
    )  # fmt: skip


def show(plan: StudyPlan, precision: Expected | None, console: Console) -> None:
    """Print the plan."""
    n = len(plan.cells)
    cost = f"at most {plan.high:.3g} of {plan.cap:.3g} FLOPs"
    console.print(f"{plan.kind}: {n} runs in {len(plan.stages)} stages; {cost}\n")
    stages = table("stage", "budget", "runs", "FLOPs", "device-hours")
    rate = plan.common.rate
    for stage in plan.stages:
        cost = f"{stage.low:.3g}" if stage.exact else f"{stage.low:.3g} to {stage.high:.3g}"
        hours = f"{stage.high / rate / 3600:,.2f}" if rate else "-"
        budget = f"{stage.budget:.3g}" if stage.budget else "-"
        stages.add_row(str(stage.number), budget, str(len(stage.cells)), cost, hours)
    console.print(stages)
    console.print()
    console.print(_cells(plan))
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
    flags = Counter(flag for cell in plan.cells for flag in cell.flags)
    notes = [f"{count} of {n} runs: {flag}" for flag, count in flags.most_common()]
    for note in (*notes, *plan.notes):
        console.print(f"[yellow]Note:[/] {note}.", soft_wrap=True)


def _cells(plan: StudyPlan) -> Table:
    """Return a row for each run. Recipes, which have the same runs at each budget, have a row for
    each recipe and budget; mixtures have their shares. In a draft stage ~ stands before what may
    still change."""
    second = "runs" if plan.recipes else "role"
    sources = [name for name, _ in plan.cells[0].weights]
    names = ("N", "layers x width", "tokens", "D/N", "steps", "batch", "rate")
    rows = table("run", second, *sources, *names, "FLOPs", left=("run", "role"))
    for stage in plan.stages:
        about = "" if stage.exact else "~"
        for c in stage.cells:
            if plan.recipes and c.role != "grid":
                continue
            alike = [x for x in stage.cells if x.cell_of == c.name] if plan.recipes else [c]
            s, n = c.shape.model.sizes, c.shape.parameters
            known = sorted({x.learning_rate for x in alike if not x.waits_for})
            rates = f"{about}{known[0]:.2g}" if known else "pending"
            rates += f" to {known[-1]:.2g}" if len(known) > 1 else ""
            rows.add_row(
                c.name, str(len(alike)) if plan.recipes else c.role,
                *(f"{share:.1%}" for _, share in c.weights), f"{about}{n:,}",
                f"{s.num_layers} x {s.width}", f"{about}{c.tokens:,}", f"{c.tokens / n:.0f}",
                f"{c.steps:,}", str(c.global_batch), rates, f"{about}{c.cost:.2e}",
            )  # fmt: skip
    return rows
