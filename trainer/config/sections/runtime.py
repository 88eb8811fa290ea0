"""Config sections of a running job: checkpoint, guard, heartbeat, validation, logging, launch.

Invariant: all keys may change when a run resumes. Those of the guard decide which samples are used,
so they are of kind "numerics" (a change is recorded as an event); all others are "free".
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from forescale.config.abilities import QUESTIONS, TASKS
from forescale.config.duration import Duration
from forescale.config.job import ProblemIterator
from forescale.config.schema import key, section
from forescale.config.sections.trackers import (
    TensorboardConfig,
    TrackerConfig,
    TrackioConfig,
    WandbConfig,
)
from forescale.config.sizes import Sizes
from forescale.config.suggest import nearest_first


def ability_problems(abilities: Sequence[str], shots: Sequence[int]) -> ProblemIterator:
    """Yield a problem for each ability and number of examples that there is not, by the keys
    `abilities` and `shots`."""
    for name in abilities:
        if name not in TASKS:
            near = ", ".join(nearest_first(name, TASKS))
            yield "abilities", f"{name!r} is no task", f"choose among {near}"
    if any(count < 0 for count in shots):
        yield "shots", f"{shots} are no numbers of examples", "write shots=[0,4]"
    for name, values in (("abilities", abilities), ("shots", shots)):
        if len(set(values)) < len(values):
            yield name, f"{[*values]} names one twice", "leave it out once"


@dataclass
class CheckpointConfig:
    # time between two checkpoints; the last step is always saved
    every: Duration = key(Duration(500), common=True, gt=0)
    # newest checkpoints kept, and the last before the decay; at least two are safe: one may be
    # damaged
    keep: int = key(2, ge=2)
    # keep every checkpoint at a multiple of this for good; null: none
    keep_every: Duration | None = key(None, gt=0, wall_time=False)
    at: list[int] = key([])  # steps at which a checkpoint is saved and kept for good
    keep_best: bool = False  # also keep the checkpoint with the lowest validation loss
    # write from a copy in memory while training goes on; false: training waits
    background: bool = True
    # time between two snapshots in the memory of the node and of its neighbour, such as 2 min; the
    # next attempt resumes from them where they are newer than the newest checkpoint; null: none
    peer: Duration | None = key(None, gt=0)
    # where to copy the checkpoints in the background, such as s3://bucket/runs; a run whose
    # directory is missing is restored from there
    mirror: str | None = key(None, kind="free")

    def problems(self) -> ProblemIterator:
        if self.mirror is not None and not re.match(r"/|~|[a-z][\w+.-]*://[^?#]+$", self.mirror):
            problem = f"{self.mirror} is neither an address nor an absolute path"
            yield "mirror", problem, "write, for example, s3://bucket/runs or /backup/runs"
        elif re.match(r"(https?|file|local)://", self.mirror or ""):
            problem = f"{self.mirror} can't be written to"
            yield "mirror", problem, "use the address of a bucket, or a path"
        if any(step < 1 for step in self.at):
            problem = f"{self.at} has values below 1, which are no steps"
            yield "at", problem, "write checkpoint.at=[1000, 2000]"
        if self.peer is not None and not self.background:
            problem = "needs a copy in memory, which checkpoint.background=false rules out"
            yield "peer", problem, "leave one of them out"


Policy = Literal["note", "skip", "rollback", "halt"]


@dataclass
class GuardConfig:
    # if loss or gradient is not finite: skip the update, roll back, or halt
    non_finite: Literal["skip", "rollback", "halt"] = "skip"
    loss_spike: Policy = "note"  # if the loss is far above the recent ones; note: only log it
    gradient_spike: Policy = "note"  # if the gradient norm is far above the recent ones
    # standard deviations (estimated by the MAD) above the median that make a spike
    threshold: float = key(10.0, gt=0)
    window: int = key(128, ge=8)  # steps over which the median is taken
    warmup: int = key(64, ge=8)  # normal steps before spikes are detected
    patience: int = key(10, ge=1)  # anomalous steps in a row that stop the run, whatever the policy
    back: int = key(20, ge=0)  # rollback: least distance in steps to the checkpoint that is loaded
    # rollback: batches skipped before the anomalous one, besides it
    skip_before: int = key(0, ge=0)
    most_rollbacks: int = key(3, ge=1)  # rollbacks allowed in a run; one more stops it
    # steps after a rollback in which anomalous ones are only skipped
    cooldown: int = key(100, ge=0)
    # how often to compute a micro-batch again and compare weights across ranks, which finds silent
    # corruption; null: never
    replay: Duration | None = key(Duration(1000), kind="free", gt=0, wall_time=False)
    # what to do if bits differ that must be equal
    corruption: Literal["note", "rollback", "halt"] = key("halt", kind="free")
    # if the loss leaves the band of its forecast for a while (forecast=)
    forecast: Literal["note", "halt"] = key("note", kind="free")

    def problems(self) -> ProblemIterator:
        if self.warmup > self.window:
            problem = f"{self.warmup} steps don't fit in a window of {self.window}"
            yield "warmup", problem, "lower it or raise guard.window"


@dataclass
class HeartbeatConfig:
    # shortest time after which a rank counts as hanging
    patience: Duration = key(Duration(300, "seconds"), gt=0, wall_time=True)
    # a rank hangs only beyond this multiple of its longest time at the place
    factor: float = key(10.0, ge=2)
    # patience for start-up and the first step, which compiles
    startup: Duration = key(Duration(1800, "seconds"), gt=0, wall_time=True)
    straggler: float = key(1.5, gt=1)  # report ranks slower than this multiple of the median

    @property
    def interval(self) -> float:
        """Seconds between two heartbeats of a rank: 1, less where the patience is below 40 s."""
        # A heartbeat costs a fraction of a millisecond, and a patience has room for many of them:
        # a rank that is late once isn't taken for silent.
        return min(1.0, self.patience.seconds / 40)  # type: ignore[operator]

    @property
    def share_interval(self) -> float:
        """Seconds between two writes of a node's heartbeats to the run directory: 10, less where
        the patience is below 40 s."""
        # With 2,000 nodes 10 s are 200 small files a second, which shared storage can take.
        return min(10.0, self.patience.seconds / 4)  # type: ignore[operator]


@dataclass
class ValidationConfig:
    # time between two evaluations; the last step is always evaluated
    every: Duration = key(Duration(500), common=True, gt=0)
    # Losses of windows of 256 tokens of code have a standard deviation of about 0.55 nats.

    # windows in a periodic evaluation, evenly spread; null: all (as always at the end). The
    # standard error of the loss is about 0.012 nats with 2,048 of 256 tokens, half of it with four
    # times as many; `plan` shows what they cost
    windows: int | None = key(2048, ge=1)

    abilities: list[str] = key(
        [],
        "small tasks, the accuracy on which each evaluation measures too (objectives that continue "
        f"text): {', '.join(TASKS)}",
    )
    # abilities: numbers of solved examples before a question; each is measured
    shots: list[int] = key([0, 4])
    questions: int = key(QUESTIONS, ge=1, le=10**5)  # abilities: questions of a task at each number

    prompts: list[str] = key(
        [],
        "texts that each evaluation goes on writing, to see what the model has learned: printed, "
        "and sent to trackers (objectives that continue text)",
    )
    # prompts: the most tokens that are written to each; each costs a forward pass of all prompts
    prompt_tokens: int = key(64, ge=1)

    def problems(self) -> ProblemIterator:
        yield from ability_problems(self.abilities, self.shots)
        if self.abilities and not self.shots:
            yield "shots", "names no number of examples", "write shots=[0,4]"


@dataclass
class LoggingConfig:
    # time between two printed lines; metrics.jsonl has every step
    every: Duration = key(Duration(10), gt=0)
    # peak FLOP/s of a device, for the MFU; null: from a table, else measured
    peak_flops: float | None = key(None, gt=0)
    tensorboard: TensorboardConfig = section(TensorboardConfig)  # TensorBoard
    wandb: WandbConfig = section(WandbConfig)  # Weights & Biases
    trackio: TrackioConfig = section(TrackioConfig)  # trackio, of Hugging Face

    @property
    def trackers(self) -> list[TrackerConfig]:
        """The trackers that are enabled."""
        values = [getattr(self, f.name) for f in fields(self)]
        return [value for value in values if isinstance(value, TrackerConfig) and value.enabled]

    def check_trackers(self) -> None:
        """Raise UserError if a tracker's package or account is missing."""
        for tracker in self.trackers:
            tracker.check()


@dataclass
class LaunchConfig:
    # local ranks; null: one per GPU; on CPUs one per core, or fewer by batch and memory; 1-4: as
    # many of them as this machine has GPUs or cores for
    processes: Sizes | None = key(None, common=True)
    # longest time that a rank waits for the others in a collective
    timeout: Duration = key(Duration(1800, "seconds"), gt=0, wall_time=True)
    # time to save and exit after a stop signal; then ranks exit without saving
    grace: Duration = key(Duration(120, "seconds"), gt=0, wall_time=True)


@dataclass
class ProfileConfig:
    steps: str | None = None  # FIRST:LAST, such as 100:105: steps to write a trace of

    @property
    def interval(self) -> tuple[int, int] | None:
        """(first traced step, first step after the trace), or None."""
        match = re.fullmatch(r"(\d+):(\d+)", self.steps or "")
        return (int(match[1]), int(match[2])) if match else None

    def problems(self) -> ProblemIterator:
        if self.steps is not None and not (self.interval and self.interval[0] < self.interval[1]):
            yield "steps", f"{self.steps!r} is not FIRST:LAST", "write profile.steps=100:105"
