"""Config sections `engine` and `precision`: how ranks divide a model, and the number formats.

Invariant: a rule about one section is in its class.
"""

from dataclasses import dataclass
from typing import Any, Literal

from forescale.config.job import ProblemIterator
from forescale.config.schema import flatten, key

# Micro-batches whose gradients a rank adds up in bf16 by default. In a small model's first step the
# sum of 64 was 0.7 % off, of 128 1.0 %, of 512 4.1 % and of 1,024 11.5 %; its norm was 0.03 % off,
# 0.15 %, 3.1 % and 9.8 %.
MOST_ROUNDED_SUMS = 64

# Settings of DeepSpeed that our own keys control, so that engine.deepspeed must not set them.
_OUR_KEYS = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "managed_gradient_accumulation": "train.global_batch and train.micro_batch",
    "gradient_clipping": "optimizer.clip",
    "optimizer": "the optimizer section",
    "zero_allow_untested_optimizer": "the optimizer section",
    "zero_force_ds_cpu_optimizer": "engine.offload_optimizer",
    "scheduler": "the schedule section",
    "bf16": "precision",
    "bfloat16": "precision",  # DeepSpeed's older name
    "fp16": "precision",
    "amp": "precision",
    "data_types": "engine.gradient_dtype",
    "torch_autocast": "precision",
    "zero_optimization.stage": "engine.stage",
    "zero_optimization.offload_optimizer.device": "engine.offload_optimizer",
    "zero_optimization.offload_param.device": "engine.offload_parameters",
    "zero_optimization.cpu_offload": "engine.offload_optimizer",  # older names
    "zero_optimization.cpu_offload_param": "engine.offload_parameters",
    "zero_optimization.reduce_bucket_size": "engine.bucket_bytes",
    "zero_optimization.allgather_bucket_size": "engine.bucket_bytes",
    "zero_optimization.zero_hpz_partition_size": "engine.hierarchical_partition",
    "zero_optimization.zero_quantized_weights": "engine.quantized_weights",
    "sequence_parallel_size": "engine.sequence_parallel",
    "expert_parallel": "engine.expert_parallel",
    "pipeline": "engine.pipeline_parallel",
    "tensor_parallel": "engine.tensor_parallel",
    "compile": "train.compile",
    "activation_checkpointing": "model.activation_checkpointing",
    "wandb": "logging.wandb",
    "tensorboard": "logging.tensorboard",
}
# Settings of parts of DeepSpeed that forescale doesn't use: they would do nothing, or harm.
_UNUSED = {
    "data_efficiency": "forescale has a data order of its own",
    "dataloader_drop_last": "forescale has a data order of its own",
    "checkpoint": "forescale has checkpoints of its own",
    "datastates_ckpt": "forescale has checkpoints of its own",
    "hybrid_engine": "it is for reinforcement learning",
    "autotuning": "it is for DeepSpeed's own launcher",
    "weight_quantization": "it is for inference",
    "use_data_before_expert_parallelism": "forescale divides experts itself",
    "gradient_allreduce_op": "the engine counts on the mean over ranks",
    "comet": "forescale's logging has trackers of its own",
    "csv_monitor": "forescale's logging has trackers of its own",
    # With it the norm of the gradient was a fifth too small, silently (2 ranks, stages 1 and 2).
    "zero_optimization.round_robin_gradients": "the engine reads gradients in their own order",
    # The kernels of 0.19.8 read bf16's bits as fp16's; weights are converted before, not gradients.
    "zero_optimization.zero_quantized_gradients": "DeepSpeed takes gradients of bf16 for fp16",
    "zero_optimization.zero_quantized_nontrainable_weights": "checkpoints would hold its integers",
    "zero_optimization.legacy_stage1": "DeepSpeed has removed it",
    "zero_optimization.zenflow": "forescale's optimizers don't run in it",
}
# Of stages 0 and 1 alone: DeepSpeed asserts it when it builds the engine of another.
_BEFORE_STAGE_2 = ("prescale_gradients", "gradient_predivide_factor")

_SENT = ("fp32", "fp16", "bf16")  # what DeepSpeed can reduce gradients in


@dataclass
class EngineConfig:
    # ZeRO stage; shards 1: optimizer state, 2: also gradients, 3: also parameters
    stage: Literal[0, 1, 2, 3] = 1
    offload_optimizer: bool = False  # keep the optimizer state in CPU memory (stages 1 to 3)
    offload_parameters: bool = False  # keep the parameters in CPU memory (stage 3)
    gradient_dtype: Literal["auto", "precision", "fp32"] = key(
        "auto",
        "number format in which gradients are added up over micro-batches and ranks; auto: fp32 "
        f"beyond {MOST_ROUNDED_SUMS} micro-batches of a rank a step, else that of precision",
    )
    bucket_bytes: int = key(500_000_000, ge=4)  # bytes of a communication bucket
    # stage 3: ranks (of a node) that hold a second partition of the parameters; 1: off
    hierarchical_partition: int = key(1, ge=1)
    # stage 3: gather weights as 8-bit integers, with a scale for some thousands of them (ZeRO++'s
    # qwZ, arXiv 2306.10209): half of the bytes, and forward and backward passes with rounded
    # weights; for GPUs; has never run on a GPU in our tests
    quantized_weights: bool = False
    # number of consecutive ranks that divide the tokens of each window; best within a node; 1: off
    sequence_parallel: int = key(1, ge=1)
    # number of consecutive ranks that divide the matrices of each block, and the token tables if it
    # divides the vocabulary; best within a node; 1: off
    tensor_parallel: int = key(1, ge=1)
    # number of parts, of a micro-batch's tokens, in which these ranks sum the outputs of a block's
    # matrices: each part travels while the next is multiplied; it may change their last bits; 1:
    # off
    tensor_chunks: int = key(1, ge=1)
    # number of consecutive ranks that divide the experts of each layer and exchange tokens; best
    # within a node; 1: off
    expert_parallel: int = key(1, ge=1)
    # number of ranks that divide the columns of each window and pass their keys and values around
    # in a ring; may be more than the heads; 1: off
    context_parallel: int = key(1, ge=1)
    # number of stages, of consecutive ranks, that have some of the blocks each; 1: off
    pipeline_parallel: int = key(1, ge=1)
    # order of micro-batches in a pipeline; interleaved: with several parts of the model a stage,
    # which wait less and send more; zero-bubble: gradients of weights where a stage would wait,
    # for models that aren't compiled
    pipeline_schedule: Literal["1f1b", "interleaved", "zero-bubble"] = "1f1b"
    # parts of the model a stage; null: 1, of interleaved 2
    pipeline_chunks: int | None = key(None, ge=1)
    # number of ranks, among those with the same parameters, that ZeRO divides the states among;
    # each such group, best a node, has a copy of the states, and groups exchange a part of the
    # gradient once a step (hybrid sharding, HSDP); 0: all ranks
    shard_group: int = key(0, ge=0)
    # settings of DeepSpeed that have no key here, in its JSON format
    deepspeed: dict[str, Any] = key({})

    @property
    def chunks(self) -> int:
        """The number of parts of the model that a stage of the pipeline has."""
        default = 2 if self.pipeline_schedule == "interleaved" else 1
        return self.pipeline_chunks or default

    def problems(self) -> ProblemIterator:
        if self.offload_optimizer and self.stage == 0:
            yield "offload_optimizer", "needs ZeRO", "choose engine.stage=1, 2 or 3"
        off = {"offload_parameters": False, "hierarchical_partition": 1, "quantized_weights": False}
        for name in off:
            if getattr(self, name) != off[name] and self.stage != 3:
                yield name, "needs ZeRO stage 3", "choose engine.stage=3"
        if self.expert_parallel > 1 and self.hierarchical_partition > 1:
            problem = "a hierarchical partition is of parameters that all ranks have"
            yield "expert_parallel", problem, "leave out one of the two"
        zero = self.deepspeed.get("zero_optimization", {})
        if not isinstance(zero, dict):
            todo = "write, for example, {zero_optimization: {overlap_comm: true}}"
            yield "deepspeed.zero_optimization", f"{zero!r} is not a section of settings", todo
            return
        dtype = self.deepspeed.get("communication_data_type")
        if dtype not in (None, *_SENT):
            todo = f"choose from {', '.join(_SENT)}"
            yield "deepspeed.communication_data_type", f"unknown value {dtype!r}", todo
        if self.expert_parallel > 1 and not zero.get("reduce_scatter", True):
            problem = "DeepSpeed can't reduce the gradients of divided experts without it"
            todo = "leave it out, or engine.expert_parallel"
            yield "deepspeed.zero_optimization.reduce_scatter", problem, todo
        for path, _ in flatten(self.deepspeed, ""):
            for setting, name in _OUR_KEYS.items():
                if path == setting or path.startswith(setting + "."):
                    yield f"deepspeed.{path}", "is controlled by other keys", f"use {name}"
        for setting, why in _UNUSED.items():
            section, _, name = setting.rpartition(".")
            if name in (self.deepspeed.get(section, {}) if section else self.deepspeed):
                yield f"deepspeed.{setting}", f"does not apply here: {why}", "leave it out"
        for setting in _BEFORE_STAGE_2:
            if self.stage >= 2 and setting in self.deepspeed:
                problem = "is not supported with ZeRO stages 2 and 3"
                yield f"deepspeed.{setting}", problem, "leave it out"


@dataclass
class PrecisionConfig:
    # number format of forward and backward (master weights are fp32); auto: bf16 where the device
    # computes in it, else fp32
    kind: Literal["auto", "bf16", "fp16", "fp32"] = "bf16"
    # multiply the matrices of blocks in fp8, with one scale for each tensor (tensorwise, the
    # fastest) or for each row (rowwise, more accurate); for GPUs from Ada and Hopper on; has never
    # run on a GPU in our tests
    fp8: Literal["none", "tensorwise", "rowwise"] = "none"

    @property
    def label(self) -> str:
        """The number formats in a word, such as bf16 or bf16+fp8-rowwise."""
        return self.kind if self.fp8 == "none" else f"{self.kind}+fp8-{self.fp8}"

    def problems(self) -> ProblemIterator:
        if self.fp8 != "none" and self.kind not in ("auto", "bf16"):
            problem = f"is for precision bf16 on GPUs that multiply fp8, and this is {self.kind}"
            yield "fp8", problem, "write precision=bf16, or leave precision.fp8 out"
