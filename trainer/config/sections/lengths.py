"""The length of a job in steps, windows and tokens, and its durations in steps.

Invariant: only this file turns a length into steps, so that all parts of the project agree on them,
also if the batch grows (batch.py).
"""

import math
from dataclasses import replace
from fractions import Fraction
from typing import Self

from forescale.config.duration import Duration
from forescale.config.job import ProblemIterator
from forescale.config.sections.batch import BatchRamp, Cadence
from forescale.config.sections.objective import ObjectiveConfig
from forescale.config.sections.schedule import ScheduleConfig
from forescale.config.sections.training import TrainConfig

_MOST_TOKENS = 10**18  # of a run: every position in it fits 64 bits


class Lengths:
    """The lengths of a job with these sections. Batches are counted in windows."""

    train: TrainConfig
    objective: ObjectiveConfig
    schedule: ScheduleConfig

    @property
    def tokens_per_window(self) -> int:
        """The targets of a full window, in all its rows."""
        return self.train.sequence_length * self.objective.rows

    @property
    def tokens_per_step(self) -> int:
        """The tokens of a step of the full batch."""
        return self.train.global_batch * self.tokens_per_window

    @property
    def rows_at_once(self) -> int:
        """The rows of a rank's micro-batch."""
        return self.train.micro_batch * self.objective.rows

    @property
    def batch_ramp(self) -> BatchRamp:
        """The windows of each step."""
        return BatchRamp.of(self.train, self.tokens_per_window)

    def with_ramp_of(self, other: "Lengths") -> Self | None:
        """Return the job with the batch ramp of another job, with percent converted to tokens, so
        that a longer run has the same ramp. None if the ramps differ all the same."""
        first, length = other.train.first_batch, other.train.batch_ramp
        if length is not None and length.unit == "percent":
            tokens = Fraction(repr(float(length.amount))) * (other.train.tokens or 0) / 100
            length = Duration(math.ceil(tokens), "tokens")
        train = replace(self.train, first_batch=first, batch_ramp=length)
        job: Self = replace(self, train=train)  # type: ignore[type-var]
        return job if job.batch_ramp == other.batch_ramp else None

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run; needs train.steps or train.tokens."""
        if self.train.steps is not None:
            return self.train.steps
        assert self.train.tokens is not None
        return self.batch_ramp.steps_for(math.ceil(self.train.tokens / self.tokens_per_window))

    @property
    def total_windows(self) -> int:
        """The windows of the whole run."""
        return self.batch_ramp.samples(self.total_steps)

    def windows_after(self, step: int) -> int:
        """Return the number of windows after a step; negative after the last step."""
        ramp = self.batch_ramp
        return ramp.samples(self.total_steps) - ramp.samples(step)

    @property
    def total_tokens(self) -> int:
        """The tokens of the whole run: train.tokens, rounded up to whole steps."""
        return self.total_windows * self.tokens_per_window

    def steps_of(self, length: Duration) -> int | None:
        """Return a length, from the first step on, in optimizer steps, rounded up; None for a wall
        time (`length.seconds`)."""
        if length.unit == "tokens":
            return self.batch_ramp.steps_for(self._windows_of(length))
        return length.steps(self.tokens_per_step, self.total_steps)

    def cadence(self, length: Duration) -> Cadence | None:
        """Return the steps at which what recurs after a length happens; None for a wall time."""
        steps = length.steps(self.tokens_per_step, self.total_steps)
        if not steps:
            return None
        grows = length.unit == "tokens" and self.batch_ramp.lengths
        return Cadence(steps, self.batch_ramp if grows else None)

    def _windows_of(self, length: Duration) -> int:
        return -(-int(length.amount) // self.tokens_per_window)

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up."""
        return self.steps_of(self.schedule.warmup) or 0

    @property
    def decay_steps(self) -> int:
        """Steps of the decay, the last ones of the run; 0 without one."""
        decay, total = self.schedule.decay_length, self.total_steps
        if decay is not None and decay.unit == "tokens":
            return self.batch_ramp.last_steps_for(self._windows_of(decay), total)
        return self.steps_of(decay) or 0 if decay else 0

    @property
    def has_decay(self) -> bool:
        """True if the learning rate stays at its peak and decays at the end."""
        return self.decay_steps > 0

    @property
    def decay_begins(self) -> int:
        """The last step before the decay of the learning rate, up to which a longer run has equal
        rates; without a decay the last step of the run."""
        return self.total_steps - self.decay_steps

    def fitted(self) -> Self:
        """Return the job, with a shorter warm-up if it doesn't fit beside the decay."""
        if (steps := self.warmup_that_fits()) is None:
            return self
        schedule = replace(self.schedule, warmup=Duration(steps))
        return replace(self, schedule=schedule)  # type: ignore[type-var]

    def warmup_that_fits(self) -> int | None:
        """Return the steps of a warm-up that fits: a tenth of the run, or what the decay leaves.
        None if the job's warm-up fits."""
        total = self.total_steps
        left = total - self.decay_steps
        if self.schedule.warmup.unit == "percent" or left < 0 or self.warmup_steps <= left:
            return None
        return min(max(1, total // 10), left)

    def length_problems(self) -> ProblemIterator:
        """Yield the broken rules of ramps, warm-up and decay in a run of known length."""
        total, tokens = self.total_steps, self.total_tokens
        if tokens > _MOST_TOKENS:
            name = "train.steps" if self.train.steps is not None else "train.tokens"
            yield name, f"the run reads {tokens:.3g} tokens", f"train on at most {_MOST_TOKENS:.0e}"
            return
        if self.batch_ramp.steps >= total and self.batch_ramp.lengths:
            problem = f"the batch grows for {self.batch_ramp.steps:,} steps of a run of {total:,}"
            yield "train.batch_ramp", problem, "shorten it, or train longer"
        if self.decay_steps > total:
            problem = f"the decay takes {self.decay_steps:,} steps of a run of {total:,}"
            yield "schedule.decay", problem, "shorten schedule.decay, or train longer"
        elif self.warmup_steps + self.decay_steps > total and self.warmup_that_fits() is None:
            steps = f"{self.warmup_steps + self.decay_steps:,} steps of a run of {total:,}"
            todo = "shorten schedule.warmup or schedule.decay"
            yield "schedule.warmup", f"warm-up and decay take {steps}", todo
