"""`study plan`: what a study would run, what that costs, and how sure it would be of its target.

Invariant: nothing is launched here, and nothing is planned that costs more than the cap.
"""

from collections import Counter

from rich.console import Console
from rich.table import Table

from forescale.config.compose import compose
from forescale.config.train import TrainJob
from forescale.console import table
from forescale.errors import UserError
from forescale.models.config import ModelConfig
from forescale.run.start import open_sources
from forescale.scaling.config import StudyJob
from forescale.scaling.design.plan import Grid, Plan, explicit, isoflop_grid, ladder
from forescale.scaling.design.shapes import Common
from forescale.scaling.design.simulate import Design, Expected, Target, expected

_SECONDS_AN_HOUR = 3600.0
_OWN = {
    *("run.name", "run.root", "run.from.run", "run.from.step", "model", "train.steps"),
    *("train.tokens", "train.global_batch", "train.micro_batch", "train.sequence_length"),
    *("train.seed", "train.init_seed", "optimizer.learning_rate", "schedule.kind"),
    *("schedule.warmup", "schedule.decay", "checkpoint.at"),
}  # keys of a run that a cell sets


def plan(job: StudyJob) -> tuple[Plan, Expected | None]:
    """The design, and what it would be worth at the target, if one is given. Raises UserError where
    it can't be had for the cap."""
    asked = job.plan
    if asked.cap is None:
        raise UserError("plan.cap", "is not given", "write plan.cap=1e16: FLOPs that may be spent")
    common = common_of(job)
    if asked.kind == "ladder":
        made = ladder(common, asked.ladder, asked.multiples, asked.cap)
    elif asked.kind == "list":
        made = explicit(common, [(n, d) for n, d in asked.runs], asked.cap)
    else:
        layout = (asked.budgets, asked.sizes, asked.spread, asked.step, asked.ratio)
        grid = Grid.under(asked.cap, *layout, common.seeds, common.cross)
        made = isoflop_grid(common, grid, asked.cap)
    t = job.target
    if not t.is_given:
        return made, None
    target = Target.of(common, t.flops, t.parameters, t.tokens, t.device_hours)
    return made, expected(Design.of(made), target, seed=job.seed, near=job.near)


def common_of(job: StudyJob) -> Common:
    """What all cells share: the model's kind, the data's vocabulary and size, and conventions.
    Raises UserError, or ConfigError, for words that no run takes, or that cells set themselves."""
    asked = job.plan
    for word in asked.words:
        if (key := word.partition("=")[0]) in _OWN:
            todo = "leave it out: see the keys under plan"
            raise UserError("plan.words", f"{key} is what a study sets itself", todo)
    train = compose(TrainJob, asked.shared)
    if not isinstance(train.model, ModelConfig):
        raise UserError("plan.model", f"{asked.model} has no sizes of ours", "choose another model")
    vocabulary, unique = asked.vocab_size, asked.unique
    adam = train.optimizer.adam_learning_rate
    if vocabulary is None or unique is None:
        sources = open_sources(train.data)
        vocabulary = vocabulary or sources.vocab_size
        splits = sources.split("train").values()
        unique = unique or float(sum(split.num_tokens for split in splits))
    return Common(
        train.model,
        vocabulary,
        asked.sequence_length,
        size=job.size,
        cost=job.cost,
        micro_batch=asked.micro_batch,
        seed=job.seed or train.train.seed,
        rate=asked.rate,
        unique=unique,
        seeds=_seeds(asked.seeds),
        cross=asked.cross,
        adam_share=adam / train.optimizer.learning_rate if adam else None,
    )


def _seeds(given: list[int]) -> tuple[int, int]:
    if len(given) != 2 or min(given) < 1:
        todo = "write plan.seeds=[5,3]: of the cheapest cell, and of one near the top"
        raise UserError("plan.seeds", f"{given} are no two numbers of seeds", todo)
    return given[0], given[1]


def show(made: Plan, sure: Expected | None, console: Console) -> None:
    """Print the page."""
    n = len(made.cells)
    console.print(
        f"{made.kind}: {n} runs in {len(made.stages)} stages; at most {made.high:.3g} of "
        f"{made.cap:.3g} FLOPs"
    )
    console.print()
    console.print(_stages(made))
    console.print()
    console.print(_cells(made))
    if sure is not None:
        half, bare = sure.half, sure.bare
        console.print(
            f"\nTarget {sure.beyond:.3g} times beyond the dearest run: expected ± {half[0.5]:.1%} "
            f"(50%), ± {half[0.9]:.1%} (90%); of it the runs' noise {bare[0.5]:.1%}, "
            f"{bare[0.9]:.1%}: more runs narrow that alone, dearer ones both. From {sure.draws} "
            "made-up surfaces; seed noise and tuning gap are assumed until stage 1 measures them.",
            soft_wrap=True,
        )
    flags = Counter(flag for cell in made.cells for flag in cell.flags)
    for flag, count in flags.most_common():
        console.print(f"[yellow]Note:[/] {count} of {n} runs: {flag}.", soft_wrap=True)
    for note in made.notes:
        console.print(f"[yellow]Note:[/] {note}.")


def _stages(made: Plan) -> Table:
    rows = table("stage", "budget", "runs", "FLOPs", "device-hours")
    rate = made.common.rate
    for stage in made.stages:
        ends = (stage.low, stage.high)
        cost = f"{ends[0]:.3g}" if stage.exact else f"{ends[0]:.3g} to {ends[1]:.3g}"
        hours = f"{ends[1] / rate / _SECONDS_AN_HOUR:,.2f}" if rate else "-"
        budget = f"{stage.budget:.3g}" if stage.budget else "-"
        rows.add_row(str(stage.number), budget, str(len(stage.cells)), cost, hours)
    return rows


def _cells(made: Plan) -> Table:
    """Every run; of a stage that awaits others as a draft, with its cost as about so much."""
    names = ("run", "for", "N", "layers x width", "tokens", "D/N", "steps", "batch", "rate")
    rows = table(*names, "FLOPs", left=("run", "for"))
    for stage in made.stages:
        about = "" if stage.exact else "~"
        for c in stage.cells:
            s = c.shape.model.sizes
            rows.add_row(
                c.name,
                c.role,
                f"{about}{c.shape.parameters:,}",
                f"{s.num_layers} x {s.width}",
                f"{about}{c.tokens:,}",
                f"{c.tokens / c.shape.parameters:.0f}",
                f"{c.steps:,}",
                str(c.global_batch),
                "awaits" if c.awaits else f"{about}{c.learning_rate:.2g}",
                f"{about}{c.cost:.2e}",
            )
    return rows
