"""The windows of each optimizer step, which may grow during a run; and what happens every N steps.

    train.*          -> BatchRamp     stages of doubling batches, then the full batch
    a step           -> its windows, and the samples (windows) of the steps before it
    samples          -> the steps that read them
    a length         -> Cadence       the steps at which it has passed once more

Invariant: a pure function of config and step, in closed form: a run that resumes or moves to other
ranks needs no state for it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING

from forescale.config.job import ProblemIterator, Problems

if TYPE_CHECKING:
    from forescale.config.mesh import Mesh
    from forescale.config.sections.training import TrainConfig


@dataclass(frozen=True)
class BatchRamp:
    """The batch of each step, in windows. full: after the ramp; lengths: the number of steps of
    each stage of the ramp. The batch doubles from stage to stage. No stages: no ramp."""

    full: int
    lengths: tuple[int, ...] = ()

    @classmethod
    def of(cls, train: "TrainConfig", tokens_per_window: int) -> "BatchRamp":
        """Return the ramp of a config; none if its keys are refused (`batch_ramp_problems`).

        Each stage has the same number of steps, the later ones one more if they don't divide
        evenly; or the same number of tokens, rounded up to whole steps.
        """
        full, count, length = train.global_batch, _stages(train), train.batch_ramp
        if not count or length is None:
            return cls(full)
        amount = Fraction(repr(float(length.amount)))
        if length.unit == "steps":
            ends = [int(amount) * i // count for i in range(count + 1)]
            return cls(full, tuple(b - a for a, b in pairwise(ends)))
        if length.unit == "percent":
            amount *= Fraction(train.tokens or 0, 100)
        each = amount / count / tokens_per_window
        return cls(full, tuple(math.ceil(each / (full >> count - i)) for i in range(count)))

    @property
    def first(self) -> int:
        """The windows of the first step."""
        return self.full >> len(self.lengths)

    @property
    def steps(self) -> int:
        """The steps before the first one of the full batch."""
        return sum(self.lengths)

    def stages(self) -> Iterator[tuple[int, int]]:
        """Yield (windows, steps) of each stage before the full batch."""
        return ((self.first << i, steps) for i, steps in enumerate(self.lengths))

    def __str__(self) -> str:
        """Return the batch in words."""
        if not self.lengths:
            return f"{self.full:,} windows"
        return f"{self.first:,} windows at first, and {self.full:,} after step {self.steps:,}"

    def windows(self, step: int) -> int:
        """Return the windows of a step, counted from 0."""
        for windows, steps in self.stages():
            if step < steps:
                return windows
            step -= steps
        return self.full

    def samples(self, step: int) -> int:
        """Return the windows of all steps before `step`."""
        samples = 0
        for windows, steps in self.stages():
            samples += windows * min(step, steps)
            step -= min(step, steps)
        return samples + step * self.full

    def steps_for(self, samples: int) -> int:
        """Return the fewest steps, from the first on, that have at least so many windows."""
        before = 0
        for windows, steps in self.stages():
            if samples <= windows * steps:
                return before - -samples // windows
            samples, before = samples - windows * steps, before + steps
        return before - -samples // self.full

    def last_steps_for(self, samples: int, total: int) -> int:
        """Return the fewest of the last of `total` steps that have at least so many windows; more
        than `total` if all of them have fewer."""
        before = self.samples(total) - samples
        if before < 0:
            return total - before // self.full
        return total + 1 - self.steps_for(before + 1)


@dataclass(frozen=True)
class Cadence:
    """The steps at which something happens that recurs after a given length.

    steps: the length, in steps of the full batch. ramp: if given, tokens are counted with it, else
    steps.
    """

    steps: int
    ramp: BatchRamp | None = None

    def times(self, step: int) -> int:
        """Return how often it happens in the first `step` steps."""
        if self.ramp is None:
            return step // self.steps
        return self.ramp.samples(step) // (self.steps * self.ramp.full)

    def __str__(self) -> str:
        """Return the length from one time to the next, in words."""
        if self.ramp is None:
            return f"{self.steps:,} steps"
        return f"{self.steps * self.ramp.full:,} windows"

    def __contains__(self, step: int) -> bool:
        """Return True if it happens after this many steps."""
        return self.times(step) > self.times(step - 1)


def doublings(first: int, last: int) -> int | None:
    """Return how often `first` is doubled to become `last`; None if doubling never gives it."""
    factor, rest = divmod(last, first)
    return None if rest or factor.bit_count() != 1 else factor.bit_length() - 1


def _stages(train: "TrainConfig") -> int | None:
    """Return the number of stages before the full batch; None if no doubling leads to it."""
    first = train.first_batch
    return 0 if first is None else doublings(first, train.global_batch)


def batch_ramp_problems(train: "TrainConfig") -> ProblemIterator:
    """Yield the broken rules of the keys of a ramp, relative to the section."""
    first, length, full = train.first_batch, train.batch_ramp, train.global_batch
    if first is None:
        if length is not None:
            problem = "is the length of a ramp, whose first batch is not given"
            yield "batch_ramp", problem, "give train.first_batch, or leave it out"
        return
    if (stages := _stages(train)) is None and full:
        problem = f"{first} windows are not doubled to the {full} of train.global_batch"
        todo = f"divide those by a power of two, as by train.first_batch={full // 2 or 1}"
        yield "first_batch", problem, todo
    elif first % train.micro_batch:
        problem = f"{first} windows are not a multiple of the micro-batch, {train.micro_batch}"
        yield "first_batch", problem, "change train.first_batch or train.micro_batch"
    examples = "'1000 steps' or '1e9 tokens'"
    if length is None:
        problem = "is not given, and says when the batch is the one of train.global_batch"
        yield "batch_ramp", problem, f"write {examples}, or '10 %' of train.tokens"
    elif length.unit == "percent" and train.tokens is None:
        problem = "percent are of train.tokens, which this run doesn't have"
        yield "batch_ramp", problem, f"write {examples}"
    elif length.amount == 0 or (length.unit == "steps" and length.amount < (stages or 0)):
        problem = f"{length} are too few for {stages or 1} stages of a doubling batch"
        yield "batch_ramp", problem, "write more, or a larger train.first_batch"


def ranks_problems(train: "TrainConfig", mesh: "Mesh") -> Problems:
    """Return a problem if the batch is no multiple of what the ranks read at once; with
    train.invariant, if it has fewer micro-batches than ranks."""
    name, windows, at_once = "global_batch", train.global_batch, train.micro_batch * mesh.data
    if train.first_batch and _stages(train) and (train.invariant or not windows % at_once):
        name, windows = "first_batch", train.first_batch
    # With train.invariant some ranks may have a micro-batch less than others.
    is_shared = windows >= at_once if train.invariant else windows % at_once == 0
    if is_shared or windows % train.micro_batch:
        return []
    each = f"groups of {mesh.near} ranks" if mesh.near > 1 else "ranks"
    problem = f"{windows} windows don't divide by {mesh.data} {each} that feed"
    multiple = f"at least {at_once}" if train.invariant else f"a multiple of {at_once}"
    todo = f"make it {multiple}, or change train.micro_batch or the ranks"
    return [(f"train.{name}", f"{problem} {train.micro_batch} at once", todo)]
