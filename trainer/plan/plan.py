"""Everything about a training job that can be known before it starts, as one object.

    job, machine  ->  data (manifests alone)  ->  model  ->  choices: one a ZeRO stage
                  ->  time, checkpoints, failures  ->  problems (what can't work), notes

Invariant: no GPU is touched, nothing is written or prepared, and torch is loaded only for a class
of the user's own (on the meta device, without its values). What the numbers stand on is in
memory.py, communication.py, step_time.py and failures.py; the choices are made in options.py.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from forescale.config.schema import Problem
from forescale.data.dataset import Dataset
from forescale.data.prepare.corpus import VOCABULARY, PythonSource, embedded_path
from forescale.data.sources import Sources
from forescale.engine.deepspeed_config import deepspeed_config
from forescale.errors import UserError
from forescale.models.config import ModelConfig
from forescale.models.flops import count, flops_6n
from forescale.plan.communication import collectives
from forescale.plan.config import PlanJob
from forescale.plan.failures import Outlook, outlook
from forescale.plan.memory import checkpoint_bytes
from forescale.plan.options import Choice, Ways, name_of
from forescale.plan.parameters import Inventory, Parameter, inventory
from forescale.plan.step_time import Measured, Price, Step, measure, price_of, step_of
from forescale.run.feed import epochs, feed_of, notes
from forescale.run.forecast import band_of
from forescale.run.start import open_sources, settle

# Seconds: collectives, a pause of the kernels, locked pages: a save hardly ever stalls for less.
_LEAST_STALL = 1.0


@dataclass(frozen=True)
class Source:
    """A source of the data: what it holds, how much of it the run reads."""

    name: str
    tokens: int
    read: float
    epochs: float


class Plan:
    """Of a job that has no problems in itself. Raises UserError where its model can't be made."""

    def __init__(self, job: PlanJob):
        self.problems: list[Problem] = []
        self.notes: list[str] = job.notes()
        self.given = job
        self.sources = self._open(job)
        self.job: PlanJob = self._settled(job)
        self._try(lambda: band_of(self.job))
        self.machine, self.world = job.machine, job.world_size
        self.nodes, self.per_node = job.nodes, job.per_node
        self.measured: Measured | None = None
        if job.plan.from_run:
            self.measured = self._try(lambda: measure(str(job.plan.from_run), job.run.root))
        if isinstance(self.job.model, ModelConfig):
            self.held = inventory(self.job)
            six_n = flops_6n(self.job.model)
            self.price = price_of(self.job.model, job.train.sequence_length, six_n)
        else:
            self.held, self.price = _foreign(self.job, self.vocab_size)
            self.notes.append("The model is yours: its activations are not known here.")
        self._ways = Ways(self.held, self.price, self.machine, job.plan, self.measured)
        self._judge()

    # What it reads

    def _open(self, job: PlanJob) -> Sources | None:
        if job.data.path or job.data.sources:
            return self._try(lambda: open_sources(job.data))
        path = embedded_path(PythonSource(), job.data.cache_directory, job.data.embedded)
        if not (path / "manifest.json").exists():
            self.notes.append(
                "The embedded corpus isn't prepared yet, so how often it is read isn't known; "
                "`train` prepares it."
            )
            return None
        return self._try(lambda: Sources({"data": Dataset(path)}))

    def _try(self, make):
        """What `make` makes, or None and a problem."""
        try:
            return make()
        except UserError as e:
            self.problems.append(Problem(e.where, e.what, e.todo))
            return None

    @property
    def vocab_size(self) -> int:
        return self.sources.vocab_size if self.sources else VOCABULARY[self.given.data.embedded]

    def _settled(self, job: PlanJob) -> PlanJob:
        settled: Any = self._try(lambda: settle(job, self.sources)) if self.sources else None
        if settled is not None:
            return settled
        if isinstance(job.model, ModelConfig):
            vocabulary = job.model.vocab_size or VOCABULARY[job.data.embedded]
            if not job.model.vocab_size and (job.data.path or job.data.sources):
                self.notes.append(f"The vocabulary is taken as {vocabulary:,}: no data to ask.")
            made = job.model.resolved(vocabulary, job.train.sequence_length)
            return replace(job, model=made)
        return job

    @cached_property
    def data(self) -> list[Source]:
        """Of each source; none where the data can't be opened."""
        if self.sources is None:
            return []
        splits = self.sources.split("train")
        total = self.job.total_steps * self.job.tokens_per_step
        times: dict[str, float] = {}
        if self.job.data.packing == "windows":
            feed = self._try(lambda: feed_of(self.job, self.sources))
            if feed is not None:
                times = epochs(self.job, feed)
                self.notes += notes(self.job, feed)
        if not times:
            weights = self.job.data.weights or {n: s.num_tokens for n, s in splits.items()}
            whole = sum(weights.values()) or 1
            times = {
                n: total * weights.get(n, 0) / whole / max(1, s.num_tokens)
                for n, s in splits.items()
            }
        return [
            Source(name, split.num_tokens, times[name] * split.num_tokens, times[name])
            for name, split in splits.items()
        ]

    # What it holds and sends

    @property
    def available(self) -> float:
        """Bytes of a GPU, or a rank's share of this computer."""
        return self._ways.available_to(self.job)

    @cached_property
    def choices(self) -> list[Choice]:
        """Stages 0 to 3, and 3 with a hierarchical partition where there are several nodes."""
        return self._ways.all(self.job)

    @cached_property
    def chosen(self) -> Choice:
        name = name_of(self.job)
        return next((c for c in self.choices if c.name == name), None) or self._ways.of(self.job)

    @cached_property
    def run_as_planned(self) -> Step | None:
        """What would have been said of the measured run before it was made."""
        if self.measured is None:
            return None
        run = replace(self.measured.job, logging=self.given.logging)  # its peak, if it has one
        world = self.measured.world
        held = inventory(run)
        per_node = min(self.machine.gpus_per_node or world, world)
        found = collectives(run, held, world)
        return step_of(run, held, self.measured.price, found, self.machine, world, per_node)

    # How long, what for

    @property
    def seconds(self) -> float | None:
        """Of the whole run's steps, without start, evaluation, saves and failures."""
        step = self.chosen.step.seconds
        return None if step is None else step * self.job.total_steps

    @property
    def checkpoint_bytes(self) -> int:
        return checkpoint_bytes(self.job, self.held)

    @property
    def save_seconds(self) -> float:
        """Until a checkpoint is on disk."""
        speed = min(self.machine.node_write * self.nodes, self.machine.total_write)
        return self.checkpoint_bytes / speed

    @property
    def stall_seconds(self) -> float:
        """In which training waits for a save."""
        return self._stall(self.world, self.save_seconds)

    def _stall(self, gpus: int, writing: float) -> float:
        copied = max(_LEAST_STALL, self.checkpoint_bytes / gpus / self.machine.to_host)
        return copied if self.job.checkpoint.background else copied + writing

    @property
    def lead_seconds(self) -> float:
        """From a signal until the run is saved: the step under way, the copy, the writing."""
        return (self.chosen.step.seconds or 0.0) + self.stall_seconds + self.save_seconds

    @property
    def checkpoints_kept(self) -> int:
        """At the run's end, and one more that is being written."""
        job, keep = self.job, self.job.checkpoint
        found = keep.keep + 1 + int(keep.keep_best) + len(keep.at)
        if keep.keep_every is not None and (every := job.steps_of(keep.keep_every)):
            found += job.total_steps // every
        return found

    @property
    def interval(self) -> float | None:
        """Seconds between two saves."""
        every = self.job.checkpoint.every
        if every.seconds is not None:
            return every.seconds
        step, steps = self.chosen.step.seconds, self.job.steps_of(every)
        return step * steps if step and steps else None

    def outlook(self, gpus: int) -> Outlook:
        """Failures and saves of the job if it ran on so many GPUs."""
        plan, each = self.given.plan, self.machine.gpus_per_node or self.world
        nodes = -(-gpus // each)
        detect = plan.detect or self.job.pulse.patience
        speed = min(self.machine.node_write * nodes, self.machine.total_write)
        writing = self.checkpoint_bytes / speed
        stall = self._stall(gpus, writing)
        restart = (detect.seconds or 0.0) + (plan.restart.seconds or 0.0)
        interval = self.interval or 1800.0
        return outlook(nodes, plan.failures, stall, restart, interval, writing)

    @property
    def gpu_hours(self) -> float | None:
        """With what failures take."""
        if self.seconds is None:
            return None
        return self.seconds / max(self.outlook(self.world).ettr, 1e-9) * self.world / 3600

    # What is wrong

    def _judge(self) -> None:
        _ = self.data
        if not self.chosen.fits(self.available):
            self.problems.append(self._too_much())
        lead, grace = self.lead_seconds, self.job.launch.grace.seconds or 0.0
        if lead > grace:
            self.notes.append(
                f"A signal leaves {grace:,.0f} s (launch.grace); a step and a save are expected to "
                f"take {lead:,.0f} s: raise it, and the signal's lead, or save faster."
            )
        interval = self.interval
        if interval is not None and interval < self.save_seconds:
            self.notes.append(
                f"A checkpoint every {interval:,.0f} s is asked for, and one takes "
                f"{self.save_seconds:,.0f} s to write: training will wait for it."
            )

    def _too_much(self) -> Problem:
        need, have = self.chosen.memory.total / 2**30, self.available / 2**30
        found = self.chosen.memory.states
        states = max(found.backward, found.updating) / 2**30
        what = f"{need:,.1f} GiB are needed of a GPU's {have:,.1f} ({states:,.1f} of model states)"
        todo = self._ways.nearest(self.job) or "no setting that is known here fits"
        return Problem("memory", what, todo)

    @property
    def deepspeed(self) -> dict[str, Any]:
        return deepspeed_config(self.job, self.world)

    @property
    def parameters(self) -> dict[str, int]:
        if isinstance(self.job.model, ModelConfig):
            return vars(count(self.job.model))
        return {"total": self.held.numel}


def _foreign(job: PlanJob, vocab_size: int) -> tuple[Inventory, Price]:
    """Parameters and price of a class of the user's own, made without values."""
    import torch

    from forescale.train.model import build_model, prices_of

    with torch.device("meta"):
        model = build_model(job, vocab_size)
    every = [Parameter(n, tuple(p.shape)) for n, p in model.named_parameters() if p.requires_grad]
    names = getattr(model, "muon_parameters", None)
    prices = prices_of(job, model)
    made = inventory(job, every, names() if names else None)
    return made, Price(prices["full"], prices["causal"], prices["six_n"])
