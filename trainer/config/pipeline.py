"""What a job must be like for its model to be divided into the stages of a pipeline.

Invariant: what no rule here forbids computes the same as on one rank, but for what dropout draws.
"""

from typing import TYPE_CHECKING

from forescale.config.job import ProblemIterator
from forescale.config.sections.optimizer import OwnOptimizerConfig
from forescale.models.config import ModelConfig
from forescale.models.parallel.division import of_stages

if TYPE_CHECKING:
    from forescale.config.train import TrainJob

NAME = "engine.pipeline_parallel"
_LONG = 0.2  # a share of a step that is worth a note


def idle_share(schedule: str, stages: int, chunks: int, micros: int) -> float:
    """Return the share of a step in which a stage waits, with so many micro-batches of a rank, if
    all parts cost the same (engine/parallel/schedules.py)."""
    parts = 3 if schedule == "zero-bubble" else chunks  # zero-bubble: a third of a pass is filled
    return (stages - 1) / (parts * micros + stages - 1)


def pipeline_notes(job: "TrainJob") -> list[str]:
    """Return what a user should know of a pipeline that waits long."""
    engine, ranks = job.engine, job.launch.processes
    stages = engine.pipeline_parallel
    if stages == 1 or ranks is None or ranks.is_range or not job.train.micro_batch:
        return []
    micros = job.accumulation(ranks.most)
    idle = idle_share(engine.pipeline_schedule, stages, engine.chunks, micros)
    if idle < _LONG:
        return []
    return [
        f"{stages} stages of a pipeline with {micros} micro-batches a rank wait {idle:.0%} of a "
        "step: raise train.global_batch or lower train.micro_batch."
    ]


def pipeline_problems(job: "TrainJob", ranks: int | None) -> ProblemIterator:
    """Yield the broken rules of stages; `ranks` of the job, None if unknown."""
    engine, stages = job.engine, job.engine.pipeline_parallel
    if stages == 1:
        for name, off in (("pipeline_schedule", "1f1b"), ("pipeline_chunks", None)):
            if getattr(engine, name) != off:
                yield f"engine.{name}", "needs a pipeline", f"choose {NAME}=2, or leave it out"
        return
    alone = f"write {NAME}=1"
    if engine.pipeline_schedule != "interleaved" and engine.chunks > 1:
        problem = f"{engine.pipeline_schedule} has one part of the model a stage"
        yield "engine.pipeline_chunks", problem, "choose engine.pipeline_schedule=interleaved"
    if engine.pipeline_schedule == "interleaved" and engine.chunks == 1:
        problem = "interleaved stages have several parts of the model each"
        yield "engine.pipeline_chunks", problem, "give 2 at least, or choose 1f1b"
    if ranks and ranks % stages and job.mesh(ranks).near == 1:
        problem = f"the job's {ranks} ranks are not a multiple of {stages}"
        yield NAME, problem, f"start a multiple of {stages} (launch.processes)"
    if not isinstance(job.model, ModelConfig):
        problem = "a model of your own is not divided"
        yield NAME, problem, f"{alone}, or choose a built-in model, such as model=tiny"
        return
    if not job.model.problems(sequence_length=job.train.sequence_length):
        for problem, todo in of_stages(job.model, stages, engine.chunks):
            yield NAME, problem, todo
    if engine.stage > 1:
        problem = f"ZeRO stage {engine.stage} reduces gradients or gathers weights a micro-batch"
        yield "engine.stage", f"{problem}, and several pass a pipeline at once", "choose 0 or 1"
    if engine.pipeline_schedule == "zero-bubble":
        problem = "zero-bubble takes the backward pass of a matrix apart, which a compiler can't"
        if job.train.compile != "off":
            yield "train.compile", problem, "write train.compile=off, or choose 1f1b"
        if job.precision.fp8 != "none":
            yield "precision.fp8", "is not supported with zero-bubble", "choose 1f1b"
    unsupported = {
        "engine.offload_optimizer": (engine.offload_optimizer, "write false"),
        "lora.rank": (job.lora.rank, "write 0"),
        "train.invariant": (job.train.invariant, "write false"),
        "validation.abilities": (job.validation.abilities, "leave it out"),
        "validation.prompts": (job.validation.prompts, "leave it out"),
        "precision": (job.precision.kind == "fp16", "choose bf16 or fp32"),
        "objective": (job.objective.are_preferences, "choose another"),
        "optimizer": (isinstance(job.optimizer, OwnOptimizerConfig), "choose adamw or muon"),
    }
    for name, (is_set, todo) in unsupported.items():
        if is_set:
            yield name, "is not supported with a pipeline", f"{todo}, or {NAME}=1"
    zero = engine.deepspeed.get("zero_optimization", {})
    for name in ("overlap_comm", "contiguous_gradients"):
        if isinstance(zero, dict) and name in zero:
            problem = "does not apply to a pipeline, which reduces gradients at the end of a step"
            yield f"engine.deepspeed.zero_optimization.{name}", problem, "leave it out"
