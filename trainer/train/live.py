"""A run that is compared with the band of its forecast while it trains (run/band.py).

    each step         the training loss goes to the Watch
    each checkpoint   the end is forecast anew: the event forecast_anew, numbers for the trackers
    an alarm          the events forecast_left and forecast_back, a line, the webhook; with
                      guard.forecast=halt the run stops

Invariant: decided from the step and its summary alone, so every rank decides alike; rank 0 writes.
Nothing that is computed depends on it.
"""

from threading import Thread
from typing import Any

from forescale.engine.world import StepSummary
from forescale.resilience.outcome import post
from forescale.run.band import Alarm, Watch, alarm_text
from forescale.run.directory import Run
from forescale.run.forecast import PredictionInterval
from forescale.train.callbacks import Callback, Every, Step
from forescale.train.guard import Halt
from forescale.train.metrics import Metrics


class Live(Callback):
    """due: steps at which the end is forecast anew; halts: an alarm stops the run."""

    def __init__(
        self, run: Run, watch: Watch, prediction: PredictionInterval, due: Every,
        metrics: Metrics, halts: bool,
    ):  # fmt: skip
        self.run, self.watch, self.metrics, self.halts = run, watch, metrics, halts
        self._due = due
        self._source = {"forecast": str(prediction.forecast), "hash": prediction.hash}

    def see(self, step: Step, summary: StepSummary) -> None:
        """Look at a step; one that the guard took for anomalous doesn't count."""
        at, alarm = step.position.step, None
        if step.facts.applied and not step.decision.reason:
            alarm = self.watch.see(at, sum(summary.losses) / step.targets)
        if alarm:
            self._report(at, alarm)
        if self._due.update(at, summary) and at < self.watch.total_steps:
            self._forecast(at)
        if alarm and alarm.left and self.halts:
            reason = "the loss has left the band of its forecast, and guard.forecast=halt"
            self._event("halt", at, reason=reason)
            raise Halt(at, reason)

    def _report(self, at: int, alarm: Alarm) -> None:
        kind = "forecast_left" if alarm.left else "forecast_back"
        facts = {**vars(alarm), **self._source}
        self._event(kind, at, **facts)
        text = alarm_text({"kind": kind, "step": at, **facts})
        if self.metrics.is_main:
            self.metrics.line.print(f"Step {at:,}: {text}")
            event = kind.replace("_", " ")
            # In the background: a server that doesn't answer must not hold up the run.
            Thread(target=post, args=(self.run, event, text, print), daemon=True).start()

    def _forecast(self, at: int) -> None:
        if (anew := self.watch.anew()) is None:
            return
        facts = vars(anew)
        total, level = self.watch.total_steps, self.watch.band.level
        self._event("forecast_anew", at, **facts, level=level, share=at / total, **self._source)
        self.metrics.track({f"forecast/{name}": value for name, value in facts.items()}, at)

    def _event(self, kind: str, at: int, **facts: Any) -> None:
        if self.metrics.is_main:
            self.metrics.attempt.event(kind, step=at, **facts)
