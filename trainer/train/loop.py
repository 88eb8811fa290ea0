"""The training loop, on one screen.

Invariant: all cross-rank decisions travel in one all-reduced StepSummary per step. It is read one
step late, so that nothing waits for it; and at once when a callback is due (a save, an evaluation,
the end), so that such a callback always sees the step that the weights are at.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

from forescale.checkpoint.reader import Position
from forescale.data.stream import Batch
from forescale.engine.step import Engine
from forescale.resilience.phases import PhaseTimer
from forescale.train.callbacks import Callback, Step
from forescale.train.guard import Anomaly, StepGuard

_COLLECT = 100  # steps from one collection of garbage to the next


def train(
    engine: Engine,
    batches: Iterable[Batch],
    multipliers: Callable[[int], tuple[float, float]],
    callbacks: Sequence[Callback],
    position: Position,
    phases: PhaseTimer,
    stop_requested: Callable[[], bool],
    guard: StepGuard,
) -> tuple[Position, bool]:
    """Train over `batches` from `position`. Return the position at the end, and True if some rank
    was asked to stop. multipliers: of peak learning rates and of weight decay, by step.

    Raises Rollback or Halt if the guard or a callback does. Earlier steps are logged first;
    `exc.position` is the last good one.
    """
    reporter = _Reporter(engine, callbacks, phases)
    phases.enter("compute")  # everything outside the other phases
    try:
        with _garbage_held() as collect:
            for batch in phases.each("data", batches):
                rate, decay = multipliers(batch.step)
                phases.step = batch.step + 1
                guard.begin(batch)
                with phases("compute"):
                    facts = engine.train_step(
                        batch, rate, guard.may_apply, guard.before_update, decay
                    )
                guard.end()
                position = replace(
                    position,
                    step=batch.step + 1,
                    g=batch.g1,
                    tokens=position.tokens + batch.targets,
                    quarantined=tuple(sorted(batch.quarantine)),
                )
                step = Step(
                    position, batch.g0, batch.shares, rate, facts, phases.take(), guard.decision
                )
                if reporter.report(step, batch, stop_requested()):
                    reporter.flush()
                    return position, True
                collect(position.step)
        reporter.flush()
        return position, False
    except Anomaly as anomaly:
        reporter.drain()
        anomaly.position = position
        raise


@contextmanager
def _garbage_held() -> Iterator[Callable[[int], None]]:
    """Keep Python's garbage collector out of the steps, where it would stop one rank and so all
    that wait for it. Yields a function of the step, which collects at the same steps on all
    ranks."""
    gc.freeze()  # what was built at the start is not looked at again
    gc.disable()

    def collect(step: int) -> None:
        if step % _COLLECT == 0:
            gc.collect()

    try:
        yield collect
    finally:
        gc.enable()
        gc.unfreeze()


class _Reporter:
    """Shares each step with all ranks, and shows it to the callbacks once its summary is read."""

    def __init__(self, engine: Engine, callbacks: Sequence[Callback], phases: PhaseTimer):
        self.world, self.callbacks, self.phases = engine.world, list(callbacks), phases
        self._pending: dict[int, Step] = {}  # steps whose summary is not read yet

    def report(self, step: Step, batch: Batch, stop: bool) -> bool:
        """Share a step, and read the summaries that are due. Return True if some rank was asked to
        stop."""
        at, facts = step.position.step, step.facts
        self._pending[at] = step
        first, count = batch.micro[0].index, batch.micro_batches
        failed = any(callback.failed for callback in self.callbacks)
        own_hash = batch.window_hash if self.world.names_windows else 0
        self.world.share(at, facts.losses, first, count, own_hash, stop, failed, facts.extra)
        due = any(callback.is_due(at) for callback in self.callbacks)
        return self._read(behind=0 if due else 1)

    def flush(self) -> None:
        """Read the summaries of all steps that were shared."""
        self._read(behind=0)

    def drain(self) -> None:
        """As `flush`, after an anomaly; a further one changes nothing, because the loop ends."""
        while self._pending:
            with suppress(Anomaly):
                self.flush()

    def _read(self, behind: int) -> bool:
        stop = False
        self.phases.mark("summary")
        for summary in self.world.summaries(behind):
            step = self._pending.pop(summary.step)
            for i, callback in enumerate(self.callbacks):
                try:
                    with self.phases(callback.phase):
                        callback.see(step, summary)
                except Anomaly:
                    # Steps that are already made are still logged, but nothing is saved any more.
                    self.callbacks = self.callbacks[:i]
                    raise
            stop |= summary.stop
        return stop
