"""The plan of a training job: everything that can be computed before the job starts.

    job, machine  ->  data (manifests only)  ->  model  ->  options: one for each ZeRO stage
                  ->  time, checkpoints, failures  ->  problems (what can't work), notes

Invariant: a plan uses no GPU, writes and prepares nothing, and loads torch only if the model is a
class of the user's own (built on the meta device, without values). The formulas are in bytes/,
communication.py, step_time.py and failures.py; options.py evaluates the ways to shard.
"""

from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import Any, cast

from forescale.config.hardware import check_fp16
from forescale.config.schema import Problem
from forescale.config.sizes import in_words
from forescale.config.target import is_any_class
from forescale.data.dataset import Dataset, Sources
from forescale.data.prepare.corpus import VOCABULARY, PythonSource, embedded_path
from forescale.engine.deepspeed_check import problems_apart
from forescale.ground.console import span
from forescale.ground.errors import UserError
from forescale.models.adapters import stored_name
from forescale.models.config import ModelConfig
from forescale.models.memory import cache_bytes
from forescale.plan.bytes.memory import checkpoint_bytes, copy_bytes, outer_bytes, share_bytes
from forescale.plan.bytes.parameters import Inventory, Parameter, inventory
from forescale.plan.bytes.zero import BYTES
from forescale.plan.communication import collectives
from forescale.plan.config import PlanJob
from forescale.plan.evaluation import EvaluationCost, estimate_evaluation
from forescale.plan.failures import FailureEstimate, estimate_failures, stall_of
from forescale.plan.options import (
    ShardingOption,
    ShardingOptions,
    less_checkpointing,
    name_of,
    with_checkpointing,
)
from forescale.plan.outer import standing_seconds
from forescale.plan.published import published_notes
from forescale.plan.search import Division, best_divisions
from forescale.plan.step_time import (
    MeasuredSpeed,
    StepTime,
    TokenFlops,
    measure,
    predict_step_time,
    token_flops,
)
from forescale.run.branch import NewestStep, check_origin, with_step
from forescale.run.data_use import DataUse, SourceUse, data_use
from forescale.run.feed import resolved_model
from forescale.run.forecast import prediction_interval_of
from forescale.run.start import open_sources, settle


class Plan:
    """The plan of a job whose config has no problems.

    newest: see branch.with_step. Raises UserError if a class of the user's own can't be built.
    """

    def __init__(self, job: PlanJob, newest: NewestStep | None = None):
        self.problems: list[Problem] = []
        self.notes: list[str] = job.notes()
        self.given = job
        self.sources = self._open(job)
        self.job: PlanJob = self._settled(job)
        self.check(lambda: prediction_interval_of(self.job))
        self.check(job.logging.check_trackers)
        self.check(lambda: check_fp16(self.job.precision.kind, self.job.on_gpu))
        if (sources := self.sources) is not None:
            self.check(lambda: check_origin(with_step(self.job, None, newest), sources))
        self.machine = job.machine
        self.measured: MeasuredSpeed | None = None
        if job.plan.from_run:
            self.measured = self.check(lambda: measure(str(job.plan.from_run), job.run.root))
        if isinstance(self.job.model, ModelConfig):
            self.trained = inventory(self.job)
            six_n = job.lora.flops_6n(self.job.model)
            length, ranks = job.train.sequence_length, job.engine.sequence_parallel
            self.per_token = token_flops(self.job.model, job.lora, length, six_n, ranks)
        else:
            self.trained, self.per_token = _class_of_user(self.job, self.vocab_size)
            whose = "transformers" if is_any_class(job.model) else "your own"
            self.notes.append(
                f"The model is a class of {whose}: the memory of its activations is not known and "
                "not included."
            )
        longest = getattr(job.model, "max_sequence_length", None)
        self._options = ShardingOptions(
            self.trained, self.per_token, self.machine, job.plan, self.measured, longest
        )
        _ = self.data  # also records problems of the data
        self.sizes = self._planned_sizes()
        self._take(next((plan.job for plan in self.sizes.values()), self.job))
        if fitting := self.fitting_sizes:
            self._take(self.sizes[fitting[0]].job)
            if others := [size for size in self.sizes if size not in fitting]:
                note = f"These sizes don't fit in memory and are not used: {in_words(others)}."
                self.notes.append(note)
        self._check_deepspeed()
        self._find_problems()

    # The sizes of a range

    def _take(self, job: PlanJob) -> None:
        """Plan a job of one size: of a range the largest that fits; if none does, the largest."""
        self.job, self.world = job, job.world_size
        self.nodes, self.per_node = job.nodes, job.per_node

    def _planned_sizes(self) -> dict[int, "Plan"]:
        """Return the plan at each size at which the job can run, the largest first; empty without a
        range. They have no options, problems or notes."""
        plans = {}
        for size in self.job.usable_sizes() if self.job.elastic else ():
            plan = plans[size] = copy(self)
            plan.problems, plan.notes = [], []
            plan._take(self.job.at(size))
            plan.chosen = self._options.evaluate(plan.job)
        return plans

    @property
    def fitting_sizes(self) -> list[int]:
        """The sizes at which the job can run and fits in memory, the largest first; empty without a
        range."""
        return [size for size, plan in self.sizes.items() if plan.chosen.fits(plan.available)]

    # The data that it reads

    def _open(self, job: PlanJob) -> Sources | None:
        if job.data.path or job.data.sources:
            return self.check(lambda: open_sources(job.data))
        path = embedded_path(PythonSource(), job.data.cache_directory, job.data.embedded)
        if not (path / "manifest.json").exists():
            self.notes.append(
                "The embedded corpus is not prepared yet, so its number of epochs is not known; "
                "`forescale train` prepares it."
            )
            return None
        return self.check(lambda: Sources({"data": Dataset(path)}))

    def check(self, make):
        """Return the result of `make`; if it raises UserError, record the problem, return None."""
        try:
            return make()
        except UserError as e:
            self.problems.append(Problem(e.where, e.problem, e.todo))
            return None

    def _check_deepspeed(self) -> None:
        try:
            self.problems += problems_apart(self.job, self.job.world_size)
        except UserError as e:  # a login node may plan without it
            self.notes.append(f"{e.where} {e.problem}.")

    @property
    def vocab_size(self) -> int:
        """Vocabulary of the data, or of the embedded corpus if no data can be opened."""
        return self.sources.vocab_size if self.sources else VOCABULARY[self.given.data.embedded]

    def _settled(self, job: PlanJob) -> PlanJob:
        settled: Any = self.check(lambda: settle(job, self.sources)) if self.sources else None
        if settled is not None:
            return settled
        job = job.fitted()
        if isinstance(job.model, ModelConfig):
            vocabulary = VOCABULARY[job.data.embedded]
            if not job.model.vocab_size and (job.data.path or job.data.sources):
                self.notes.append(
                    f"The data can't be opened, so a vocabulary of {vocabulary:,} is assumed."
                )
            assumed = min(vocabulary, job.model.vocab_size or vocabulary)
            return replace(job, model=resolved_model(job, assumed))
        return job

    @cached_property
    def _use(self) -> DataUse | None:
        if self.sources is None:
            return None
        use = data_use(self.job, self.sources, self.check)
        self.notes += use.notes
        return use

    @property
    def data(self) -> list[SourceUse]:
        """The use of each source; empty if the data can't be opened."""
        return self._use.sources if self._use else []

    # Memory and communication

    @property
    def available(self) -> float:
        """Memory of a GPU in bytes, or a rank's share of this computer's memory."""
        return self._options.available_to(self.job)

    @cached_property
    def options(self) -> list[ShardingOption]:
        """Stages 0 to 3; on several nodes also 3 with a hierarchical partition."""
        return self._options.all(self.job)

    @cached_property
    def chosen(self) -> ShardingOption:
        """The option that the job configures."""
        name = name_of(self.job)
        named = next((option for option in self.options if option.name == name), None)
        return named or self._options.evaluate(self.job)

    @cached_property
    def predicted_for_measured(self) -> StepTime | None:
        """The predicted step time of the run plan.from_run, to compare with the measured one."""
        if self.measured is None:
            return None
        run = replace(self.measured.job, logging=self.given.logging)  # its peak, if it has one
        world = self.measured.world
        trained = inventory(run)
        per_node = min(self.machine.gpus_per_node or world, world)
        traffic = collectives(run, trained, world)
        return predict_step_time(
            run, trained, self.measured.flops, traffic, self.machine, world, per_node
        )

    @cached_property
    def divisions(self) -> list[Division]:
        """The best divisions of the job among its ranks; see search.py."""
        return best_divisions(self._options, self.job)

    # Time, checkpoints, failures

    @property
    def seconds(self) -> float | None:
        """Seconds of all steps of the run, without start, evaluation, saves and failures."""
        return self._options.run_seconds(self.chosen)

    @cached_property
    def evaluation(self) -> EvaluationCost | None:
        """The cost of the evaluations; None if neither the data is known nor validation.windows."""
        use, step = self._use or DataUse([], None, []), self.chosen.step
        return estimate_evaluation(
            self.job, use.held_out, self.per_token, step, self.world, use.compared, use.questions
        )

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of one checkpoint."""
        return checkpoint_bytes(self.job, self.trained, self.world)

    @property
    def copy_bytes(self) -> int:
        """Bytes of CPU memory of the first node that its ranks keep for copies of a checkpoint:
        with checkpoint.peer another, and two snapshots of this node and of another; and for outer
        weights."""
        of = self.job, self.trained, self.world, self.job.on_gpu
        copies = 1 if self.job.checkpoint.peer is None else 6 if self.nodes > 1 else 4
        outer = self.per_node * outer_bytes(self.job, self.trained, self.world)
        return copies * sum(copy_bytes(*of, rank) for rank in range(self.per_node)) + outer

    @property
    def save_seconds(self) -> float:
        """Seconds to write a checkpoint to disk."""
        speed = min(self.machine.node_write * self.nodes, self.machine.total_write)
        return self.checkpoint_bytes / speed

    @property
    def stall_seconds(self) -> float:
        """Seconds for which a save pauses training."""
        return self._stall(self.world, self.save_seconds)

    def _stall(self, gpus: int, writing: float) -> float:
        share = share_bytes(self.job, self.trained, self.world, among=gpus)
        copying = share / self.machine.to_host
        return stall_of(copying, writing, self.job.checkpoint.background)

    @property
    def lead_seconds(self) -> float:
        """Seconds from a signal until the run is saved: the current step, the copy, the writing."""
        return (self.chosen.step.seconds or 0.0) + self.stall_seconds + self.save_seconds

    @property
    def interval(self) -> float | None:
        """Seconds between two saves; None if they are counted in steps and no speed is known."""
        every = self.job.checkpoint.every
        if every.seconds is not None:
            return every.seconds
        step, cadence = self.chosen.step.seconds, self.job.cadence(every)
        return step * cadence.steps if step and cadence else None

    def failures(self, gpus: int) -> FailureEstimate:
        """Return the cost of failures and saves if the job ran on `gpus` GPUs."""
        plan, each = self.given.plan, self.machine.gpus_per_node or self.world
        nodes = -(-gpus // each)
        detect = plan.detect or self.job.heartbeat.patience
        speed = min(self.machine.node_write * nodes, self.machine.total_write)
        writing = self.checkpoint_bytes / speed
        stall = self._stall(gpus, writing)
        restart = (detect.seconds or 0.0) + (plan.restart.seconds or 0.0)
        interval = self.interval or 1800.0
        return estimate_failures(nodes, plan.failures, stall, restart, interval, writing)

    @property
    def gpu_hours(self) -> float | None:
        """GPU-hours of the run, or of a member of it, including the time that evaluations, rounds
        with other clusters and failures cost."""
        step = self.chosen.step.seconds
        if self.seconds is None or step is None:
            return None
        evaluating = (self.evaluation.seconds if self.evaluation else None) or 0.0
        useful = max(self.failures(self.world).ettr, 1e-9)
        rounds = self.job.total_steps / (self.job.outer.steps or 1)
        beside = evaluating + rounds * standing_seconds(self.job, self.trained, step)
        return (self.seconds + beside) / useful * self.world / 3600

    # Problems and notes

    def _find_problems(self) -> None:
        kinds = self.parameters
        self.notes += published_notes(self.job, kinds.get("active", kinds["total"]))
        if self.chosen.fits(self.available):
            self._note_checkpointing()
        else:
            need, have = self.chosen.memory.total / 2**30, self.available / 2**30
            states_of = self.chosen.memory.states
            states = max(states_of.backward, states_of.updating) / 2**30
            problem = (
                f"a rank needs {need:,.1f} GiB ({states:,.1f} of them for model states), "
                f"but a GPU has {have:,.1f}"
            )
            todo = self._options.smallest_fix(self.job)
            if not todo and self.divisions:
                todo = f"set {self.divisions[0].words}"
            todo = (
                todo
                or self._options.more_gpus(self.job)
                or ("no sharding option fits: choose a smaller model or a machine with more memory")
            )
            self.problems.append(Problem("memory", problem, todo))
        lead, grace = self.lead_seconds, self.job.launch.grace.seconds or 0.0
        if lead > grace:
            self.notes.append(
                f"launch.grace allows {grace:,.0f} s after a signal, but a step and a save are "
                f"predicted to take {lead:,.0f} s. Raise launch.grace and the lead time of the "
                "signal, or write to faster storage."
            )
        evaluating = (self.evaluation.periodic_seconds if self.evaluation else None) or 0.0
        if evaluating > grace:
            self.notes.append(
                f"A periodic evaluation is predicted to take {span(evaluating)}: after a stop "
                f"signal in it, launch.grace ({span(grace)}) ends before it does, and the run "
                "resumes from the last checkpoint. Lower validation.windows."
            )
        interval = self.interval
        if interval is not None and interval < self.save_seconds:
            self.notes.append(
                f"A checkpoint is due every {interval:,.0f} s, but writing one takes "
                f"{self.save_seconds:,.0f} s: training will wait. Raise checkpoint.every."
            )

    def _note_checkpointing(self) -> None:
        """Add a note if the job would also fit with cheaper activation checkpointing."""
        for how in less_checkpointing(self.job):
            other = with_checkpointing(self.job, how)
            need, model = self._options.memory(other).total, cast(ModelConfig, other.model)
            if need > self.available:
                continue
            now, length = self.per_token, self.job.train.sequence_length
            ranks, lora = self.job.engine.sequence_parallel, self.job.lora
            less = token_flops(model, lora, length, now.six_n, ranks)
            saved = 1 - (less.full + less.recomputed) / (now.full + now.recomputed)
            if saved < 0.005:
                continue
            self.notes.append(
                f"Activation checkpointing can be {how}: a rank then needs "
                f"{need / 2**30:,.1f} of {self.available / 2**30:,.1f} GiB, and computes "
                f"{saved:.0%} less. Set model.activation_checkpointing={how}."
            )
            return

    @property
    def parameters(self) -> dict[str, int]:
        """Number of parameters by kind, with the key "total"."""
        if isinstance(self.job.model, ModelConfig):
            return self.job.lora.counts(self.job.model)
        adapters = {"trained adapters": self.trained.num_trained} if self.job.lora.rank else {}
        return {"total": self.trained.numel, **adapters}

    @property
    def cache_bytes(self) -> int | None:
        """Bytes that decoding keeps for one sequence, of an encoder-decoder for a row; None if the
        model is not one of ours, or doesn't decode."""
        model, length = self.job.model, self.job.train.sequence_length
        if not isinstance(model, ModelConfig) or not model.causal:
            return None
        return cache_bytes(model, length, BYTES[self.job.precision.kind])


def _class_of_user(job: PlanJob, vocab_size: int) -> tuple[Inventory, TokenFlops]:
    """Return parameters and FLOPs of a model that is a class of the user's own, built without
    values. Loads torch. Raises UserError if it can't be built."""
    import torch

    from forescale.train.model import build_model, freeze, prices_of
    from forescale.train.probe import examine_model

    examine_model(job, vocab_size)
    with torch.device("meta"):
        model = build_model(job, vocab_size)
        freeze(job, model)
    named = ((stored_name(n), p) for n, p in model.named_parameters())
    every = [Parameter(n, tuple(p.shape), p.requires_grad) for n, p in named]
    names = getattr(model, "muon_parameters", None)
    prices = prices_of(job, model)
    parameters = inventory(job, every, names() if names else None)
    return parameters, TokenFlops(
        prices["full"], prices["causal"], prices["six_n"], prices["full"] / 3
    )
