"""Published speeds of training runs, and what the plan predicts for each.

published.csv has a row for each: runs of dense models on NVIDIA's GPUs, whose layout is published
too. SOURCES names where, at a commit. The columns: source, model and machine,
keys of the tables below; gpus; length of a window; micro_batch and batch, in windows; gathers, how
often a micro-batch gathers the weights (1: they are kept); recomputed, the part of the layers'
forward pass that the backward pass repeats; compiled; reduced, the bytes of a gradient that is
sent; node_gb, GB/s from a node to others; speed, tokens/s of a GPU. And where they are not 3, 1,
1, all and none: stage of ZeRO; ranks that divide matrices (tensor) and states (shard; the others
repeat them, as HSDP does); fp8, the recipe; and where they are not 1: stages of a pipeline, the
parts of the model that each has (chunks), ranks of a ring (context).

Every second row of the sources in FITTED is fitted to, but for those of the A100 of 40 GB, and with
a pipeline or a ring; the other sources never were.

What they do not say: OLMo-core's number of GPUs (64 are assumed, and the middle of a range of
speeds), the network of MosaicML's H100 and A100 of 40 GB, of torchtitan's A100, TinyLlama's,
NVIDIA's and Trainy's (as conf/machine), torchao's H100 (as torchtitan's: the same memory). The part
that IBM recomputes selectively is (HFU / MFU - 1) x 3; torchtitan's selection repeats every second
product. NVIDIA's kernels are fused by hand, and count as compiled. Where a rank's windows are given
alone, they are one micro-batch, in a pipeline one each; torchtitan's default is a micro-batch a
part of the model, of which a stage has one or, interleaved, two. Megatron-LM's parts are assumed to
have a layer each, of which alone its 92 layers have 4 x 23, Llama 3's parts as many as in our
recipe. Weights that a pipeline's FSDP keeps in a step count as stage 1. Speeds of Megatron-LM and
Llama 3 are their FLOP/s by the FLOPs of a token as MFU counts them.

Pythia's speed is that of its GPU hours (Biderman et al. 2023, arXiv 2304.01373), with all that a
run does beside steps, in fp16. OLMo 2's is from allenai.org/blog/olmo2-32B, SmolLM3's from
tzafon.ai/blog/breaking-40k-tokens (1,024 and 384 GPUs); the files below have their layout. The
hours of Pythia, the three rows of Nemotron-4 (whose published MFU follows from them) and the two of
Llama 3 are quoted from memory of those papers: no copy of the numbers was at hand.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from statistics import median

from forescale.config.compose import compose
from forescale.models.config import ModelConfig
from forescale.plan.bytes.parameters import inventory
from forescale.plan.communication import collectives
from forescale.plan.config import PlanJob
from forescale.plan.links import Collective
from forescale.plan.step_time import peak_of, predict_step_time, token_flops

FITTED = ("mosaic", "torchtitan", "fms", "olmo", "internevo")
FILE = Path(__file__).parent / "published.csv"
SOURCES = {  # repository, commit and file on GitHub; or a paper
    "mosaic": "mosaicml/llm-foundry 495218376830947dce625efabc4d86be7c47cc45 "
    "scripts/train/benchmarking/README.md",
    "torchtitan": "pytorch/torchtitan 31a17bfdb70bab6f62a13d21816a5339b911d6e3 "
    "benchmarks/llama3_h100_202412_torchtitan.md",
    "torchtitan, tensor": "pytorch/torchtitan 2887250bbd9103d0bc997ea2efb3a525b5e5dbc0 "
    "benchmarks/asyncTP_llama3_h100_2025-06_torchtitan.md",
    "torchtitan, 405B": "pytorch/torchtitan 3faaa1a0dee68ce028400e3dafd1735d152cb4f8 "
    "docs/performance.md",
    "torchtitan-a100": "pytorch/torchtitan 041336434916bdc0f88c1f89fda176fd3c2092e4 "
    "docs/performance.md",
    "fms": "foundation-model-stack/fms-fsdp ed74fd5ddec00e309eac20f478de883464c86526 README.md",
    "olmo": "allenai/OLMo-core 10a6ff0603b39fdb023874d315c142cc1d159406 README.md",
    "olmo, fp8": "allenai/OLMo-core 7e58d1289bc27103880e7a8382ad0847c35e04f7 README.md",
    "internevo": "InternLM/InternEvo 34fc28d760282c11a2aba552d5b21ffefed3e188 "
    "doc/en/train_performance.md",
    "tinyllama": "jzhang38/TinyLlama 8148930f6b5f4c648876045320499aa778454336 README.md",
    "ibm": "pytorch/pytorch.github.io 2ad10059d3021d0f902f1204db98e5c930532be8 "
    "_posts/2024-03-13-maximizing-training.md",
    "torchao": "pytorch/ao 36027d82d1ad9949597ea16002ff4940374b1b94 "
    "docs/source/workflows/training.md",
    "trainy": "pytorch/torchtitan 1af29373a02c4beb237c2de02793931ce53b48d8 "
    "benchmarks/llama3-8b_h200_202506_trainy-whitefiber.md",
    "nvidia": "NVIDIA/NeMo 35029a0c84e7c9f2c56e2b2256746654a5084432 "
    "docs/source/performance/performance_summary.md",
    "nvidia, FSDP": "NVIDIA-NeMo/Megatron-Bridge 067f987df03b8355b03192d88d70f1709fedf51a "
    "docs/performance-summary-archive.md",
    "nvidia, 2026": "NVIDIA-NeMo/Megatron-Bridge 0a25f911b2ed6c6905a539504fdb8e5b40e3438b "
    "docs/performance-summary-archive.md",
    "automodel": "NVIDIA-NeMo/Automodel 36044ad3d139363fb6c73c24af2e7c6b65ec52f6 "
    "docs/performance-summary.mdx",
    "colossal": "hpcaitech/ColossalAI 4f9953be335ef371b3848719ddafe596c01ecd37 README.md",
    "modded-nanogpt": "KellerJordan/modded-nanogpt f411b3d346aa52d3504324ca93c230fd84c6c07f "
    "records/track_1_short",
    "pythia": "EleutherAI/pythia a19eecb807ec2c79a39ebf18108816e6ffffc1d5 models",
    "olmo2-32b": "allenai/OLMo-core fa6c5014c9f6e9ee789da2d9c20d5126fee8df0d "
    "src/scripts/official/OLMo2/OLMo-2-0325-32B-train.py",
    "nemotron-4": "arXiv 2402.16819 table 2",
    "megatron": "NVIDIA/Megatron-LM d98e8a64ddf34856e74b24714e3bedb2f5a39553 README.md",
    "llama-3": "arXiv 2407.21783 table 4",
    "smollm3": "huggingface/smollm a041759883ec7152d18fb985ea49be641a0bceef "
    "text/pretraining/smollm3/stage1_8T.yaml",
}
_LAYERNORM = "model.norm=layernorm"


def _mpt(width: int, layers: int, heads: int) -> list[str]:
    words = _gpt(width, layers, heads, 50368)
    return [*words, "model.position=learned", "model.tie_embeddings=true"]


def _gpt(width: int, layers: int, heads: int, vocabulary: int) -> list[str]:
    sizes = _sizes(width, layers, heads, heads, 4 * width, vocabulary)
    return [*sizes, "model.mlp=gelu", _LAYERNORM, "model.bias=true"]


def _speedrun(width: int, layers: int, heads: int) -> list[str]:
    sizes = _sizes(width, layers, heads, heads, 4 * width, 50304)
    return [*sizes, "model.mlp=relu2", "model.mixer.qk_norm=head", "model.tie_embeddings=true"]


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
    "olmo-32b": [*_sizes(5120, 64, 40, 8, 27648, 100352), "model.mixer.qk_norm=head"],
    "llama-3-70b": _sizes(8192, 80, 64, 8, 28672, 128256),
    "llama-3-405b": _sizes(16384, 126, 128, 8, 53248, 128256),
    "llama-65b": _sizes(8192, 80, 64, 64, 22016, 32000),
    "internlm-7b": _sizes(4096, 32, 32, 32, 11008, 103168),
    "smollm3-3b": [*_sizes(2048, 36, 16, 4, 11008, 128256), "model.tie_embeddings=true"],
    "gpt-5b": _gpt(4096, 24, 32, 51200),
    "gpt-20b": _gpt(6144, 44, 48, 51200),
    "gpt-175b": _gpt(12288, 96, 96, 51200),
    "gpt-1.7b": _gpt(2048, 24, 16, 131072),
    "gpt-7.1b": _gpt(4096, 30, 32, 131072),
    "gpt-16b": _gpt(6144, 32, 48, 131072),
    "gpt-32b": _gpt(7168, 48, 56, 131072),
    "gpt-70b": _gpt(8192, 84, 64, 131072),
    "gpt-119b": _gpt(10240, 92, 80, 131072),
    "gpt-177b": _gpt(12288, 96, 96, 131072),
    "gpt-314b": _gpt(16384, 96, 128, 131072),
    "gpt-462b": _gpt(18432, 112, 144, 131072),
    "nemotron-8b": [*_sizes(4096, 32, 32, 32, 16384, 256000), "model.mlp=relu2", _LAYERNORM],
    "nemotron-15b": [*_sizes(6144, 32, 48, 8, 24576, 256000), "model.mlp=relu2", _LAYERNORM],
    "nemotron-22b": [*_sizes(6144, 40, 48, 48, 24576, 256000), "model.mlp=relu2", _LAYERNORM],
    "nemotron-340b": [*_sizes(18432, 96, 96, 8, 73728, 256000), "model.mlp=relu2", _LAYERNORM],
    "gpt-124m": _speedrun(768, 12, 6),
    "gpt-1.5b": _speedrun(1536, 52, 12),
    "pythia-70m": _gpt(512, 6, 8, 50304),
    "pythia-160m": _gpt(768, 12, 12, 50304),
    "pythia-410m": _gpt(1024, 24, 16, 50304),
    "pythia-1b": _gpt(2048, 16, 8, 50304),
    "pythia-1.4b": _gpt(2048, 24, 16, 50304),
    "pythia-2.8b": _gpt(2560, 32, 32, 50304),
    "pythia-6.9b": _gpt(4096, 32, 32, 50432),
    "pythia-12b": _gpt(5120, 36, 40, 50688),
}
MACHINES = {  # what differs from the machine of conf/machine
    "h100": ["machine=h100-sxm"],
    "h200": ["machine=h200"],
    # Of 500 W instead of 700 W, at which the clock is slower by the third root; HBM2e.
    "h100-500w": ["machine=h100-sxm", "machine.efficiency=0.70", "machine.memory_bandwidth=2.4e12"],
    "a100": ["machine=a100-80g"],
    "a100-40g": [
        "machine=a100-80g",
        "machine.memory_bytes=42.4e9",
        "machine.memory_bandwidth=1.555e12",
    ],
}

# MosaicML attended with Triton's kernel of 2023, which reaches less of an H100 than torch's. Its
# other kernels, fused by hand, are this far from uncompiled ones to compiled. Both are fitted.
_TRITON, _FUSED = ["machine.attention_efficiency=0.18"], 0.74
_INTERLEAVED = ["engine.pipeline_schedule=interleaved"]


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
    stage: int
    tensor: int
    shard: int
    fp8: str
    pipeline: int
    chunks: int
    context: int
    fitted: bool

    @property
    def name(self) -> str:
        """What a person calls the row."""
        again = f", {self.recomputed:.0%} recomputed" if self.recomputed else ""
        again += ", compiled" if self.compiled else ""
        parts = {"stage": 3, "tensor": 1, "shard": 0, "fp8": "none",
                 "pipeline": 1, "chunks": 1, "context": 1}  # fmt: skip
        for name, usual in parts.items():
            value = getattr(self, name)
            again += f", {name} {value}" if value != usual else ""
        return (
            f"{self.source} {self.model}, {self.gpus} {self.machine}, {self.micro_batch} x "
            f"{self.length}{again}"
        )

    def words(self) -> list[str]:
        """Return the command of the run, without its sharding."""
        return [
            *("model=llama-7b", f"engine=zero{self.stage}", "optimizer=adamw", "train.steps=1000"),
            f"engine.tensor_parallel={self.tensor}",
            f"engine.context_parallel={self.context}",
            f"engine.pipeline_parallel={self.pipeline}",
            *(_INTERLEAVED if self.chunks > 1 else ()),
            f"engine.pipeline_chunks={self.chunks if self.chunks > 1 else 'null'}",
            f"precision.fp8={self.fp8}",
            "train.deterministic=false",
            *MODELS[self.model],
            *MACHINES[self.machine],
            *(_TRITON if self.source == "mosaic" and self.machine == "h100" else ()),
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
        zero = "overlap_comm: true"  # InternEvo and Pythia have it; assumed of the others
        if self.stage == 3:
            zero += ", stage3_param_persistence_threshold: 0"
        if self.stage == 3 and self.gathers == 1:
            zero += ", stage3_max_reuse_distance: 1e13, stage3_max_live_parameters: 1e13"
        settings = ["model.loss_chunk=0"]
        if self.stage and self.pipeline == 1:
            settings.append(f"engine.deepspeed={{zero_optimization: {{{zero}}}}}")
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
        if self.source == "mosaic":
            seconds += _FUSED * (self._seconds("train.compile=on") - seconds)
        return self.batch * self.length / seconds / self.gpus

    def _seconds(self, *words: str) -> float:
        job = self.job(*words)
        trained, world, machine = inventory(job), job.world_size, job.machine
        traffic = [c for each in collectives(job, trained, world) for c in near(each, self.shard)]
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


def near(c: Collective, shard: int) -> list[Collective]:
    """Return what ranks send if only `shard` of them divide the states, and the others repeat them
    (HSDP; 0: all divide them)."""
    if not 0 < shard < c.ranks or c.kind not in ("all_gather", "reduce_scatter"):
        return [c]
    part = replace(c, ranks=shard)
    if c.kind == "all_gather":
        return [part]
    others = replace(c, kind="all_reduce", payload=c.payload // shard, ranks=c.ranks // shard)
    return [part, replace(others, stride=c.stride * shard)]


@cache
def read() -> list[Row]:
    """Return all rows in the order of the file; what one predicts is computed once."""
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
                stage=int(r["stage"] or 3),
                tensor=int(r["tensor"] or 1),
                shard=int(r["shard"] or 0),
                fp8=r["fp8"] or "none",
                pipeline=int(r["pipeline"] or 1),
                chunks=int(r["chunks"] or 1),
                context=int(r["context"] or 1),
                fitted=False,
            )
            for r in csv.DictReader(file)
        ]
    tables = [
        n
        for n, row in enumerate(rows)
        if row.source in FITTED and row.machine != "a100-40g" and row.pipeline * row.context == 1
    ]
    some = tables[::2]
    return [replace(row, fitted=n in some) for n, row in enumerate(rows)]


_GROUPS = {  # of sources that are not fitted to, and so in the order of the table of README.md
    "Nemotron-4 15B, OLMo 2 32B, 768 to 2,304 H100": ("nemotron-4", "olmo2-32b"),
    "torchao, Trainy: bf16 and fp8, H100 and H200": ("torchao", "trainy"),
    "IBM, not compiled": ("ibm",),
    "torchtitan, A100": ("torchtitan-a100",),
    "Pythia, from the hours of whole runs": ("pythia",),
    "SmolLM3, TinyLlama, Colossal-AI, modded-nanogpt": (
        *("smollm3", "tinyllama", "colossal", "modded-nanogpt"),
    ),
    "NVIDIA's NeMo, Megatron Bridge and Automodel": ("nvidia", "automodel"),
    "Megatron-LM, GPT of 1.7B to 462B": ("megatron",),
    "Llama 3 405B, 8,192 and 16,384 H100": ("llama-3",),
}
_GPUS = {"h100": "H100", "a100": "A100 80 GB", "a100-40g": "A100 40 GB"}


def group(row: Row) -> str:
    """Return the line of the table of README.md that a row belongs to."""
    how = ", pipelines" if row.pipeline > 1 else ", rings" if row.context > 1 else ""
    if row.source not in FITTED:
        return next(name for name, of in _GROUPS.items() if row.source in of) + how
    name = "torchtitan, OLMo-core, fms-fsdp, bf16"
    if row.source == "internevo":
        name = "InternEvo, ZeRO-1, 8 to 1,024 A100"
    elif row.fp8 != "none":
        name = "torchtitan, fp8" if how else "MosaicML, torchtitan, OLMo-core, fp8"
    elif row.source == "mosaic":
        name = f"MosaicML, {_GPUS[row.machine]}"
    return f"{name}{how}: {'fitted' if row.fitted else 'held out'}"


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of each line of that table, in its order."""
    lines = dict[str, list[Row]]()
    sources = [*FITTED, *(source for of in _GROUPS.values() for source in of)]
    for row in sorted(rows, key=lambda row: (sources.index(row.source), row.source in FITTED)):
        lines.setdefault(group(row), []).append(row)
    divided, held_out = [r for r in rows if r.tensor > 1], [r for r in rows if not r.fitted]
    return lines | {
        "all that is fitted": [row for row in rows if row.fitted],
        "all sources that are never fitted": [row for row in rows if row.source not in FITTED],
        "all in fp8 that is held out": [row for row in held_out if row.fp8 != "none"],
        "all with divided matrices that is held out": [r for r in divided if not r.fitted],
        "all with a pipeline": [row for row in rows if row.pipeline > 1],
        "all with a ring": [row for row in rows if row.context > 1],
        "all that is held out": held_out,
        "all": [*rows],
    }


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """Return how many rows there are, and how far off their predictions are."""
    errors = [abs(row.error) for row in rows]
    return {
        "rows": float(len(rows)),
        "median": median(errors),
        "max": max(errors),
        "within 15 %": sum(e <= 0.15 for e in errors) / len(errors),
    }
