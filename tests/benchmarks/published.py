"""Published speeds of training runs that shard as ZeRO-3 does, and what the plan predicts for each.

published.csv has a row for each: those in bf16 of five sources, without those that also split
matrices or sequences among GPUs. SOURCES names where each was published, at a commit. The columns:
source, model and machine, keys of the tables below; gpus; length of a window; micro_batch and
batch, in windows; gathers, how often a micro-batch gathers the weights (1: they are kept);
recomputed, the part of the layers' forward pass that the backward pass repeats; compiled; reduced,
the bytes of a gradient that is sent; node_gb, GB/s from a node to others; speed, tokens/s of a GPU.

What the sources do not say: OLMo-core's number of GPUs (64 are assumed, and the middle of a range
of speeds), MosaicML's and TinyLlama's network of H100 and A100 40 GB (as conf/machine). The part
that fms recomputes selectively is (HFU / MFU - 1) x 3; torchtitan's selection repeats every second
product.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median

from forescale.config.compose import compose
from forescale.models.config import ModelConfig
from forescale.plan.bytes.parameters import inventory
from forescale.plan.communication import collectives
from forescale.plan.config import PlanJob
from forescale.plan.step_time import peak_of, predict_step_time, token_flops

FILE = Path(__file__).parent / "published.csv"
_GITHUB = "https://github.com"
SOURCES = {
    "mosaic": f"{_GITHUB}/mosaicml/llm-foundry/blob/495218376830947dce625efabc4d86be7c47cc45"
    "/scripts/train/benchmarking/README.md",
    "torchtitan": f"{_GITHUB}/pytorch/torchtitan/blob/820504e20d1149fbf0b98c567af24c4b0433b22d"
    "/benchmarks/llama3_h100_202412_torchtitan.md",
    "fms": f"{_GITHUB}/foundation-model-stack/fms-fsdp/blob"
    "/ed74fd5ddec00e309eac20f478de883464c86526/README.md",
    "olmo": f"{_GITHUB}/allenai/OLMo-core/blob/10a6ff0603b39fdb023874d315c142cc1d159406/README.md",
    "tinyllama": f"{_GITHUB}/jzhang38/TinyLlama/blob/8148930f6b5f4c648876045320499aa778454336"
    "/README.md",
}


def _mpt(width: int, layers: int, heads: int) -> list[str]:
    norms = ["model.norm=layernorm", "model.bias=true", "model.position=learned"]
    sizes = _sizes(width, layers, heads, heads, 4 * width, 50368)
    return [*sizes, "model.mlp=gelu", *norms, "model.tie_embeddings=true"]


def _sizes(
    width: int, layers: int, heads: int, kv_heads: int, mlp: int, vocabulary: int
) -> list[str]:
    return [
        f"model.width={width}",
        f"model.num_layers={layers}",
        f"model.num_heads={heads}",
        f"model.num_kv_heads={kv_heads}",
        f"model.mlp_width={mlp}",
        f"model.vocab_size={vocabulary}",
    ]


MODELS = {  # width, layers, heads, and of Llama's kind heads of keys, MLP, vocabulary
    "mpt-125m": _mpt(768, 12, 12),
    "mpt-350m": _mpt(1024, 24, 16),
    "mpt-760m": _mpt(1536, 24, 12),
    "mpt-1b": _mpt(2048, 24, 16),
    "mpt-3b": _mpt(2560, 32, 20),
    "mpt-7b": _mpt(4096, 32, 32),
    "mpt-13b": _mpt(5120, 40, 40),
    "mpt-30b": _mpt(7168, 48, 56),
    "mpt-70b": _mpt(8192, 80, 64),
    "llama-1b": _sizes(2048, 22, 32, 4, 5632, 32000),
    "llama-7b": _sizes(4096, 32, 32, 32, 11008, 32000),
    "llama-13b": _sizes(5120, 40, 40, 40, 13824, 32000),
    "llama-34b": _sizes(8192, 48, 64, 8, 22016, 32000),
    "llama-70b": _sizes(8192, 80, 64, 8, 28672, 32000),
    "llama-3-8b": _sizes(4096, 32, 32, 8, 14336, 128256),
    "olmo-1b": [*_sizes(2048, 18, 16, 16, 5632, 100352), "model.mixer.qk_norm=head"],
    "olmo-7b": [*_sizes(4096, 32, 32, 32, 11008, 100352), "model.mixer.qk_norm=head"],
    "olmo-13b": [*_sizes(5120, 40, 40, 40, 13824, 100352), "model.mixer.qk_norm=head"],
}
MACHINES = {  # what differs from the machine of conf/machine
    "h100": ["machine=h100-sxm"],
    # Of 500 W instead of 700 W, at which the clock is slower by the third root; HBM2e.
    "h100-500w": ["machine=h100-sxm", "machine.efficiency=0.66", "machine.memory_bandwidth=2.4e12"],
    "a100": ["machine=a100-80g"],
    "a100-40g": [
        "machine=a100-80g",
        "machine.memory_bytes=42.4e9",
        "machine.memory_bandwidth=1.555e12",
    ],
}


@dataclass(frozen=True)
class Row:
    """A published run; the fields are the columns of published.csv.

    fitted: whether the constants of the step-time law were fitted to this row.
    """

    source: str
    model: str
    machine: str
    gpus: int
    length: int
    micro_batch: int
    batch: int
    gathers: int
    recomputed: float
    compiled: bool
    reduced: int
    node_gb: float
    speed: float
    fitted: bool

    @property
    def name(self) -> str:
        """What a person calls the row."""
        again = f", {self.recomputed:.0%} recomputed" if self.recomputed else ""
        return (
            f"{self.source} {self.model}, {self.gpus} {self.machine}, {self.micro_batch} x "
            f"{self.length}{again}{', compiled' if self.compiled else ''}"
        )

    def words(self) -> list[str]:
        """Return the command of the run, without its sharding."""
        return [
            *("model=llama-7b", "engine=zero3", "optimizer=adamw", "train.steps=1000"),
            *MODELS[self.model],
            *MACHINES[self.machine],
            f"machine.inter_node={self.node_gb}e9",
            f"model.activation_checkpointing={'full' if self.recomputed == 1 else 'none'}",
            f"train.compile={'on' if self.compiled else 'off'}",
            f"train.sequence_length={self.length}",
            f"train.global_batch={self.batch}",
            f"train.micro_batch={self.micro_batch}",
            f"plan.gpus={self.gpus}",
        ]

    def job(self, *words: str) -> PlanJob:
        """Return the job as FSDP runs it: no weight is kept whole because it is small, and no part
        of the loss is computed again."""
        zero = "stage3_param_persistence_threshold: 0"
        if self.gathers == 1:
            zero += ", stage3_max_reuse_distance: 1e13, stage3_max_live_parameters: 1e13"
        settings = ["model.loss_chunk=0", f"engine.deepspeed={{zero_optimization: {{{zero}}}}}"]
        settings.append(f"engine.gradient_dtype={'fp32' if self.reduced == 4 else 'precision'}")
        planned = compose(PlanJob, [*self.words(), *settings, *words])
        return replace(planned, model=model_of(planned).resolved(None, self.length))

    @cached_property
    def predicted(self) -> float:
        """Tokens per second of a GPU by the step-time law."""
        seconds = self._seconds()
        if 0 < self.recomputed < 1:
            again = self._seconds("model.activation_checkpointing=full")
            seconds += self.recomputed * (again - seconds)
        return self.batch * self.length / seconds / self.gpus

    def _seconds(self, *words: str) -> float:
        job = self.job(*words)
        trained, world, machine = inventory(job), job.world_size, job.machine
        traffic = collectives(job, trained, world)
        price = token_flops(model_of(job), job.lora, self.length, 0.0)
        step = predict_step_time(job, trained, price, traffic, machine, world, job.per_node)
        assert step.seconds
        return step.seconds

    @cached_property
    def mfu_of_speed(self) -> float:
        """MFU of one token a second; FLOPs as the plan counts them."""
        job = self.job()
        price = token_flops(model_of(job), job.lora, self.length, 0.0)
        return price.full / (peak_of(job, job.machine) or 1.0)

    @property
    def error(self) -> float:
        """Predicted over published speed, less 1; the same of MFU."""
        return self.predicted / self.speed - 1


def model_of(job: PlanJob) -> ModelConfig:
    """Return the model of a job, which is one of ours."""
    assert isinstance(job.model, ModelConfig)
    return job.model


def read() -> list[Row]:
    """Return all rows in the order of the file.

    Every second one is fitted to, but for those of the A100 of 40 GB, of which none is.
    """
    with FILE.open() as file:
        rows = [
            Row(
                source=r["source"],
                model=r["model"],
                machine=r["machine"],
                gpus=int(r["gpus"]),
                length=int(r["length"]),
                micro_batch=int(r["micro_batch"]),
                batch=int(r["batch"]),
                gathers=int(r["gathers"]),
                recomputed=float(r["recomputed"]),
                compiled=r["compiled"] == "1",
                reduced=int(r["reduced"]),
                node_gb=float(r["node_gb"]),
                speed=float(r["speed"]),
                fitted=False,
            )
            for r in csv.DictReader(file)
        ]
    some = [n for n, row in enumerate(rows) if row.machine != "a100-40g"][::2]
    return [replace(row, fitted=n in some) for n, row in enumerate(rows)]


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """Return how many rows there are, and how far off their predictions are."""
    errors = [abs(row.error) for row in rows]
    return {
        "rows": float(len(rows)),
        "median": median(errors),
        "max": max(errors),
        "within 15 %": sum(e <= 0.15 for e in errors) / len(errors),
    }
