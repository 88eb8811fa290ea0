"""What stands between a step's gradient and its update: the guard's verdict and the self-check.

Invariant: it decides from numbers that all ranks share, so all ranks drop a step, go back or stop
together; and what it decides is an event before it is done.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

from torch import Tensor

from forescale.config.train import GuardConfig
from forescale.data.stream import Batch
from forescale.engine.selfcheck import SelfCheck, judged
from forescale.resilience.phases import Pulse
from forescale.run.directory import Attempt
from forescale.train.guard import HEALTHY, Action, Guard, Halt, Rollback, Verdict


class Watch:
    """Of one attempt. replay: steps between two self-checks, None for none; began: the step that
    the attempt begins at, whose weights are trusted; can_go_back: whether there is a checkpoint,
    asked on all ranks alike."""

    def __init__(
        self,
        rules: GuardConfig,
        guard: Guard,
        check: SelfCheck,
        replay: int | None,
        attempt: Attempt,
        pulse: Pulse,
        began: int,
        can_go_back: Callable[[], bool],
        is_main: bool,
    ):
        self.rules, self.guard, self.attempt, self.is_main = rules, guard, attempt, is_main
        self.pulse, self.verdict = pulse, HEALTHY
        self._check, self._replay, self._can_go_back = check, replay, can_go_back
        self._firsts: deque[int] = deque(maxlen=rules.skip_before + 1)  # where steps began
        self._step, self._end, self._trusted = began, 0, began
        self._corrupt: str | None = None

    def begin(self, batch: Batch) -> None:
        self._step, self._end, self.verdict = batch.step + 1, batch.g1, HEALTHY
        self._firsts.append(batch.g0)

    def before_update(self, batch: Batch, losses: Tensor) -> None:
        """The self-check, where it is due."""
        if self._replay is None or self._step % self._replay:
            return
        self.pulse.mark("selfcheck")
        measured = self._check.tolerance is not None
        found = judged(self._check(batch, losses))
        if not measured and self._check.tolerance:
            self._tell("selfcheck_inexact", tolerance=self._check.tolerance)
        if found is None:
            self._trusted = self._step - 1
            return
        policy = self.rules.corruption
        self._tell("silent_corruption", what=found, policy=policy, trusted=self._trusted)
        self._corrupt = found if policy != "note" else None

    def may_apply(self, loss: float, norm: float) -> bool:
        if self._corrupt:
            self.verdict = Verdict(self.rules.corruption, f"silent corruption: {self._corrupt}")
        else:
            self.verdict = self.guard.judge(self._step, loss, norm)
        if self.verdict.action == "rollback" and not self._can_go_back():
            todo: Action = "halt" if self._corrupt else "skip"
            self.verdict = Verdict(todo, f"{self.verdict.reason}; there is no checkpoint yet")
        if self.verdict.action in ("rollback", "halt"):
            facts = {"reason": self.verdict.reason, "loss": loss, "grad_norm": norm}
            self._tell(self.verdict.action, **facts)
        return self.verdict.may_apply

    def end(self) -> None:
        reason = self.verdict.reason
        if self.verdict.action == "halt":
            raise Halt(self._step, reason, trusted=not self._corrupt)
        if self.verdict.action == "rollback":
            if self._corrupt:
                raise Rollback(self._step, reason, self._trusted, None)
            newest = self._step - self.rules.back
            raise Rollback(self._step, reason, newest, (self._firsts[0], self._end))

    def _tell(self, kind: str, **facts: Any) -> None:
        if self.is_main:
            self.attempt.event(kind, step=self._step, **facts)
