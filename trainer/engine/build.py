"""Build the engine of a job; find the peak FLOP/s of the device.

Invariant: a job that does not fit its ranks is refused before anything is built.
"""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from forescale.config.hardware import check_fp8
from forescale.config.schema import ConfigError, Problem
from forescale.config.train import TrainJob
from forescale.engine.deepspeed_check import problems_here
from forescale.engine.deepspeed_config import deepspeed_config
from forescale.engine.gathers import take_apart_by_parameter
from forescale.engine.optim import build_optimizer, divided_groups, parameter_groups, shape_of
from forescale.engine.optimizers.muon import use_precision
from forescale.engine.optimizers.orthogonal import use_stacks
from forescale.engine.parallel import experts, tensor
from forescale.engine.parallel.pipeline import Pipeline, borrow
from forescale.engine.ranks import Ranks
from forescale.engine.step import Engine
from forescale.engine.world import World
from forescale.ground.errors import UserError
from forescale.models.config import ModelConfig
from forescale.models.parallel.division import runs
from forescale.models.parallel.groups import Group, SequenceGroup
from forescale.models.parallel.stages import Stage

# Dense peak FLOP/s in bf16, from the vendors' data sheets; MFU is a fraction of these.
_KNOWN_PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "A10": 125e12,
    "V100": 125e12,
}


def check_world(job: TrainJob, size: int) -> None:
    """Raise ConfigError if the job does not fit the number of ranks, and UserError if this machine
    can't compute what it asks for."""
    problems = [Problem(*p) for p in job.problems(world_size=size)]
    if problems := problems or problems_here(job, size):
        raise ConfigError(problems)
    check_fp8(job.precision.fp8)


def stage_of(job: TrainJob, world: World) -> Stage | None:
    """Return this rank's stage of the pipeline; None without one."""
    if world.pipeline.size == 1:
        return None
    return Stage(world.pipeline.rank, world.pipeline.size, job.engine.chunks)


def partition_of(job: TrainJob, world: World) -> Callable[[nn.Module], nn.Module] | None:
    """Return a function that divides a module with its initial weights among the ranks, and returns
    it; None if models stay whole.

    So no rank ever holds the whole model. All ranks draw the same weights in the same order, in
    fp32 and on the host, so the initial model depends neither on the stage nor on the ranks.
    """
    steps: list[Callable[[nn.Module], nn.Module]] = []
    if world.experts.size > 1:
        steps.append(partial(experts.divide, group=experts.join_experts(world)))
    if world.tensor.size > 1:
        steps.append(partial(tensor.divide, group=tensor.group_of(world, job.engine.tensor_chunks)))
    if job.engine.stage == 3:
        steps.append(_shared(job, world))

    def divide(module: nn.Module) -> nn.Module:
        for step in steps:
            module = step(module)
        return module

    return divide if steps else None


def _shared(job: TrainJob, world: World) -> Callable[[nn.Module], nn.Module]:
    """Return a function that leaves each rank its part of every parameter, for stage 3."""
    from deepspeed.runtime.zero import Init
    from deepspeed.utils import groups

    take_apart_by_parameter()
    config = deepspeed_config(job, world.size)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(job.precision.kind, torch.float32)
    # Init makes the group of a hierarchical partition once, and refuses to make it for a second
    # part of the model; an earlier engine of this process may have left one.
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    persistent = config["zero_optimization"].get("stage3_param_persistence_threshold", 10**5)
    among = {"mpu": tensor.Mpu(world), "data_parallel_group": world.shard.group}

    def shared(module: nn.Module) -> nn.Module:
        # Init keeps the type that it finds, and the engine later refuses any but its own; of a
        # divided model it moves no buffers.
        module.to(world.device, dtype)
        if job.engine.quantized_weights:
            check_quantized(module, world.shard.size, persistent)
        among_ranks = among if world.shard is not world else {}
        near = groups._get_zero_param_intra_parallel_group()
        # Of what is not divided yet.
        Init(
            module=module,
            config_dict_or_path=config,
            zero_param_parallel_group=near,
            **among_ranks,
        )
        return module

    return shared


def _columns(world: World, config: ModelConfig) -> SequenceGroup:
    """Return the ranks that divide windows, as the model knows them."""

    def named(among: Ranks) -> tuple[int, int, str]:
        return among.rank, among.size, among.group.group_name if among.size > 1 else ""

    exchange, ring = Group(*named(world.sequence)), Group(*named(world.context))
    return SequenceGroup(*named(world.columns), exchange, ring, runs(config, ring.size))


def check_quantized(module: nn.Module, ranks: int, persistent: int) -> None:
    """Raise UserError if DeepSpeed's kernels can't quantize the part that one of `ranks` has of a
    weight; weights of at most `persistent` elements stay whole on each rank."""
    for name, p in module.named_parameters():
        part = -(-p.numel() // ranks)
        if p.numel() > persistent and part % 8:
            problem = f"each of {ranks} ranks has {part:,} elements of {name}, no multiple of 8"
            todo = "choose other sizes of the model or another number of ranks, or leave it out"
            raise UserError("engine.quantized_weights", problem, todo)


def build_engine(world: World, model: nn.Module, job: TrainJob) -> Engine:
    """Return an Engine that trains `model` with the optimizer of the job."""
    if world.pipeline.size > 1:
        borrow(model)
    optional = (getattr(model, name, None) for name in ("muon_parameters", "optimizer_factors"))
    muon, factors = (None if method is None else method() for method in optional)
    groups = parameter_groups(model.named_parameters(), job.optimizer, muon, factors)
    expert_names = {name for name, p in model.named_parameters() if experts.is_expert(p)}
    groups = divided_groups(groups, expert_names, job.engine.expert_parallel)
    for group in groups:
        if group.update.is_by_matrix:  # as DeepSpeed's Muon does, which can't see divided shapes
            group.params.sort(key=shape_of, reverse=True)
    # First, because DeepSpeed imports it for every optimizer.
    use_precision(job.precision.kind)
    use_stacks(not job.train.invariant)
    optimizer = build_optimizer(job.optimizer, [g.as_dict() for g in groups])
    if world.columns.size > 1:
        model.divide(_columns(world, model.config))  # type: ignore[operator, arg-type]
    if job.precision.fp8 != "none":
        from forescale.engine.fp8 import use_fp8  # a second of torch's compiler

        use_fp8(model, job.precision.fp8)
    fp32 = job.adds_in_fp32(world.size)
    pipeline = None
    if world.pipeline.size > 1:
        pipeline = Pipeline(world, job.engine.pipeline_schedule, model)
    # Each member of a run on several clusters draws its own dropout.
    seed, clip = job.train.seed + (job.outer.index << 32), job.optimizer.clip
    return Engine(
        world,
        model,
        optimizer,
        seed=seed,
        clip=clip,
        fp32_gradients=fp32,
        invariant=job.train.invariant,
        pipeline=pipeline,
    )


def device_name(world: World) -> str:
    """Return the name of this rank's GPU, or "cpu"."""
    on_gpu = world.device.type == "cuda"
    return str(torch.cuda.get_device_name(world.device)) if on_gpu else "cpu"


def peak_flops(world: World, configured: float | None, precision: str) -> float:
    """Return the peak FLOP/s of one device in matrix products: configured, known, or measured."""
    if configured:
        return configured
    name = device_name(world)
    for known, peak in _KNOWN_PEAKS.items():
        if known in name:
            return peak if precision != "fp32" else peak / 2
    return measured_peak(world.device, precision)


def measured_peak(device: torch.device, precision: str) -> float:
    """Measure FLOP/s as the best of 12 matrix products; takes a tenth of a second on a CPU."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    n = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(12):
        began = time.perf_counter()
        (a @ b)[0, 0].item()
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best
