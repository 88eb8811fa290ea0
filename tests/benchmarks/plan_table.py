"""What plan answers for known models on 8 to 1,024 H100, as a table in Markdown, and how far its
speeds are from published ones (published.py):

    python tests/benchmarks/plan_table.py
    python tests/benchmarks/plan_table.py published

For each recipe and number of GPUs: the best division (plan/search.py), compiled, with the batch of
the recipe. Beside it the MFU of MosaicML's model of that size, from published.csv.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from forescale.config.compose import compose
from forescale.plan.config import PlanJob
from forescale.plan.options import name_of
from forescale.plan.plan import Plan
from tests.benchmarks import published

RECIPES = ("llama-1b", "llama-7b", "llama-13b", "llama-70b", "mixtral-8x7b")
GPUS = (8, 64, 256, 1024)
HEAD = ("recipe", "H100", "best division", "micro-batch", "recomputed", "GiB a GPU", "MFU",
        "tokens/s a GPU", "published MFU")  # fmt: skip
ANY = (
    "engine.tensor_parallel=1",
    "engine.sequence_parallel=1",
    "engine.pipeline_parallel=1",
    "train.micro_batch=1",
)  # a mesh that any number of GPUs has


def answer(recipe: str, gpus: int) -> list[str]:
    """Return the row of the table, below HEAD: the best division of a recipe."""
    plan = Plan(compose(PlanJob, [f"recipe={recipe}", f"plan.gpus={gpus}", *ANY]))
    published = published_mfu(recipe, gpus)
    if not plan.divisions:
        return [recipe, f"{gpus:,}", "none fits", *[""] * 5, published]
    best = plan.divisions[0]
    again = getattr(best.job.model, "activation_checkpointing", "none")
    return [
        recipe,
        f"{gpus:,}",
        name_of(best.job),
        str(best.job.train.micro_batch),
        again,
        f"{best.memory.total / 2**30:,.0f}",
        f"{best.step.mfu or 0.0:.1%}".replace("%", " %"),
        f"{(best.step.tokens_per_second or 0.0) / gpus:,.0f}",
        published,
    ]


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
    rows += [answer(recipe, number) for recipe in recipes for number in gpus]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def errors() -> str:
    """Return the table of how far predicted speeds are from published ones."""
    rows = [("source", "rows", "median error", "least, most", "within 15 %"), ["---"] * 5]
    for name, part in published.groups(published.read()).items():
        off, errors = published.summary(part), [row.error for row in part]
        near = sum(abs(error) <= 0.15 for error in errors)
        ends = f"{min(errors):+.0%} to {max(errors):+.0%}".replace("%", "", 1).replace("%", " %")
        row = [name, str(len(part)), f"{off['median']:.1%}".replace("%", " %"), ends, str(near)]
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(errors() if sys.argv[1:] == ["published"] else table())
