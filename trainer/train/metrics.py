"""What is told of a step: rows for programs, a line for people, and sinks such as wandb.

Invariant: metrics.jsonl holds one `train` row a step, with all digits, whatever the sinks do.
"""

import math
import sys
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from forescale.checkpoint.writer import Position
from forescale.engine.world import Word
from forescale.run.directory import Attempt
from forescale.run.forecast import Band, told
from forescale.train.callbacks import Every
from forescale.train.evaluate import Score
from forescale.train.loop import Step


class Sink(Protocol):
    """Somebody who wants the numbers of the rows: wandb, TensorBoard."""

    def log(self, values: dict[str, float], step: int) -> None: ...

    def finish(self) -> None: ...


@dataclass(frozen=True)
class Prices:
    """What a token costs, in FLOPs (forward and backward), and what the devices can do a second.

    full: attention over the square, no recomputation (PaLM, appendix B), which MFU is counted
    with; causal: exactly what a causal model needs; six_n: 6N.
    """

    full: float
    causal: float
    six_n: float
    peak: float  # FLOP/s, all devices


class Metrics:
    """Writes the rows of this attempt and shows progress; on ranks but 0 it does nothing."""

    phase = "logging"
    failed = False

    def __init__(
        self,
        attempt: Attempt,
        prices: Prices,
        peak_rates: dict[str, float],
        line: "Line",
        sinks: list[Sink],
        memory: Callable[[], int],
        is_main: bool,
        lost: Iterable[tuple[str, int, str]] = (),
        band: Band | None = None,
    ):
        self.attempt, self.prices, self.peak_rates = attempt, prices, peak_rates
        self.line, self.sinks, self.memory, self.is_main = line, sinks, memory, is_main
        self.lost = set(lost)  # members whose damage has been told
        self.band = band  # that the last score is measured by

    def is_due(self, step: int) -> bool:
        return False

    def see(self, step: Step, word: Word) -> None:
        if not self.is_main:
            return
        row = self._row(step, word)
        self.attempt.metrics.add(row)
        self._tell_lost(step)
        self._tell_ill(step, row)
        self.line.show(row, word)
        self._send(row)

    def _row(self, step: Step, word: Word) -> dict[str, Any]:
        p, tokens, seconds = step.position, step.targets, step.seconds
        busy = seconds.get("compute", 0.0) + seconds.get("data", 0.0)
        rate = tokens / busy if busy else 0.0
        return {
            "kind": "train",
            "step": p.step,
            "attempt": self.attempt.number,
            "g0": step.g0,
            "g1": p.g,
            "tokens": p.tokens,
            "shares": step.shares,
            "tokens_hash": word.tokens_hash,
            "flops_causal": self.prices.causal * p.tokens,
            "flops_full": self.prices.full * p.tokens,
            "flops_6nd": self.prices.six_n * p.tokens,
            "loss": sum(word.losses) / tokens,  # added in the global order of micro-batches
            "grad_norm": step.facts.grad_norm,
            "applied": step.facts.applied,
            "learning_rate": {k: v * step.learning_rate for k, v in self.peak_rates.items()},
            "tokens_per_second": rate,
            "mfu": self.prices.full * rate / self.prices.peak,
            "memory_bytes": self.memory(),
            "seconds": {k: round(v, 6) for k, v in seconds.items()},
            **({"quarantined": p.quarantined} if p.quarantined else {}),
        }

    def _tell_ill(self, step: Step, row: dict[str, Any]) -> None:
        """Say that an update was dropped, or that a step looked odd."""
        reason = step.verdict.reason
        if not step.facts.applied:
            reason = reason or "the gradient overflowed, and the loss scale is lowered"
            self.attempt.event("update_dropped", step=row["step"], reason=reason)
            self.line.say(f"step {row['step']:,}: the update is dropped: {reason}")
        elif reason:
            self.attempt.event("spike_noted", step=row["step"], reason=reason)

    def _tell_lost(self, step: Step) -> None:
        """Say which members count as damaged from this step on, once each."""
        for source, shard, member in step.position.quarantined:
            if (source, shard, member) not in self.lost:
                self.lost.add((source, shard, member))
                facts = {"source": source, "shard": shard, "member": member}
                self.attempt.event("member_quarantined", step=step.position.step, **facts)
                self.line.say(
                    f"Damaged: member {member or '(all)'} of shard {shard} of {source}; other "
                    f"windows stand in for its own from step {step.position.step:,} on."
                )

    def validated(self, step: Step, scores: dict[str, Score]) -> None:
        """Record scores of held-out splits by their names; "validation" is all of them."""
        for dataset, score in scores.items() if self.is_main else ():
            self._validated(step, dataset, score)
            if dataset == "validation" and step.position.step == self.line.total:
                self._judge(step.position, score)

    def _judge(self, position: Position, score: Score) -> None:
        """Measure the end by what was foretold; before it no band is due."""
        if self.band is None or not score.windows:
            return
        facts = {"step": position.step, "tokens": position.tokens, **self.band.judge(score.loss)}
        self.attempt.event("forecast", **facts)
        self.line.say(told(facts))
        if not self.band.holds(score.loss):
            self.attempt.event("left_forecast", **facts)
            self.line.say(f"Warning: the run left the forecast of {self.band.card}.")

    def _validated(self, step: Step, dataset: str, score: Score) -> None:
        if not score.windows:
            self.attempt.event("nothing_to_validate", step=step.position.step)
            self.line.say(f"Nothing is scored: {dataset} holds no held-out text.")
            return
        row = {
            "kind": "validation",
            "step": step.position.step,
            "attempt": self.attempt.number,
            "tokens": step.position.tokens,
            "dataset": dataset,
            **vars(score),
        }
        self.attempt.metrics.add(row)
        self.line.say(
            f"step {row['step']:,}: {dataset} loss {score.loss:.4f} ± {score.loss_stderr:.4f}, "
            f"{score.bits_per_byte:.4f} bits per byte over {score.windows:,} windows"
        )
        self._send(row)

    def _send(self, row: dict[str, Any]) -> None:
        numbers = {f"{row['kind']}/{name}": v for name, v in _numbers(row)} if self.sinks else {}
        for sink in self.sinks:
            sink.log(numbers, step=row["step"])

    def close(self) -> None:
        """End the live line, and wait until the sinks have written what they hold."""
        self.line.close()
        for sink in self.sinks:
            sink.finish()


def _numbers(row: dict[str, Any]):
    for name, value in row.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{k}", v) for k, v in value.items())
        elif isinstance(value, int | float) and name not in ("step", "attempt", "tokens_hash"):
            yield name, value


class Line:
    """Progress: a live line on a terminal, a plain one at intervals elsewhere."""

    def __init__(self, due: Every, total: int, done: int, active: bool):
        self.due, self.total = due, total
        self._recent: deque[tuple[int, float]] = deque(maxlen=50)
        self._live = None
        if active and sys.stdout.isatty():
            self._live, self._task = _live_progress(total, done)

    def show(self, row: dict[str, Any], word: Word) -> None:
        """Of a train row."""
        tokens = row["tokens_per_second"] and row["mfu"] / row["tokens_per_second"]
        self._recent.append((row["step"], word.seconds))
        due = self.due.hear(row["step"], word)
        if self._live:
            self._live.update(self._task, completed=row["step"], text=self._text(row, tokens))
        elif due:
            print(self._text(row, tokens), flush=True)

    def _text(self, row: dict[str, Any], mfu_per_rate: float) -> str:
        (first, since), (last, now) = self._recent[0], self._recent[-1]
        pace = (now - since) / (last - first) if last > first else 0.0
        tokens = row["tokens"] / row["step"]
        rate = tokens / pace if pace else row["tokens_per_second"]
        eta = clock((self.total - row["step"]) * pace) if pace else "--:--"
        width = len(str(self.total))
        return (
            f"step {row['step']:>{width}}/{self.total} ({row['step'] / self.total:6.1%}) | "
            f"loss {row['loss']:.4f} | {rate:,.0f} tokens/s | "
            f"mfu {rate * mfu_per_rate:.1%} | eta {eta}"
        )

    def say(self, text: str) -> None:
        """A line of its own, above the live one."""
        if self._live:
            self._live.console.print(text, highlight=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None


def _live_progress(total: int, done: int):
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    progress = Progress(
        TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=None, table_column=Column(ratio=1)),  # the room that the text leaves
        expand=True,
        refresh_per_second=4,
    )
    task = progress.add_task("", total=total, completed=done, text="starting")
    progress.start()
    return progress, task


def clock(seconds: float) -> str:
    """Seconds as 4:05 or 2:03:09."""
    if not math.isfinite(seconds):
        return "--:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
