"""What `forescale plan` predicts: against published speeds of others, and ZeRO-3 against ZeRO-1.

Each row of published.csv (published.py) is predicted by the step-time law, whose constants are
fitted to some of them; groups of them are summed up. CROSSING plans Llama 3 8B on more
and more nodes of H100, one window of 8,192 tokens a GPU: where the latency of ZeRO-3's many
collectives costs more than ZeRO-1's waiting.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from forescale.config.compose import compose
from forescale.plan.config import PlanJob
from forescale.plan.plan import Plan
from tests.benchmarks import published
from tests.benchmarks.pairing import Result
from tests.benchmarks.published import Row

LLAMA_3_8B = (
    "model=llama-7b", "model.num_kv_heads=8", "model.mlp_width=14336", "model.vocab_size=128256",
    "train.sequence_length=8192", "train.micro_batch=1",
)  # fmt: skip
COMMON = ("engine=zero3", "optimizer=adamw", "train.steps=1000")


@dataclass(frozen=True)
class Sizes:
    """every: how many rows of published.csv one is taken of; nodes: of CROSSING."""

    every: int
    nodes: tuple[int, ...]


REAL = Sizes(1, (1, 2, 4, 8, 16, 32, 64, 128, 256, 512))
TOY = Sizes(56, (1, 512))


def measure(rounds: int, sizes: Sizes = REAL) -> list[Result]:
    """Plan every job once: a plan is the same in every round."""
    rows = published.read()[:: sizes.every]
    comparisons = [compared(row) for row in rows]
    comparisons += [summed(*part) for part in published.groups(rows).items() if part[1]]
    return comparisons + [crossing(nodes) for nodes in sizes.nodes]


def compared(row: Row) -> Result:
    """Return the predicted MFU of a run beside the published one."""
    pair = (row.predicted * row.mfu_of_speed, row.speed * row.mfu_of_speed)
    facts = {"error": f"{row.error:+.1%}", "fitted": "yes" if row.fitted else "no"}
    return Result(row.name, "MFU", ("predicted", "published"), [pair], "0.85 to 1.15", facts)


def summed(name: str, rows: Sequence[Row]) -> Result:
    """Return all ratios of a part of the rows, and how far off they are."""
    pairs = [(row.predicted, row.speed) for row in rows]
    title, labels = f"published speeds, {name}", ("predicted", "published")
    facts = {"off by": published.summary(rows)}
    return Result(title, "tokens/s/GPU", labels, pairs, "0.85 to 1.15", facts)


def crossing(nodes: int) -> Result:
    """Return the time of a step at ZeRO-3 and ZeRO-1 on `nodes` nodes of 8 H100."""
    batch = f"train.global_batch={8 * nodes}"
    plan = Plan(compose(PlanJob, [*LLAMA_3_8B, *COMMON, f"plan.nodes={nodes}", batch]))
    options = {option.name: option for option in plan.options}
    names = ("zero3", "zero1")
    seconds = [options[name].step.seconds for name in names]
    facts = {
        "collectives": {n: sum(c.calls for c in options[n].traffic) for n in names},
        "their latency, s": {n: options[n].latency_seconds for n in names},
        "waiting, s": {n: options[n].step.waiting for n in names},
    }
    several = "s" if nodes > 1 else ""
    title = f"Llama 3 8B on {nodes} node{several} of 8 h100-sxm"
    return Result(title, "s", names, [(seconds[0] or 0.0, seconds[1] or 0.0)], "", facts)
