"""The length of the rows at each step: windows may be cut into shorter rows at first
(`train.first_length`, `train.length_ramp`).

Invariant: a pure function of the config and the step. A step reads the same windows as without a
ramp; a token only sees fewer of the tokens before it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from forescale.config.job import ProblemIterator
from forescale.config.sections.batch import doublings
from forescale.models.config import ModelConfig

if TYPE_CHECKING:
    from forescale.config.sections.training import TrainConfig
    from forescale.config.train import TrainJob


@dataclass(frozen=True)
class LengthRamp:
    """Rows of `first` targets that double up to `last` over `steps` steps; each length lasts as
    long. `last` is `first` times a power of two."""

    first: int
    last: int
    steps: int

    def length(self, step: int) -> int:
        """Return the targets of a row at `step` (from 0)."""
        if step >= self.steps:
            return self.last
        return self.first << self._doublings * step // self.steps

    @property
    def _doublings(self) -> int:
        return doublings(self.first, self.last) or 0

    def shares(
        self, steps: int, samples: Callable[[int], int] = lambda steps: steps
    ) -> list[tuple[int, float]]:
        """Return the lengths of the first `steps` steps, each with its share of their windows; the
        first length if there are no steps. samples: windows by steps, if the batch grows."""
        if not self.steps or not steps:
            return [(self.length(0), 1.0)]
        n = self._doublings
        ends = [-(-self.steps * i // n) for i in range(1, n + 1)]
        bounds = [min(steps, end) for end in (0, *ends, steps)]
        parts = [(self.first << i, a, b) for i, (a, b) in enumerate(pairwise(bounds)) if b > a]
        return [(n, (samples(b) - samples(a)) / samples(steps)) for n, a, b in parts]


def length_ramp(job: "TrainJob") -> LengthRamp:
    """Return the job's ramp, whose `steps` are 0 if it has none."""
    last, first, ramp = job.train.sequence_length, job.train.first_length, job.train.length_ramp
    if first is None or ramp is None:
        return LengthRamp(last, last, 0)
    return LengthRamp(first, last, job.steps_of(ramp) or 0)


def length_ramp_problems(train: "TrainConfig") -> ProblemIterator:
    """Yield the broken rules of the keys of a ramp, relative to the section."""
    first, last, ramp = train.first_length, train.sequence_length, train.length_ramp
    if (first is None) != (ramp is None):
        missing = "first_length" if first is None else "length_ramp"
        like = str(max(1, last // 4)) if first is None else "'20 %'"
        todo = f"set train.{missing}, such as {like}, or leave the other out"
        yield missing, "rows that grow need a first length and a ramp", todo
    elif first is not None and doublings(first, last) is None:
        problem = f"rows of {first} targets can't be doubled to train.sequence_length={last}"
        near = [last // 2**n for n in (3, 2, 1) if last % 2**n == 0]
        todo = f"choose one of {', '.join(map(str, near))}" if near else "leave it out"
        yield "first_length", problem, todo


def length_ramp_conflicts(job: "TrainJob") -> ProblemIterator:
    """Yield the parts of a job that a ramp of its rows is not supported with."""
    train = job.train
    if train.first_length is None:
        return
    if not job.objective.is_next_token:
        problem = f"objective {job.objective.kind} can't cut its rows"
        yield "train.first_length", problem, "leave it out"
    if job.data.packing == "best_fit":
        problem = "best_fit packs whole documents, which shorter rows would cut"
        yield "train.first_length", problem, "leave it out, or write data.packing=windows"
    if job.mesh(1).columns > 1:
        problem = "ranks that divide a window's tokens divide them at one length alone"
        yield "train.first_length", problem, "leave it out, or the division of windows"
    if isinstance(job.model, ModelConfig):
        for key, problem, todo in job.model.problems(sequence_length=train.first_length):
            yield f"model.{key}", f"at train.first_length: {problem}", todo


def length_ramp_notes(job: "TrainJob") -> list[str]:
    """Return the sentence that tells a user of a job's ramp, if it has one."""
    ramp = length_ramp(job) if job.train.first_length and job.train.has_length else None
    if ramp is None or not ramp.steps:
        return []
    return [
        f"Windows of {ramp.last:,} tokens are cut into rows of {ramp.first:,} at first, and are "
        f"whole from step {ramp.steps + 1:,} on; a plan prices whole ones."
    ]
