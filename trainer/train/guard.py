"""Is this step ill? Judged between gradient and update, from numbers that all ranks share.

A loss or gradient norm that is no number is ill; so is one far above the last ones, by a robust
score: how many standard deviations it lies above the median of a window, where the median absolute
deviation stands for them (times 1.4826, as for normal noise; Rousseeuw & Croux 1993), so that a few
outliers in the window hide nothing. What the rules (GuardConfig) say of it is done by the loop: the
update is dropped, or the run goes back to a checkpoint and passes over the samples, or it stops.

Invariant: a verdict is a function of the losses and norms of the steps before, of which `state`
holds what counts; so all ranks, and a resumed run, judge alike.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from forescale.config.train import GuardConfig

Action = Literal["apply", "note", "skip", "rollback", "halt"]
_SPREAD = 1.4826  # of a normal distribution: standard deviation over median absolute deviation
_FLOOR = 0.01  # least spread, as a part of the median: what hardly moves has no spikes of a percent


@dataclass(frozen=True)
class Verdict:
    """What becomes of a step, and why if it is ill."""

    action: Action
    reason: str = ""

    @property
    def may_apply(self) -> bool:
        return self.action in ("apply", "note")


HEALTHY = Verdict("apply")


class Window:
    """The last healthy values of one number."""

    def __init__(self, size: int, values: Sequence[float] = ()):
        self.values: deque[float] = deque(values, maxlen=size)

    def score(self, value: float) -> float:
        """Standard deviations above the median; below it, less than 0."""
        ordered = sorted(self.values)
        middle = _median(ordered)
        spread = _SPREAD * _median(sorted(abs(v - middle) for v in ordered))
        return (value - middle) / max(spread, _FLOOR * abs(middle), 1e-12)


def _median(ordered: Sequence[float]) -> float:
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


class Guard:
    """Judges steps by `rules`; `rollbacks`: the steps that the run has rolled back from before.

    state: as `state` of a checkpoint gave it, or None at the beginning of a run.
    """

    def __init__(
        self, rules: GuardConfig, rollbacks: Sequence[int] = (), state: dict[str, Any] | None = None
    ):
        self.rules, self.rollbacks = rules, tuple(rollbacks)
        stored = state or {"losses": [], "norms": [], "ill_in_a_row": 0}
        self._losses = Window(rules.window, stored["losses"])
        self._norms = Window(rules.window, stored["norms"])
        self._ill_in_a_row: int = stored["ill_in_a_row"]

    @property
    def state(self) -> dict[str, Any]:
        """For a checkpoint: what the next verdicts depend on."""
        return {
            "losses": list(self._losses.values),
            "norms": list(self._norms.values),
            "ill_in_a_row": self._ill_in_a_row,
        }

    def judge(self, step: int, loss: float, norm: float) -> Verdict:
        """Of the step being made, once: its mean loss and the norm of its gradient."""
        found = max(self._faults(loss, norm), key=lambda fault: _RANK[fault.action], default=None)
        if found is None or found.action == "note":
            # A note is remembered as any other: a level that has changed for good becomes usual.
            self._losses.values.append(loss)
            self._norms.values.append(norm)
            self._ill_in_a_row = 0
            return found or HEALTHY
        self._ill_in_a_row += 1
        return self._bounded(step, found)

    def _faults(self, loss: float, norm: float) -> Iterator[Verdict]:
        rules = self.rules
        if not math.isfinite(loss):
            yield Verdict(rules.non_finite, "the loss is not finite")
        elif not math.isfinite(norm):
            yield Verdict(rules.non_finite, "the gradient is not finite")
        elif len(self._losses.values) >= rules.warmup:
            spikes = (
                (rules.loss_spike, "loss", loss, self._losses.score(loss)),
                (rules.gradient_spike, "gradient norm", norm, self._norms.score(norm)),
            )
            for policy, name, value, score in spikes:
                if score > rules.threshold:
                    yield Verdict(policy, f"the {name} is {value:.4g}, {score:.1f} deviations up")

    def _bounded(self, step: int, found: Verdict) -> Verdict:
        rules = self.rules
        if self._ill_in_a_row > rules.patience:
            what = f"{found.reason}, and so were the {rules.patience} steps before"
            return Verdict("halt", what)
        if found.action == "rollback" and self.rollbacks:
            if step - self.rollbacks[-1] <= rules.cooldown:
                return Verdict("skip", f"{found.reason}; soon after a rollback")
            if len(self.rollbacks) >= rules.most_rollbacks:
                what = f"{found.reason}, and the run has gone back {len(self.rollbacks)} times"
                return Verdict("halt", what)
        return found


_RANK: dict[str, int] = {"note": 0, "skip": 1, "rollback": 2, "halt": 3}


class Ill(Exception):
    """A step was not made, and training doesn't go on as if nothing had been: raised on all ranks
    alike. `position`: before that step, where the weights still are; `trusted`: they may be saved.
    """

    def __init__(self, step: int, reason: str, trusted: bool = True):
        super().__init__(f"step {step}: {reason}")
        self.step, self.reason, self.trusted = step, reason, trusted
        self.position: Any = None


class Rollback(Ill):
    """Go back to a checkpoint of step `newest` or before, and pass over the samples of `interval`
    (None where it isn't the data's fault)."""

    def __init__(self, step: int, reason: str, newest: int, interval: tuple[int, int] | None):
        super().__init__(step, reason)
        self.newest, self.interval = newest, interval


class Halt(Ill):
    """Stop."""
