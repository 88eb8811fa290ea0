"""A training job: its sections, and the rules about several of them.

Invariant: a rule about one section is in its class (sections/), a rule about several is here;
`problems()` returns (key, what is wrong, what to do) and never raises. A default is the value of a
key that is not set; recipes are the files of `conf/recipe/`.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from math import gcd
from typing import Any, ClassVar, Literal, NotRequired, Self

from forescale.config.duration import Duration
from forescale.config.hardware import has_gpu, native_precision
from forescale.config.job import Find, Job, ProblemIterator, Problems
from forescale.config.mesh import Mesh, expert_problems, mesh_problems
from forescale.config.pipeline import pipeline_notes, pipeline_problems
from forescale.config.schema import TargetConfig, block, key, section
from forescale.config.sections.batch import ranks_problems
from forescale.config.sections.data import DataConfig
from forescale.config.sections.engine import MOST_ROUNDED_SUMS, EngineConfig, PrecisionConfig
from forescale.config.sections.faults import problems as faults_problems
from forescale.config.sections.invariant import invariant_problems
from forescale.config.sections.lengths import Lengths
from forescale.config.sections.lora import LoraConfig
from forescale.config.sections.lora import problems as lora_problems
from forescale.config.sections.objective import (
    OBJECTIVES,
    NextTokenConfig,
    ObjectiveConfig,
    objective_problems,
)
from forescale.config.sections.optimizer import OPTIMIZERS, AdamWConfig, OptimizerConfig
from forescale.config.sections.outer import OuterConfig, outer_problems
from forescale.config.sections.ramp import length_ramp_conflicts, length_ramp_notes
from forescale.config.sections.runtime import (
    CheckpointConfig,
    GuardConfig,
    HeartbeatConfig,
    LaunchConfig,
    LoggingConfig,
    ProfileConfig,
    ValidationConfig,
)
from forescale.config.sections.schedule import SCHEDULES, ConstantConfig, ScheduleConfig
from forescale.config.sections.training import RunConfig, TrainConfig
from forescale.config.sizes import SizeRange, Sizes, in_words
from forescale.ground.errors import UserError
from forescale.models.choices import Mup
from forescale.models.config import ModelConfig
from forescale.models.flops import count


@dataclass
class TrainJob(Lengths, Job):
    """A complete training job. Batches are counted in windows."""

    VERB: ClassVar[str] = "train"
    TARGET: ClassVar[str] = "run.name"
    PRINTS: ClassVar = {"kind": str, "step": NotRequired[int], "exit_code": NotRequired[int]}
    LINES: ClassVar[str] = "started, each row of metrics.jsonl, ended"
    RESUMES: ClassVar[bool] = True  # without a name, the verb continues the run in run.directory

    run: RunConfig = section(RunConfig, kind="free")  # name and place of the run
    train: TrainConfig = section(TrainConfig, kind="identity")  # length and batch
    model: ModelConfig | TargetConfig = section(ModelConfig, kind="identity")  # the transformer
    data: DataConfig = section(DataConfig, kind="free")  # training data
    # what the model learns to predict
    objective: ObjectiveConfig = block(OBJECTIVES, NextTokenConfig, kind="identity")
    lora: LoraConfig = section(LoraConfig, kind="identity")  # adapters beside frozen weights
    optimizer: OptimizerConfig = block(OPTIMIZERS, AdamWConfig, kind="identity")  # the update rule
    # the learning rate after the warm-up
    schedule: ScheduleConfig = block(SCHEDULES, ConstantConfig, kind="identity")
    engine: EngineConfig = section(EngineConfig, kind="numerics")  # DeepSpeed
    precision: PrecisionConfig = section(PrecisionConfig, kind="numerics")  # number formats
    checkpoint: CheckpointConfig = section(CheckpointConfig, kind="free")  # checkpoints
    validation: ValidationConfig = section(ValidationConfig, kind="free")  # held-out losses
    guard: GuardConfig = section(GuardConfig, kind="numerics")  # anomalous steps
    heartbeat: HeartbeatConfig = section(HeartbeatConfig, kind="free")  # ranks that hang or lag
    logging: LoggingConfig = section(LoggingConfig, kind="free")  # logging
    launch: LaunchConfig = section(LaunchConfig, kind="free")  # processes
    outer: OuterConfig = section(OuterConfig, kind="identity")  # one run on several clusters
    profile: ProfileConfig = section(ProfileConfig, kind="free")  # traces
    # your own callbacks: a list of mappings with _target_ and arguments
    callbacks: list[TargetConfig] = key([], kind="free")
    # forecast to compare the loss with: its path, or STUDY/ID
    forecast: str | None = key(None, kind="free")
    # faults to inject, each once per run, such as [kill@120:rank1]; see `drill`
    faults: list[str] = key([], kind="free")

    # allow running a class of your own that an existing run's config names, and no command of yours
    trust: bool = key(False, kind="free")

    def mesh(self, world_size: int) -> Mesh:
        """Return how so many ranks are grouped."""
        e = self.engine
        near = e.sequence_parallel, e.tensor_parallel, e.expert_parallel, e.context_parallel
        return Mesh(world_size, *near, e.pipeline_parallel, e.shard_group)

    @property
    def continues_text(self) -> bool:
        """True if the model reads a text as one row and continues it."""
        reads_one_row = not getattr(self.model, "encoder_layers", 0)
        sees_earlier = getattr(self.model, "causal", True)
        return self.objective.continues_text and sees_earlier and reads_one_row

    @property
    def training(self) -> "TrainJob":
        """The part of a verb's job that `train` has too."""
        return TrainJob(**{f.name: getattr(self, f.name) for f in fields(TrainJob)})

    @property
    def native_precision(self) -> Literal["bf16", "fp32"]:
        """What precision.kind=auto means on the machine that trains."""
        return native_precision()

    def accumulation(self, world_size: int) -> int:
        """Return how many micro-batches of a step a rank computes, at most."""
        train = self.train
        return -(-train.global_batch // (train.micro_batch * self.mesh(world_size).data))

    def gradient_dtype(self, world_size: int) -> str:
        """Return the number format in which so many ranks add up their gradients."""
        dtype = self.engine.gradient_dtype
        adds_many = dtype == "auto" and self.accumulation(world_size) > MOST_ROUNDED_SUMS
        in_fp32 = dtype == "fp32" or adds_many or self.train.invariant
        return "fp32" if in_fp32 else self.precision.kind

    def adds_in_fp32(self, world_size: int) -> bool:
        """Return whether so many ranks add up gradients in fp32 that the model makes in less."""
        return self.gradient_dtype(world_size) != self.precision.kind

    @property
    def on_gpu(self) -> bool:
        """Whether the machine that trains has GPUs."""
        return has_gpu()

    def for_machine(self, find: Find | None = None) -> Self:
        """Return the job with the values that follow from the machine and from the model's size:
        the precision, and a rate, a length and a batch.

        A command that continues a run without naming it (RESUMES) keeps the run's precision, so
        that a run does not change its precision when it moves to another machine.
        """
        model, width, parameters = self.model, None, None  # of a class of the user's own
        if isinstance(model, ModelConfig):
            mup = model.parametrization
            width = mup.base_width if isinstance(mup, Mup) else model.ruled_width
            if self.train.tokens_per_parameter is not None:
                with suppress(ValueError):  # problems() reports it
                    parameters = count(model.resolved(2, self.train.sequence_length)).blocks
        optimizer, train = self.optimizer.for_width(width), self.train.by_rule(parameters)
        job = replace(self, optimizer=optimizer, train=train)
        if self.precision.kind != "auto":
            return job
        kind = self.native_precision
        with suppress(UserError):  # of a damaged config: `start` reports it
            if frozen := find(self.run.directory) if find and self.RESUMES else None:
                kind = frozen["precision"]["kind"]
        return replace(job, precision=replace(self.precision, kind=kind))

    @property
    def elastic(self) -> SizeRange | None:
        """The sizes that a run may change between; None if its size is fixed."""
        ranks = self.launch.processes
        return SizeRange("launch.processes", ranks) if ranks and ranks.is_range else None

    def at(self, size: int) -> Self:
        """Return the job at one of the sizes of `elastic`; a job of one size as it is."""
        if self.elastic is None:
            return self
        name, _, key = self.elastic.key.partition(".")
        part: Any = getattr(self, name)
        return replace(self, **{name: replace(part, **{key: Sizes(size, size)})})

    def usable_sizes(self, sizes: Iterable[int] | None = None) -> list[int]:
        """Return the sizes of `elastic` at which no rule is broken, the largest first. sizes: those
        to try instead. What fits in memory is another question: `Plan.fitting_sizes`."""
        assert self.elastic is not None, "only of a range"
        job, each = replace(self, faults=[]), self.elastic.each  # a rank that isn't there has none
        most = self.train.global_batch // self.train.micro_batch * self.mesh(1).together // each
        tried = self.elastic.sizes if sizes is None else sizes
        return [n for n in tried if n <= most and not any(job._problems(n * each))]

    def notes(self) -> list[str]:
        """What a user should know although nothing is wrong; a sentence each."""
        notes = [*length_ramp_notes(self), *pipeline_notes(self)]
        if (elastic := self.elastic) and (usable := self.usable_sizes()) != [*elastic.sizes]:
            any_order = replace(self, train=replace(self.train, invariant=True)).usable_sizes()
            other = f"; with train.invariant=true, {in_words(any_order)}" if any_order else ""
            other *= any_order != usable
            notes.append(f"{elastic.key}={elastic.sizes} can be {in_words(usable)}{other}.")
        if self.precision.kind == "fp16":
            notes.append("precision fp16 has not been proven: its loss scaling never ran on a GPU.")
        if self.precision.fp8 != "none":
            notes.append("precision.fp8 has not been proven: it never ran on a GPU in our tests.")
        if (kernel := self.train.attention_kernel) != "torch":
            notes.append(f"train.attention_kernel={kernel} never ran on a GPU in our tests.")
        if (steps := self.warmup_that_fits()) is not None:
            notes.append(
                f"schedule.warmup={self.schedule.warmup} doesn't fit in a run of "
                f"{self.total_steps:,} steps; its warm-up is {Duration(steps)}."
            )
        return notes

    def problems(self, world_size: int | None = None) -> Problems:
        """Return the broken rules over several sections. `world_size`: the number of ranks that
        have started; without it, `launch.processes`, of a range the largest that can be."""
        ranks, elastic = self.launch.processes, self.elastic
        if elastic is None:
            return [*self._problems(world_size or (ranks.most if ranks else None))]
        if world_size is not None:  # faults of ranks that aren't there are not injected
            return [*replace(self, faults=[])._problems(world_size)]
        largest = next(iter(self.usable_sizes()), None)
        if largest is None and (near := self._nearest_sizes(elastic)):
            problem = f"the job can't run with any number in {elastic.sizes}"
            return [(elastic.key, problem, f"the nearest that works: {in_words(near)}")]
        if largest is None:  # a size that groups divide says what else is wrong
            group, each = self.mesh(1).together, elastic.each
            whole = (n for n in elastic.sizes if n * each % group == 0)
            largest = next(whole, elastic.sizes.most)
        return [*self._problems(largest * elastic.each)]

    def _nearest_sizes(self, elastic: SizeRange) -> list[int]:
        """Return the nearest usable size below a range, and the nearest above."""
        least, most = elastic.sizes.least, elastic.sizes.most
        sides = range(least - 1, 0, -1), range(most + 1, 2 * most + 1)
        return [size for side in sides for size in self.usable_sizes(side)[:1]]

    def _problems(self, ranks: int | None) -> ProblemIterator:
        yield from mesh_problems(self, ranks)
        yield from pipeline_problems(self, ranks)
        near = self.engine.hierarchical_partition
        if ranks and ranks % near:
            problem = f"{near} ranks don't divide {ranks}"
            yield "engine.hierarchical_partition", problem, f"choose {gcd(ranks, near)}"
        if self.engine.quantized_weights and not self.on_gpu:
            yield "engine.quantized_weights", "has kernels for GPUs alone", "leave it out"
        if (ranks or self.mesh(1).together) % self.mesh(1).together:
            return  # what follows counts groups
        has_length = self.train.has_length
        yield from ranks_problems(self.train, self.mesh(ranks or self.mesh(1).together))
        yield from faults_problems(self.faults, ranks, self.total_steps if has_length else None)
        again = getattr(self.model, "activation_checkpointing", "none")
        if self.train.activation_memory_budget is not None and again != "none":
            problem = f"model.activation_checkpointing={again} has chosen what is made again"
            yield "train.activation_memory_budget", problem, "give one of the two"
        if (kernel := self.train.attention_kernel) != "torch":
            if self.precision.kind == "fp32":
                yield "train.attention_kernel", f"{kernel} is for bf16 and fp16", "leave it out"
            if isinstance(self.model, ModelConfig) and self.model.dropout:
                problem, todo = f"{kernel} has no dropout", "set model.dropout=0, or leave it out"
                yield "train.attention_kernel", problem, todo
        if isinstance(self.model, ModelConfig):
            for name, problem, todo in self.model.problems(
                sequence_length=self.train.sequence_length
            ):
                yield f"model.{name}", problem, todo
        elif self.precision.fp8 != "none":
            problem = "multiplies matrices of forescale's own models, and this is another class"
            yield "precision.fp8", problem, "leave it out"
        yield from expert_problems(self, ranks)
        yield from invariant_problems(self)
        yield from objective_problems(self)
        yield from lora_problems(self)
        yield from length_ramp_conflicts(self)
        yield from outer_problems(self)
        if not has_length:  # the section `train` has a problem
            return
        if (self.train.tokens or self.tokens_per_step) < self.tokens_per_step:
            problem = f"{self.train.tokens} don't fill one step of {self.tokens_per_step} tokens"
            yield "train.tokens", problem, "train longer or lower train.global_batch"
        yield from self.length_problems()
        if self.profile.interval and self.profile.interval[1] > self.total_steps:
            problem = f"{self.profile.steps} reaches beyond the run's {self.total_steps} steps"
            yield "profile.steps", problem, "choose earlier steps"
        for name, problem, todo in self.data.order_problems(self.steps_of):
            yield f"data.{name}", problem, todo
