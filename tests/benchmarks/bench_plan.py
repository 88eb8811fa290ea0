"""What `forescale plan` predicts: against measured speeds of others, and ZeRO-3 against ZeRO-1.

MEASURED has all rows at 2,048 tokens of MPT models of 7B parameters and more on H100 and A100 of
80 GB, from MosaicML's llm-foundry (scripts/train/benchmarking/README.md at 061f2c7): FSDP, which
shards as ZeRO-3 does, in bf16. The plan's efficiencies and links are those of conf/machine, which
are guesses. CROSSING plans Llama 3 8B on more and more nodes of H100, one window of 8,192 tokens
a GPU: where the latency of ZeRO-3's many collectives costs more than ZeRO-1's waiting.
"""

from dataclasses import dataclass

from forescale.config.compose import compose
from forescale.plan.config import PlanJob
from forescale.plan.plan import Plan
from tests.benchmarks.pairing import Result


@dataclass(frozen=True)
class Row:
    """A measured run. speed: tokens per second and GPU."""

    model: str
    machine: str
    gpus: int
    micro_batch: int
    global_batch: int
    recomputes: bool
    speed: float


SHAPES = {  # width, layers, heads, parameters as published
    "7b": (4096, 32, 32, 6_658_859_008),
    "13b": (5120, 40, 40, 12_853_954_560),
    "30b": (7168, 48, 56, 29_975_214_080),
    "70b": (8192, 80, 64, 64_862_437_376),
}
MEASURED = (
    Row("7b", "h100-sxm", 8, 6, 48, False, 10_643),
    Row("13b", "h100-sxm", 8, 2, 16, False, 4_792),
    Row("13b", "h100-sxm", 16, 2, 32, False, 4_767),
    Row("13b", "h100-sxm", 32, 2, 64, False, 4_811),
    Row("13b", "h100-sxm", 64, 2, 128, False, 4_800),
    Row("30b", "h100-sxm", 8, 3, 504, True, 2_002),
    Row("30b", "h100-sxm", 16, 10, 480, True, 2_263),
    Row("30b", "h100-sxm", 32, 14, 1344, True, 2_308),
    Row("70b", "h100-sxm", 32, 2, 1024, True, 882),
    Row("70b", "h100-sxm", 64, 8, 2048, True, 1_039),
    Row("7b", "a100-80g", 8, 6, 96, False, 4_641),
    Row("13b", "a100-80g", 8, 2, 48, False, 2_262),
    Row("30b", "a100-80g", 8, 3, 504, True, 916),
    Row("70b", "a100-80g", 32, 2, 1024, True, 373),
    Row("70b", "a100-80g", 64, 8, 2048, True, 410),
)
MPT = (
    "model=llama-7b", "model.num_kv_heads=null", "model.mlp=gelu", "model.norm=layernorm",
    "model.bias=true", "model.position=learned", "model.tie_embeddings=true",
    "model.vocab_size=50368", "train.sequence_length=2048",
)  # fmt: skip
LLAMA_3_8B = (
    "model=llama-7b", "model.num_kv_heads=8", "model.mlp_width=14336", "model.vocab_size=128256",
    "train.sequence_length=8192", "train.micro_batch=1",
)  # fmt: skip
COMMON = ("engine=zero3", "optimizer=adamw", "train.steps=1000")


@dataclass(frozen=True)
class Sizes:
    """rows: how many of MEASURED; nodes: of CROSSING."""

    rows: int
    nodes: tuple[int, ...]


REAL = Sizes(len(MEASURED), (1, 2, 4, 8, 16, 32, 64, 128, 256, 512))
TOY = Sizes(1, (1, 512))


def measure(rounds: int, sizes: Sizes = REAL) -> list[Result]:
    """Plan every job once: a plan is the same in every round."""
    against = [
        Result(
            f"{row.model} on {row.gpus} {row.machine}",
            "tokens/s/GPU",
            ("predicted", "measured"),
            [(predicted(planned(row), row), row.speed)],
            "0.77 to 1.18",
        )
        for row in MEASURED[: sizes.rows]
    ]
    return against + [crossing(nodes) for nodes in sizes.nodes]


def planned(row: Row) -> Plan:
    """Return the plan of a measured run."""
    width, layers, heads, _ = SHAPES[row.model]
    job = compose(
        PlanJob,
        [
            *MPT,
            *COMMON,
            f"model.width={width}",
            f"model.mlp_width={4 * width}",
            f"model.num_layers={layers}",
            f"model.num_heads={heads}",
            f"model.activation_checkpointing={str(row.recomputes).lower()}",
            f"machine={row.machine}",
            f"plan.gpus={row.gpus}",
            f"train.global_batch={row.global_batch}",
            f"train.micro_batch={row.micro_batch}",
        ],
    )
    return Plan(job)


def predicted(plan: Plan, row: Row) -> float:
    """Return the predicted tokens per second and GPU."""
    found = plan.chosen.step.tokens_per_second
    assert found
    return found / row.gpus


def crossing(nodes: int) -> Result:
    """Return the time of a step at ZeRO-3 and ZeRO-1 on `nodes` nodes of 8 H100."""
    batch = f"train.global_batch={8 * nodes}"
    plan = Plan(compose(PlanJob, [*LLAMA_3_8B, *COMMON, f"plan.nodes={nodes}", batch]))
    found = {option.name: option for option in plan.options}
    names = ("zero3", "zero1")
    seconds = [found[name].step.seconds for name in names]
    facts = {
        "collectives": {n: sum(c.calls for c in found[n].traffic) for n in names},
        "their latency, s": {n: found[n].latency_seconds for n in names},
        "waiting, s": {n: found[n].step.waiting for n in names},
    }
    several = "s" if nodes > 1 else ""
    title = f"Llama 3 8B on {nodes} node{several} of 8 h100-sxm"
    return Result(title, "s", names, [(seconds[0] or 0.0, seconds[1] or 0.0)], "", facts)
