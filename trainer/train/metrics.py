"""What is logged of a step: rows for programs, a line for people, and numbers for trackers.

Invariant: metrics.jsonl holds one `train` row per step, with all digits, whatever the trackers do.
"""

import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from forescale.checkpoint.reader import Position
from forescale.engine.world import StepSummary
from forescale.ground.console import is_terminal, open_console, span
from forescale.resilience.phases import training_seconds
from forescale.run.abilities import in_words
from forescale.run.band import Band
from forescale.run.directory import Attempt
from forescale.run.forecast import PredictionInterval, describe
from forescale.train.callbacks import Callback, Every, Step
from forescale.train.evaluate import Scored

_PACE = 3  # steps after the first one, which compiles, whose pace is the first estimate


class Tracker(Protocol):
    """A tracker that receives the numbers of the rows, such as wandb or TensorBoard."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Take the numbers of one row, by flat names."""

    def write(self, texts: dict[str, str], step: int) -> None:
        """Take texts by flat names."""

    def finish(self) -> None:
        """Wait until everything is written."""


@dataclass(frozen=True)
class Prices:
    """FLOPs per target (forward and backward) by three conventions, and the devices' peak.

    full: attention over the whole square, no recomputation (PaLM, appendix B); MFU uses it.
    causal: exactly what a causal model needs. six_n: 6N. peak: FLOP/s of all devices together.
    """

    full: float
    causal: float
    six_n: float
    peak: float


class Metrics(Callback):
    """Writes the rows of this attempt and shows progress, on rank 0; on the others it does nothing.

    prices: returns those of the targets of a step (from 1), and the mean of all up to it.
    peak_rates: peak learning rate of each parameter group; memory: returns bytes; lost: the members
    already reported as damaged; prediction: what the final validation loss is compared with; band:
    what the training loss is;
    targets: what validation losses are of, if not of tokens: the rows name it as `scored`;
    prompts: of the texts that `wrote` receives.
    """

    def __init__(
        self,
        attempt: Attempt,
        prices: Callable[[int], tuple[Prices, Prices]],
        peak_rates: dict[str, float],
        line: "ProgressLine",
        trackers: list[Tracker],
        memory: Callable[[], int],
        is_main: bool,
        lost: Iterable[tuple[str, int, str]] = (),
        prediction: PredictionInterval | None = None,
        targets: str = "tokens",
        band: Band | None = None,
        prompts: Sequence[str] = (),
    ):
        self.attempt, self.prices, self.peak_rates = attempt, prices, peak_rates
        self.line, self.trackers, self.memory, self.is_main = line, trackers, memory, is_main
        self.lost = set(lost)
        self.prediction, self.targets, self.band = prediction, targets, band
        self.prompts = prompts

    def see(self, step: Step, summary: StepSummary) -> None:
        """Write the step's row, its events and its line."""
        if not self.is_main:
            return
        row = self._row(step, summary)
        self.attempt.metrics.add(row)
        for source, shard, member in step.position.quarantined:
            if (source, shard, member) not in self.lost:
                self.lost.add((source, shard, member))
                facts = {"source": source, "shard": shard, "member": member}
                self.attempt.event("member_quarantined", step=step.position.step, **facts)
                self.line.print(
                    f"Damaged: member {member or '(all)'} of shard {shard} of {source}; other "
                    f"windows replace its own from step {step.position.step:,} on."
                )
        reason = step.decision.reason
        if not step.facts.applied:
            reason = reason or "the gradient overflowed, so the loss scale is lowered"
            self.attempt.event("update_dropped", step=row["step"], reason=reason)
            self.line.print(f"step {row['step']:,}: the update was dropped: {reason}")
        elif reason:
            self.attempt.event("spike_noted", step=row["step"], reason=reason)
        self.line.show(row, summary)
        self._send(row)

    def _row(self, step: Step, summary: StepSummary) -> dict[str, Any]:
        p, tokens, seconds = step.position, step.targets, step.seconds
        busy = seconds.get("compute", 0.0) + seconds.get("data", 0.0)
        rate = tokens / busy if busy else 0.0
        now, mean = self.prices(p.step)
        band = self.band and self.band.losses(p.step / self.line.total)
        return {
            "kind": "train",
            "step": p.step,
            "attempt": self.attempt.number,
            "g0": step.g0,
            "g1": p.g,
            "tokens": p.tokens,
            "shares": step.shares,
            "tokens_hash": summary.tokens_hash,
            "flops_causal": mean.causal * p.tokens,
            "flops_full": mean.full * p.tokens,
            "flops_6nd": mean.six_n * p.tokens,
            "loss": sum(summary.losses) / tokens,  # added in the global order of micro-batches
            "grad_norm": step.facts.grad_norm,
            "applied": step.facts.applied,
            "learning_rate": {k: v * step.learning_rate for k, v in self.peak_rates.items()},
            "tokens_per_second": rate,
            "mfu": now.full * rate / now.peak,
            "memory_bytes": self.memory(),
            "seconds": {k: round(v, 6) for k, v in seconds.items()},
            **({"quarantined": p.quarantined} if p.quarantined else {}),
            **{f"extra.{name}": value for name, value in summary.extra.items()},
            **({"layer_norms": norms} if (norms := step.facts.layer_norms) else {}),
            **({"band": band} if band else {}),
        }

    def scored(
        self,
        position: Position,
        scores: Mapping[str, Scored],
        abilities: Mapping[str, float] | None = None,
    ) -> None:
        """Log the scores of held-out splits by their names; "validation" is all of them pooled, in
        whose row the columns of the abilities stand, so that a step has both or none."""
        for dataset, score in scores.items() if self.is_main else ():
            is_pooled = dataset == "validation"
            self._scored(position, dataset, score, (is_pooled and abilities) or {})
            is_last = is_pooled and position.step == self.line.total
            if self.prediction is None or not is_last or not score.windows:
                continue  # only the final loss has a forecast
            at = {"step": position.step, "tokens": position.tokens}
            facts = {**at, **self.prediction.compare(score.loss)}
            self.attempt.event("forecast_scored", **facts)
            self.line.print(describe(facts))
            if not self.prediction.contains(score.loss):
                self.attempt.event("forecast_missed", **facts)
                path = self.prediction.forecast
                self.line.print(f"Warning: the loss is outside the prediction interval of {path}.")

    def _scored(
        self, position: Position, dataset: str, score: Scored, abilities: Mapping[str, float]
    ) -> None:
        if not score.windows:
            self.attempt.event("nothing_to_validate", step=position.step, dataset=dataset)
            self.line.print(f"No validation loss: {dataset} has no held-out text.")
            return
        row = {
            "kind": "validation",
            "step": position.step,
            "attempt": self.attempt.number,
            "tokens": position.tokens,
            "dataset": dataset,
            **score.row(),
            **abilities,
        }
        of = ""
        if self.targets != "tokens":
            row["scored"], of = self.targets, f" of {self.targets}"
        self.attempt.metrics.add(row)
        self.line.print(f"step {row['step']:,}: {dataset} {score.text(of)}")
        if shares := in_words(row):
            self.line.print(f"step {row['step']:,}: {shares}")
        self._send(row)

    def wrote(self, position: Position, texts: Sequence[str]) -> None:
        """Log the texts that the model writes to the prompts, in their order."""
        if not self.is_main:
            return
        step = position.step
        for i, (prompt, text) in enumerate(zip(self.prompts, texts, strict=True)):
            self.attempt.event("text_written", step=step, number=i, prompt=prompt, text=text)
            self.line.print(f"step {step:,}: {prompt!r} goes on as {text!r}")
        named = {
            f"validation/text/{i}": p + t
            for i, (p, t) in enumerate(zip(self.prompts, texts, strict=True))
        }
        for tracker in self.trackers:
            tracker.write(named, step=step)

    def _send(self, row: dict[str, Any]) -> None:
        dataset = row.get("dataset", "validation")  # the name of all held-out text together
        prefix = row["kind"] if dataset == "validation" else f"{row['kind']}/{dataset}"
        flat = {k: v for k, v in row.items() if k not in ("step", "attempt", "tokens_hash")}
        for name in [name for name, value in row.items() if isinstance(value, dict)]:
            flat |= {f"{name}/{k}": v for k, v in flat.pop(name).items()}
        self.track({f"{prefix}/{k}": v for k, v in flat.items()}, row["step"])

    def track(self, values: Mapping[str, Any], step: int) -> None:
        """Send those values that are numbers to the trackers."""
        numbers = {name: v for name, v in values.items() if isinstance(v, int | float)}
        for tracker in self.trackers:
            tracker.log(numbers, step=step)

    def close(self) -> None:
        """End the live line, and wait until the trackers have written everything."""
        self.line.close()
        for tracker in self.trackers:
            tracker.finish()


class ProgressLine:
    """The progress line: live on a terminal, else printed whenever `due`.

    Speed and time left are of the steps alone, the last 50, without evaluation and saving; a
    sentence says the time as soon as it is known, if it is minutes. total: steps of the run; done:
    steps before this attempt; active: False on ranks that print nothing;
    counted: what targets are, in a word; samples: the windows of so many steps, with which time is
    counted where they differ.
    """

    def __init__(
        self,
        due: Every,
        total: int,
        done: int,
        active: bool,
        counted: str = "tokens",
        samples: Callable[[int], int] = lambda steps: steps,
    ):
        self.due, self.total, self.counted, self._samples = due, total, counted, samples
        self._recent: deque[float] = deque(maxlen=50)  # seconds a window, of steps
        self._is_first = True  # a step that compiles says nothing of the others
        self._live: Any = None
        if active and is_terminal(sys.stdout):
            from rich.progress import BarColumn, Progress, TextColumn
            from rich.table import Column

            text = TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True))
            # The bar takes the width that the text leaves.
            bar = BarColumn(bar_width=None, table_column=Column(ratio=1))
            self._live = Progress(
                text, bar, expand=True, refresh_per_second=4, console=open_console()
            )
            self._task = self._live.add_task("", total=total, completed=done, text="starting")
            self._live.start()

    def show(self, row: dict[str, Any], summary: StepSummary) -> None:
        mfu_per_rate = row["tokens_per_second"] and row["mfu"] / row["tokens_per_second"]
        if not self._is_first:
            windows = self._samples(row["step"]) - self._samples(row["step"] - 1)
            self._recent.append(training_seconds(row["seconds"]) / windows)
            if len(self._recent) == _PACE and (left := self._seconds_left(row["step"])) >= 120:
                pace = f"at the pace of the first {_PACE + 1} steps, without evaluation and saving"
                self.print(f"This run needs {span(left)} more here, {pace}.")
        self._is_first = False
        due = self.due.update(row["step"], summary)
        if self._live:
            text = self._text(row, mfu_per_rate, self._live.console.width)
            self._live.update(self._task, completed=row["step"], text=text)
        elif due:
            print(self._text(row, mfu_per_rate), flush=True)

    @property
    def _pace(self) -> float:
        """Seconds a window, of the last steps; 0.0 before the second one."""
        return sum(self._recent) / len(self._recent) if self._recent else 0.0

    def _seconds_left(self, step: int) -> float:
        return (self._samples(self.total) - self._samples(step)) * self._pace

    def _text(self, row: dict[str, Any], mfu_per_rate: float, width: int | None = None) -> str:
        """Return the line; shorter where `width` columns are too few for all of it."""
        pace, read = self._pace, self._samples(row["step"])
        rate = row["tokens"] / read / pace if pace else row["tokens_per_second"]
        eta = clock(self._seconds_left(row["step"])) if pace else "--:--"
        step = f"{row['step']:>{len(str(self.total))}}/{self.total}"
        parts = {
            "step": f"step {step} ({row['step'] / self.total:6.1%})",
            "loss": f"loss {row['loss']:.4f}",
            "lr": f"lr {max(row['learning_rate'].values(), default=0.0):.1e}",
            "norm": f"norm {row['grad_norm']:.3g}",
            "rate": f"{rate:,.0f} {self.counted}/s",
            "mfu": f"mfu {rate * mfu_per_rate:.1%}",
            "eta": f"eta {eta}",
        }
        shorter = (
            {"mfu": ""},
            {"step": f"step {step}"},
            {"rate": f"{short(rate)} {self.counted}/s"},
            {"norm": f"norm {row['grad_norm']:.2g}"},
            {"step": step},
            {"loss": f"loss {row['loss']:.3f}"},
            {"norm": ""},
            {"lr": ""},
        )
        for part in shorter:
            if width is None or len(_joined(parts)) < width:
                break
            parts |= part
        return _joined(parts)

    def print(self, text: str) -> None:
        """Print a line of its own, above the live one."""
        if self._live:
            self._live.console.print(text, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None


def short(number: float) -> str:
    """Return a number in at most five characters: 950, 24.4k, 1.21M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def _joined(parts: dict[str, str]) -> str:
    return " | ".join(part for part in parts.values() if part)


def clock(seconds: float) -> str:
    """Return seconds as 4:05 or 2:03:09; "--:--" if not finite."""
    if not math.isfinite(seconds):
        return "--:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
