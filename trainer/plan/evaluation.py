"""The cost of the evaluations of a run: windows, FLOPs and seconds, each and in total.

Invariant: pure functions of the job, the manifests and the predicted step; an unknown number (of
the data, of the speed) is None and not guessed. Windows are counted and dealt to ranks as in
data/stream.py, `validation_windows`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from forescale.config.train import TrainJob
from forescale.ground.console import span
from forescale.plan.step_time import StepTime, TokenFlops
from forescale.run.abilities import Questions, passes_of


@dataclass(frozen=True)
class Evaluation:
    """One evaluation. flops: forward alone, as MFU counts; seconds: None without a known speed."""

    windows: int
    flops: float
    seconds: float | None


@dataclass(frozen=True)
class AbilityCost:
    """The questions of validation.abilities in one evaluation. tokens: computed by all ranks,
    padding included; flops: of their forward, counted per token of a whole window, which is too
    much for the attention of shorter rows; seconds: None without a known speed."""

    questions: int
    tokens: int
    flops: float
    seconds: float | None


@dataclass(frozen=True)
class EvaluationCost:
    """The evaluations of a run: `times` periodic ones before the last step, then one `at_end` of
    all held-out windows.

    times: None if they come by the clock and no speed is known; at_end: None without the data, and
    not in the sums; reference: the pass over all preferences before the first step, None for other
    objectives; asks: each evaluation has questions too; abilities: their cost, None if not known.
    """

    periodic: Evaluation
    times: int | None
    at_end: Evaluation | None
    reference: Evaluation | None = None
    asks: bool = False
    abilities: AbilityCost | None = None

    @property
    def flops(self) -> float | None:
        """FLOPs of all evaluations."""
        if self.times is None:
            return None
        once = (self.at_end, self.reference)
        asking = (self.times + 1) * self.abilities.flops if self.abilities else 0.0
        return self.times * self.periodic.flops + sum(one.flops for one in once if one) + asking

    @property
    def seconds(self) -> float | None:
        """Seconds of all evaluations."""
        if self.times is None or self.periodic.seconds is None:
            return None
        once = (self.at_end, self.reference)
        total = self.times * (self.periodic_seconds or 0.0) + self._asking
        return total + sum(one.seconds or 0.0 for one in once if one)

    @property
    def periodic_seconds(self) -> float | None:
        """Seconds of one periodic evaluation with its questions."""
        seconds = self.periodic.seconds
        return None if seconds is None else seconds + self._asking

    @property
    def _asking(self) -> float:
        return (self.abilities.seconds if self.abilities else None) or 0.0

    @property
    def ability_lines(self) -> list[str]:
        """The sentences about the questions; empty if there are none."""
        if self.abilities is None:
            return ["abilities: not known without the data"] if self.asks else []
        a = self.abilities
        took = "" if a.seconds is None else f", {span(a.seconds)}"
        counts = f"{a.questions:,} questions, {a.tokens:,} tokens with padding"
        return [f"abilities, each time: {counts}{took}"]


def estimate_evaluation(
    job: TrainJob,
    complete: list[int] | None,
    per_token: TokenFlops,
    step: StepTime,
    world: int,
    compared: list[int] | None = None,
    questions: Sequence[Questions] | None = None,
) -> EvaluationCost | None:
    """Return the cost of a job's evaluations on `world` ranks.

    complete: the windows of the held-out split of each source; None: not known, and a source has as
    many as validation.windows; without that the cost isn't known. compared: the windows that a
    reference reads, of each split and source. questions: of validation.abilities; None: not known.
    The forward runs at the speed of a step.
    """
    length, limit = job.train.sequence_length, job.validation.windows
    if complete is not None:
        capped = [n if limit is None else min(limit, n) for n in complete]
    elif limit is not None:
        capped = [limit] * max(1, len(job.data.sources))
    else:
        return None
    of_step = (per_token.full + per_token.recomputed) * job.tokens_per_step

    def evaluation(windows: list[int]) -> Evaluation:
        flops = per_token.forward * length * job.objective.rows
        # All ranks make the same number of micro-batches, the last of them partly padding.
        at_once = job.train.micro_batch * job.mesh(world).data
        rows = at_once * sum(-(-n // at_once) for n in windows)
        seconds = None if step.seconds is None else step.seconds * rows * flops / of_step
        return Evaluation(sum(windows), sum(windows) * flops, seconds)

    at_end = None if complete is None else evaluation(complete)
    reference = evaluation(compared) if compared else None
    asks, abilities = bool(job.validation.abilities), None
    if asks and questions:
        mesh = job.mesh(world)
        tokens = passes_of(questions, multiple=mesh.sequence).tokens(mesh.data)
        flops = per_token.forward * tokens
        seconds = None if step.seconds is None else step.seconds * flops / of_step
        abilities = AbilityCost(sum(len(each.rows) for each in questions), tokens, flops, seconds)
    every, times = job.validation.every, None
    if (cadence := job.cadence(every)) is not None:
        times = cadence.times(job.total_steps - 1)  # before the last step
    elif step.seconds is not None and every.seconds:
        steps = job.total_windows / job.train.global_batch  # of the full batch
        times = int((steps - 1) * step.seconds / every.seconds)
    return EvaluationCost(evaluation(capped), times, at_end, reference, asks, abilities)
