"""How a run is kept, watched and told: the keys of checkpoints, guard, pulse, logging and launch.

Invariant: all may change when a run goes on. The guard's decide what is learnt from, so they are
numerics: a change is told; all others are free.
"""

# ruff: noqa: RUF009 (key and section make fields, as dataclasses.field does)

import re
from dataclasses import dataclass
from typing import Literal

from forescale.config.data import Problems
from forescale.config.duration import Duration
from forescale.config.schema import key, section


def _positive(**lengths: Duration | None) -> Problems:
    return [
        (name, "must be longer than nothing", f"write {name}='500 steps' or another length")
        for name, length in lengths.items()
        if length is not None and length.amount == 0
    ]


def _wall_times(prefix: str = "", **lengths: Duration) -> Problems:
    return [
        (name, "must be a wall time", f"write {prefix}{name}='5 min'")
        for name, length in lengths.items()
        if length.unit != "seconds" or not length.amount
    ]


@dataclass
class CheckpointConfig:
    every: Duration = key(Duration(500), "how often; the last step is always saved")
    keep: int = key(2, "newest checkpoints kept; two, since one may be damaged", ge=2)
    keep_every: Duration | None = key(
        None, "kept for good: the checkpoints at multiples of this; null: none"
    )
    at: list[int] = key([], "saved and kept for good: the checkpoints at these steps")
    keep_best: bool = key(False, "kept too: the checkpoint of the lowest validation loss")
    background: bool = key(
        True, "write behind the training from a copy in memory; false: training waits"
    )

    def problems(self) -> Problems:
        found = _positive(every=self.every, keep_every=self.keep_every)
        if self.keep_every is not None and self.keep_every.unit == "seconds":
            todo = "write it in steps, tokens or percent"
            found.append(("keep_every", "can't be a wall time", todo))
        if any(step < 1 for step in self.at):
            found.append(("at", f"{self.at} are no steps", "write checkpoint.at=[1000, 2000]"))
        return found


Policy = Literal["note", "skip", "rollback", "halt"]


@dataclass
class GuardConfig:
    non_finite: Literal["skip", "rollback", "halt"] = key(
        "skip", "a loss or gradient that is no number: skip the update, go back, or stop"
    )
    loss_spike: Policy = key("note", "a loss far above the last ones; note: only say so")
    gradient_spike: Policy = key("note", "a gradient norm far above the last ones")
    threshold: float = key(
        10.0, "a spike is so many standard deviations (median and MAD) above the median", gt=0
    )
    window: int = key(128, "steps that the median is taken of", ge=8)
    warmup: int = key(64, "healthy steps before spikes are looked for", ge=8)
    patience: int = key(10, "ill steps in a row before the run stops, whatever the policy", ge=1)
    back: int = key(20, "rollback: to a checkpoint at least so many steps before", ge=0)
    skip_before: int = key(0, "rollback: batches before the ill one that are skipped too", ge=0)
    most_rollbacks: int = key(3, "rollbacks of a run; one more stops it", ge=1)
    cooldown: int = key(100, "steps after a rollback in which ill ones are only skipped", ge=0)
    replay: Duration | None = key(
        Duration(1000),
        "how often a micro-batch is computed again and weights are compared across ranks, to find "
        "silent corruption; null: never",
        kind="free",
    )
    corruption: Literal["note", "rollback", "halt"] = key(
        "halt", "what is done when bits differ that must be equal", kind="free"
    )

    def problems(self) -> Problems:
        found = _positive(replay=self.replay)
        if self.replay is not None and self.replay.unit == "seconds":
            found.append(("replay", "can't be a wall time", "write it in steps or tokens"))
        if self.warmup > self.window:
            what = f"{self.warmup} steps are never seen in a window of {self.window}"
            found.append(("warmup", what, "lower it or raise guard.window"))
        return found


@dataclass
class PulseConfig:
    patience: Duration = key(
        Duration(300, "seconds"), "shortest time after which a phase counts as hanging"
    )
    factor: float = key(10.0, "or so many times the longest that the phase has taken", ge=2)
    startup: Duration = key(
        Duration(1800, "seconds"), "the same for start-up and the first step, which compiles"
    )
    beat: Duration = key(Duration(1, "seconds"), "how often a rank writes that it lives")
    share: Duration = key(
        Duration(10, "seconds"), "how often a node's beats go to the run directory"
    )
    straggler: float = key(
        1.5, "a rank is told of when it needs so many times the median of all", gt=1
    )

    def problems(self) -> Problems:
        times = {k: getattr(self, k) for k in ("patience", "startup", "beat", "share")}
        return _wall_times("pulse.", **times)


@dataclass
class ValidationConfig:
    every: Duration = key(Duration(500), "how often; the last step is always evaluated")
    windows: int | None = key(
        None, "windows of a periodic evaluation; null, and at the end: all", ge=1
    )

    def problems(self) -> Problems:
        return _positive(every=self.every)


@dataclass
class WandbConfig:
    enabled: bool = key(False, "send the rows to Weights & Biases")
    project: str = key("forescale", "the project there")
    entity: str | None = key(None, "the account or team; null: yours")
    mode: Literal["auto", "online", "offline"] = key(
        "auto", "auto: online where an account is logged in, else offline"
    )


@dataclass
class LoggingConfig:
    every: Duration = key(Duration(10), "how often a line is printed; metrics.jsonl has every step")
    tensorboard: bool = key(False, "write TensorBoard files too")
    peak_flops: float | None = key(
        None, "peak FLOP/s of a device, for the MFU; null: known or measured", gt=0
    )
    wandb: WandbConfig = section(WandbConfig, "Weights & Biases")

    def problems(self) -> Problems:
        return _positive(every=self.every)


@dataclass
class LaunchConfig:
    processes: int | None = key(None, "local ranks; null: one a GPU, or one", ge=1)
    timeout: Duration = key(Duration(1800, "seconds"), "how long a rank waits for the others")
    grace: Duration = key(
        Duration(120, "seconds"), "after a signal: longest time to save and end, then it just ends"
    )

    def problems(self) -> Problems:
        return _wall_times("launch.", timeout=self.timeout, grace=self.grace)


@dataclass
class ProfileConfig:
    steps: str | None = key(None, "FIRST:LAST, such as 100:105: write a trace of these steps")

    @property
    def interval(self) -> tuple[int, int] | None:
        """First step traced and the first not traced any more."""
        match = re.fullmatch(r"(\d+):(\d+)", self.steps or "")
        return (int(match[1]), int(match[2])) if match else None

    def problems(self) -> Problems:
        if self.steps is None or (self.interval and self.interval[0] < self.interval[1]):
            return []
        return [("steps", f"{self.steps!r} is not FIRST:LAST", "write profile.steps=100:105")]
