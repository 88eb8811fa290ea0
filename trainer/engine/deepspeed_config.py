"""Our config in DeepSpeed's words: the one function that writes its JSON. Imports no DeepSpeed."""

from typing import Any


def deepspeed_config(job, world_size: int) -> dict[str, Any]:
    """The DeepSpeed JSON for a TrainJob.

    Accumulation, clipping and schedules are ours (the engine's step owns the boundary), so
    DeepSpeed is told of one micro-batch a step and of no clipping. `engine.deepspeed` extends the
    result; the keys that we own were refused when the config was read.
    """
    engine, micro_batch = job.engine, job.train.micro_batch
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        "train_batch_size": micro_batch * world_size,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "zero_optimization": _zero(engine, job.optimizer.kind),
    }
    if job.precision.kind == "bf16":
        # The engine looks for non-finite gradients itself, before it decides to apply.
        config["bf16"] = {"enabled": True, "check_grad_overflow": False}
    elif job.precision.kind == "fp16":
        config["fp16"] = {"enabled": True}
    return merged(config, engine.deepspeed)


def _zero(engine, optimizer: str) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": engine.stage,
        "reduce_bucket_size": engine.bucket_bytes // 2,
        "allgather_bucket_size": engine.bucket_bytes // 2,
    }
    if engine.stage in (1, 2) and not engine.offload_optimizer:
        zero["compute_grad_norm"] = False  # ours is the true one
    if engine.stage == 3:
        zero["stage3_prefetch_bucket_size"] = engine.bucket_bytes // 2
        zero["reduce_scatter"] = optimizer != "muon"  # DeepSpeed refuses Muon with it
        if engine.hierarchical_partition > 1:
            zero["zero_hpz_partition_size"] = engine.hierarchical_partition
        if engine.offload_parameters:
            zero["offload_param"] = {"device": "cpu"}
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return zero


def merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """`base` with `extra` laid over it, section by section."""
    result = dict(base)
    for key, value in extra.items():
        old = result.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            value = merged(old, value)
        result[key] = value
    return result
