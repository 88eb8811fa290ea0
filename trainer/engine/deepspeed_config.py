"""Derive the DeepSpeed JSON from our config, in one function. Imports no DeepSpeed."""

from typing import Any

from forescale.models.config import ModelConfig

BLOCK = "forescale.models.block.Block"


def deepspeed_config(job, world_size: int) -> dict[str, Any]:
    """Return the DeepSpeed JSON for a TrainJob.

    Our engine does accumulation, clipping and schedules itself. So this JSON sets one micro-batch
    per step and no clipping. `engine.deepspeed` extends the result; reading the config has already
    refused the keys that we own.
    """
    engine, micro_batch = job.engine, job.train.micro_batch
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        # DeepSpeed counts the ranks that it divides the states among.
        "train_batch_size": micro_batch * job.mesh(world_size).shards,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        # Its timer waits for the device at the begin and end of a step; ours measures whole steps.
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": _zero(job, world_size),
    }
    if job.precision.kind == "bf16":
        # The engine checks for non-finite gradients itself, before the update.
        config["bf16"] = {"enabled": True, "check_grad_overflow": False}
    elif job.precision.kind == "fp16":
        config["fp16"] = {"enabled": True}
    if job.adds_in_fp32(world_size):
        config["communication_data_type"] = "fp32"
        if engine.stage == 3:  # the other stages refuse it, see stages.py
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return merged(config, engine.deepspeed)


def _zero(job, world_size: int) -> dict[str, Any]:
    engine, optimizer = job.engine, job.optimizer
    # Bytes of an element in the reduce bucket; of fp32 weights it holds twice engine.bucket_bytes.
    gradient = 4 if job.adds_in_fp32(world_size) else 2
    zero: dict[str, Any] = {
        "stage": engine.stage,
        "reduce_bucket_size": engine.bucket_bytes // gradient,
        "allgather_bucket_size": engine.bucket_bytes // 4 * 2,  # DeepSpeed takes even ones
    }
    if engine.stage in (1, 2) and not engine.offload_optimizer:
        zero["compute_grad_norm"] = False  # the engine computes it
    if engine.stage == 3:
        zero["stage3_prefetch_bucket_size"] = engine.bucket_bytes // 2
        if optimizer.matrices is not None:
            zero["reduce_scatter"] = False  # it refuses Muon with it; see stages.py
        if isinstance(job.model, ModelConfig):
            # A block's weights are gathered together, in one collective, and by hooks that are
            # outside of what is compiled.
            zero["leaf_module"] = {"classes": [BLOCK]}
        if engine.hierarchical_partition > 1:
            zero["zero_hpz_partition_size"] = engine.hierarchical_partition
        if engine.quantized_weights:
            zero["zero_quantized_weights"] = True
        if engine.offload_parameters:
            zero["offload_param"] = {"device": "cpu"}
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    # Stages 1 and 2 reduce gradients beside the backward pass, as stage 3 does by itself: stage 2
    # in each micro-batch, stage 1 in a step's last. That takes a second bucket, and a wait for the
    # GPU. It saves nothing where a model is compiled as a whole, whose gradients all come at the
    # end (see compilation.py), in a pipeline, which reduces after all backward passes, nor on a
    # CPU.
    in_parts = isinstance(job.model, ModelConfig) or job.train.compile == "off"
    if engine.stage in (1, 2) and job.on_gpu and in_parts and not engine.offload_optimizer:
        zero["overlap_comm"] = engine.pipeline_parallel == 1
    return zero


def merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with the keys of `extra` added or replaced, section by section."""
    result = dict(base)
    for key, value in extra.items():
        old = result.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            value = merged(old, value)
        result[key] = value
    return result
