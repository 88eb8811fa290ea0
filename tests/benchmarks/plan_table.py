"""What plan answers for known models on 8 to 1,024 H100, as a table in Markdown:

    python tests/benchmarks/plan_table.py

For each recipe and number of GPUs: the ZeRO stage, micro-batch and choice of activation
checkpointing that take the least time and fit, compiled, with the batch of the recipe. Beside it
the MFU of MosaicML's model of that size, from published.csv.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from forescale.config.compose import compose
from forescale.plan.config import PlanJob
from forescale.plan.options import ShardingOption, ShardingOptions, cheapest
from forescale.plan.plan import Plan
from tests.benchmarks import published

RECIPES = ("llama-1b", "llama-7b", "llama-13b", "llama-70b", "mixtral-8x7b")
GPUS = (8, 64, 256, 1024)
HEAD = ("recipe", "H100", "ZeRO", "stages that fit", "micro-batch", "recomputed", "GiB a GPU",
        "MFU", "tokens/s a GPU", "published MFU")  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """The fastest way that fits, or None; stages: names of all that fit; least: GiB of a GPU that
    the way with the least memory needs."""

    recipe: str
    gpus: int
    best: ShardingOption | None
    stages: list[str]
    least: float

    @property
    def cells(self) -> list[str]:
        """The row of the table, below HEAD."""
        published = published_mfu(self.recipe, self.gpus)
        if (o := self.best) is None:
            needs = [f"none fits: {self.least:,.0f} GiB at least", *[""] * 6]
            return [self.recipe, f"{self.gpus:,}", *needs, published]
        again = getattr(o.job.model, "activation_checkpointing", "none")
        speed = (o.step.tokens_per_second or 0.0) / self.gpus
        return [
            self.recipe,
            f"{self.gpus:,}",
            o.name.removeprefix("zero"),
            ", ".join(name.removeprefix("zero") for name in self.stages),
            str(o.job.train.micro_batch),
            again,
            f"{o.memory.total / 2**30:,.0f}",
            f"{o.step.mfu or 0.0:.1%}".replace("%", " %"),
            f"{speed:,.0f}",
            published,
        ]


def answer(recipe: str, gpus: int) -> Answer:
    """Return the fastest of all stages, with each activation checkpointing; of ways that are as
    fast the one that shards the least."""
    every = [*ways(recipe, gpus)]
    fitting = [option for option, fits in every if fits]
    least = min(option.memory.total for option, _ in every) / 2**30
    names = sorted({option.name for option in fitting})
    return Answer(recipe, gpus, cheapest(fitting, float("inf")), names, least)


def ways(recipe: str, gpus: int) -> Iterator[tuple[ShardingOption, bool]]:
    """Yield each stage, with each checkpointing, at the largest micro-batch that fits, and
    whether one does."""
    for again in ("none", "selective", "full"):
        words = [f"recipe={recipe}", f"plan.gpus={gpus}", "train.micro_batch=1"]
        plan = Plan(compose(PlanJob, [*words, f"model.activation_checkpointing={again}"]))
        all_of = ShardingOptions(
            plan.trained, plan.per_token, plan.machine, plan.given.plan, plan.measured
        )
        for option in plan.options:
            if (micro := option.largest_micro_batch) is None:
                yield option, False
            else:
                train = replace(option.job.train, micro_batch=micro)
                yield all_of.evaluate(replace(option.job, train=train)), True


def published_mfu(recipe: str, gpus: int) -> str:
    """Return the MFU of MosaicML's model of that size on as many H100, or on the most there are."""
    model = recipe.replace("llama", "mpt")
    rows = [
        row
        for row in published.read()
        if (row.model, row.machine, row.source, row.length) == (model, "h100", "mosaic", 2048)
        and row.gpus <= gpus
    ]
    if not rows:
        return ""
    row = max(rows, key=lambda row: (row.gpus, row.speed))
    on = "" if row.gpus == gpus else f" ({row.gpus} GPUs)"
    return f"{row.speed * row.mfu_of_speed:.1%}".replace("%", " %") + on


def table(recipes: Sequence[str] = RECIPES, gpus: Sequence[int] = GPUS) -> str:
    """Return the whole table."""
    rows = [HEAD, ["---"] * len(HEAD)]
    rows += [answer(recipe, number).cells for recipe in recipes for number in gpus]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(table())
