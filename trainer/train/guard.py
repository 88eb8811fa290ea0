"""The guard: is a step anomalous, and what happens to its update? Decided between gradient and
update, from numbers that all ranks share.

A loss or gradient norm that isn't finite is anomalous. So is one far above the last ones, by a
robust score: the number of standard deviations above the median of a window. The standard deviation
is estimated as 1.4826 times the median absolute deviation, as for normal noise (Rousseeuw & Croux
1993), so a few outliers in the window don't hide the next one. The rules (GuardConfig) name the
action: the update is dropped; or the run loads an earlier checkpoint and skips the samples; or the
run stops.

Invariant: a decision is a function of the losses and norms of the steps before, as far as `state`
holds them. So all ranks decide alike, a resumed run decides as the uninterrupted one would, and
every rollback or halt is an event before it is acted on.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from forescale.config.sections.batch import Cadence
from forescale.config.sections.runtime import GuardConfig
from forescale.data.stream import Batch
from forescale.engine.selfcheck import SelfCheck
from forescale.resilience.phases import PhaseTimer
from forescale.run.directory import Attempt

Action = Literal["apply", "note", "skip", "rollback", "halt"]
_SPREAD = 1.4826  # of a normal distribution: standard deviation over median absolute deviation
_FLOOR = 0.01  # least spread, as a part of the median: a nearly constant value has no 1 % spikes


class Anomaly(Exception):
    """A step that ends this attempt; raised on all ranks alike. `trusted`: the weights before the
    step may be saved. `position`: the last good one, where the weights are; the loop sets it."""

    kind = "anomaly"  # the event that records it

    def __init__(self, step: int, reason: str, trusted: bool = True):
        super().__init__(f"step {step}: {reason}")
        self.step, self.reason, self.trusted = step, reason, trusted
        self.position: Any = None


class Rollback(Anomaly):
    """Load a checkpoint of step `newest` or before, and skip the samples of `interval` from there
    on (None if the data are not at fault)."""

    kind = "rollback"

    def __init__(self, step: int, reason: str, newest: int, interval: tuple[int, int] | None):
        super().__init__(step, reason)
        self.newest, self.interval = newest, interval


class Halt(Anomaly):
    """Stop the run."""

    kind = "halt"


@dataclass(frozen=True)
class Decision:
    """What happens to a step's update, and the reason if the step is anomalous."""

    action: Action
    reason: str = ""

    @property
    def may_apply(self) -> bool:
        """True if the weights are updated."""
        return self.action in ("apply", "note")


HEALTHY = Decision("apply")


class Window:
    """The last healthy values of one number, at most `size`."""

    def __init__(self, size: int, values: Sequence[float] = ()):
        self.values: deque[float] = deque(values, maxlen=size)

    def score(self, value: float) -> float:
        """Return how many standard deviations `value` is above the median (negative: below)."""
        ordered = sorted(self.values)
        middle = _median(ordered)
        spread = _SPREAD * _median(sorted(abs(v - middle) for v in ordered))
        return (value - middle) / max(spread, _FLOOR * abs(middle), 1e-12)


def _median(ordered: Sequence[float]) -> float:
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


class Guard:
    """Decides on each step by `rules`.

    rollbacks: the steps that the run has rolled back from. state: the `state` that a checkpoint
    holds; None at the beginning of a run.
    """

    def __init__(
        self, rules: GuardConfig, rollbacks: Sequence[int] = (), state: dict[str, Any] | None = None
    ):
        self.rules, self.rollbacks = rules, tuple(rollbacks)
        stored = state or {"losses": [], "norms": [], "anomalous_in_a_row": 0}
        self._losses = Window(rules.window, stored["losses"])
        self._norms = Window(rules.window, stored["norms"])
        self._anomalous_in_a_row: int = stored["anomalous_in_a_row"]

    @property
    def state(self) -> dict[str, Any]:
        """What the next decisions depend on; a checkpoint stores it."""
        return {
            "losses": list(self._losses.values),
            "norms": list(self._norms.values),
            "anomalous_in_a_row": self._anomalous_in_a_row,
        }

    def judge(self, step: int, loss: float, norm: float) -> Decision:
        """Return the decision on a step from its mean loss and gradient norm. Call it once a step,
        in order."""
        faults = self._faults(loss, norm)
        decision = max(faults, key=lambda fault: _SEVERITY[fault.action], default=None)
        if decision is None or decision.action == "note":
            # A noted value is remembered too: a level that has changed for good becomes usual.
            self._losses.values.append(loss)
            self._norms.values.append(norm)
            self._anomalous_in_a_row = 0
            return decision or HEALTHY
        self._anomalous_in_a_row += 1
        return self._limited(step, decision)

    def _faults(self, loss: float, norm: float) -> Iterator[Decision]:
        rules = self.rules
        if not math.isfinite(loss):
            yield Decision(rules.non_finite, "the loss is not finite")
        elif not math.isfinite(norm):
            yield Decision(rules.non_finite, "the gradient is not finite")
        elif len(self._losses.values) >= rules.warmup:
            spikes = (
                (rules.loss_spike, "loss", loss, self._losses.score(loss)),
                (rules.gradient_spike, "gradient norm", norm, self._norms.score(norm)),
            )
            for policy, name, value, score in spikes:
                if score > rules.threshold:
                    how = f"{score:.1f} standard deviations above the median"
                    yield Decision(policy, f"the {name} is {value:.4g}, {how}")

    def _limited(self, step: int, decision: Decision) -> Decision:
        """Apply the limits on anomalous steps in a row and on rollbacks."""
        rules = self.rules
        if self._anomalous_in_a_row > rules.patience:
            problem = f"{decision.reason}, and the {rules.patience} steps before were anomalous too"
            return Decision("halt", problem)
        if decision.action == "rollback" and self.rollbacks:
            if step - self.rollbacks[-1] <= rules.cooldown:
                return Decision(
                    "skip", f"{decision.reason}; the last rollback was only just before"
                )
            if len(self.rollbacks) >= rules.most_rollbacks:
                problem = (
                    f"{decision.reason}, and the run has rolled back {len(self.rollbacks)} times"
                )
                return Decision("halt", problem)
        return decision


_SEVERITY: dict[str, int] = {"note": 0, "skip": 1, "rollback": 2, "halt": 3}


class StepGuard:
    """Acts on the decisions of one attempt, and runs the self-check when it is due. The loop and
    the engine call begin, before_update, may_apply and end, in this order, at every step.

    replay: the steps of a self-check, None for none. began: the step that the attempt begins
    at, whose weights are trusted. has_checkpoint: True if there is a checkpoint to roll back to;
    the same on all ranks.
    """

    def __init__(
        self,
        guard: Guard,
        check: SelfCheck,
        replay: Cadence | None,
        attempt: Attempt,
        phases: PhaseTimer,
        began: int,
        has_checkpoint: Callable[[], bool],
        is_main: bool,
    ):
        self.guard, self.attempt, self.is_main = guard, attempt, is_main
        self.rules, self.phases, self.decision = guard.rules, phases, HEALTHY
        self._check, self._replay, self._has_checkpoint = check, replay, has_checkpoint
        # The first windows of the last steps: where a rollback begins to skip.
        self._firsts: deque[int] = deque(maxlen=self.rules.skip_before + 1)
        self._step, self._end, self._trusted = began, 0, began
        self._corrupt: str | None = None

    def begin(self, batch: Batch) -> None:
        self._step, self._end, self.decision = batch.step + 1, batch.g1, HEALTHY
        self._firsts.append(batch.g0)

    def before_update(self, batch: Batch, losses: Tensor) -> None:
        """Run the self-check if it is due, with the weights that the gradient was computed with."""
        if self._replay is None or self._step not in self._replay:
            return
        self.phases.mark("selfcheck")
        measured = self._check.tolerance is not None
        fault = self._check(batch, losses)
        if not measured and self._check.tolerance:
            self._event("selfcheck_inexact", tolerance=self._check.tolerance)
        if fault is None:
            self._trusted = self._step - 1
            return
        policy = self.rules.corruption
        self._event("silent_corruption", what=fault, policy=policy, trusted=self._trusted)
        self._corrupt = fault if policy != "note" else None

    def may_apply(self, loss: float, norm: float) -> bool:
        """Decide, from the step's mean loss and gradient norm; True if the weights are updated."""
        if self._corrupt:
            self.decision = Decision(self.rules.corruption, f"silent corruption: {self._corrupt}")
        else:
            self.decision = self.guard.judge(self._step, loss, norm)
        if self.decision.action == "rollback" and not self._has_checkpoint():
            instead: Action = "halt" if self._corrupt else "skip"
            self.decision = Decision(instead, f"{self.decision.reason}; there is no checkpoint yet")
        if self.decision.action in ("rollback", "halt"):
            facts = {"reason": self.decision.reason, "loss": loss, "grad_norm": norm}
            self._event(self.decision.action, **facts)
        return self.decision.may_apply

    def end(self) -> None:
        """Raise Rollback or Halt, on all ranks alike, if the decision says so."""
        reason = self.decision.reason
        if self.decision.action == "halt":
            raise Halt(self._step, reason, trusted=not self._corrupt)
        if self.decision.action == "rollback":
            if self._corrupt:
                raise Rollback(self._step, reason, self._trusted, None)
            newest = self._step - self.rules.back
            raise Rollback(self._step, reason, newest, (self._firsts[0], self._end))

    def _event(self, kind: str, **facts: Any) -> None:
        if self.is_main:
            self.attempt.event(kind, step=self._step, **facts)
