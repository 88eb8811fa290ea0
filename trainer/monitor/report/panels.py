"""The charts of the page: which there are, and the numbers that page.js draws.

Invariant: a chart without numbers is a sentence that says why. Numbers keep six digits; what isn't
finite is null.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from forescale.monitor.report.colours import LINES
from forescale.monitor.report.curves import Array, Curves, Line
from forescale.monitor.report.events import LOOKS, Event
from forescale.run.abilities import column_of

_DIGITS = 6
_DASHES = ("", "7 3", "2 3", "9 3 2 3")  # of the runs after those that differ by colour
_MOST_EVENTS = 500  # that are drawn of one run
_RATES, _EXTRA = "learning_rate.", "extra."


@dataclass(frozen=True)
class Panel:
    """One chart. lines: the names of the lines that it shows, of each run those that it has; held:
    the number of held-out datasets that it shows instead, "" for none; log, zero: its y axis is
    logarithmic, begins at 0; factor: what its numbers are multiplied with; events: it shows what
    happened; smooth: it shows a running median beside the numbers; absent: why it has no numbers.
    """

    name: str
    title: str
    lines: tuple[str, ...] = ()
    held: str = ""
    log: bool = False
    zero: bool = False
    factor: float = 1.0
    events: bool = False
    smooth: bool = False
    absent: str = ""


@dataclass(frozen=True)
class Drawn:
    """What is drawn of one run. saves: the steps of its checkpoints."""

    label: str
    curves: Curves
    events: Sequence[Event]
    saves: Sequence[int]


_MAIN = (
    Panel("loss", "Training loss (nats a token)", ("loss",), events=True, smooth=True,
          absent="No step was made yet."),
    Panel("held-loss", "Held-out loss (nats a token)", held="loss",
          absent="No evaluation was made yet, or the run has none (validation.every)."),
    Panel("held-bits", "Held-out bits per byte", held="bits_per_byte",
          absent="No evaluation in bits per byte was made."),
    Panel("gradient-norm", "Gradient norm", ("grad_norm",), log=True, smooth=True,
          absent="No row has a gradient norm."),
    Panel("throughput", "Tokens per second", ("tokens_per_second",), zero=True, smooth=True,
          absent="No row has a speed."),
    Panel("mfu", "Model FLOPs utilization, MFU (%)", ("mfu",), zero=True, factor=100, smooth=True,
          absent="No row has an MFU."),
)  # fmt: skip


def panels(runs: Sequence[Drawn]) -> list[Panel]:
    """Return the charts, in the order of the page."""
    names = list(dict.fromkeys(name for run in runs for name in run.curves.lines))
    rates = tuple(name for name in names if name.startswith(_RATES))
    rate = Panel("learning-rate", "Learning rate", rates, zero=True,
                 absent="No row has a learning rate.")  # fmt: skip
    more = [Panel("memory", "Memory of rank 0 (GiB)", ("memory",), zero=True, factor=2**-30)] * (
        "memory" in names
    )
    more += [
        Panel(f"extra-{i}", name.removeprefix(_EXTRA).replace("_", " "), (name,), smooth=True)
        for i, name in enumerate(n for n in names if n.startswith(_EXTRA))
    ]
    return [*_MAIN[:3], rate, *_MAIN[3:], *more, *_of_abilities(runs)]


def _of_abilities(runs: Sequence[Drawn]) -> list[Panel]:
    """Return the charts of what the runs can do (validation.abilities): of each task and number of
    examples the accuracy, and the loss of an answer. None if nothing was measured."""
    names = dict.fromkeys(n for run in runs for of in run.curves.scores.values() for n in of)
    made = []
    for name in names:
        if (column := column_of(name)) is None:
            continue
        after = f"{column.task} after {column.shots} example{'s' * (column.shots != 1)}"
        if column.kind == "nats":
            made.append(Panel(name.replace("/", "-"), f"{after}: nats an answer", held=name))
        else:
            title = f"{after}: right answers (%)"
            made.append(Panel(name.replace("/", "-"), title, held=name, zero=True, factor=100))
    return made


def has_numbers(panel: Panel, runs: Sequence[Drawn]) -> bool:
    """Return True if a run has a number that the chart shows."""
    if panel.held:
        return any(panel.held in of for run in runs for of in run.curves.scores.values())
    return any(name in run.curves.lines for run in runs for name in panel.lines)


def look(number: int) -> tuple[str, str]:
    """Return the colour and the dash pattern of the run with this number, from 0."""
    return LINES[number % len(LINES)], _DASHES[number // len(LINES) % len(_DASHES)]


def payload(runs: Sequence[Drawn], shown: Sequence[Panel], x: str) -> dict[str, Any]:
    """Return all that page.js reads. x: what the curves are drawn over at first."""
    return {
        "x": x,
        "looks": LOOKS,
        "panels": [vars(panel) for panel in shown],
        "runs": [_run(run, *look(i)) for i, run in enumerate(runs)],
    }


def _run(run: Drawn, colour: str, dash: str) -> dict[str, Any]:
    curves = run.curves
    at = next((line.x for line in curves.lines.values()), {})
    return {
        "label": run.label,
        "colour": colour,
        "dash": dash,
        "steps": curves.per_point,
        "x": _places(at),
        "lines": {name: _line(line) for name, line in curves.lines.items()},
        "scores": {
            dataset: {key: {"x": _places(line.x), **_line(line)} for key, line in of.items()}
            for dataset, of in curves.scores.items()
        },
        "dropped": [{"x": _places(line.x), **_line(line)} for line in curves.dropped],
        "broken": [_place(curves, step) for step in curves.broken[:_MOST_EVENTS]],
        "events": [
            {"sort": e.sort, "what": e.text, "x": _place(curves, e.step)}
            for e in _drawn(run.events)
        ],
        "saves": [_place(curves, step) for step in run.saves],
    }


def _drawn(events: Iterable[Event]) -> list[Event]:
    """Return the events that have a place; of very many, those that matter most."""
    order = [*LOOKS]
    placed = [e for e in events if e.step is not None]
    kept = sorted(placed, key=lambda e: order.index(e.sort))[:_MOST_EVENTS]
    return sorted(kept, key=lambda e: e.step or 0)


def _places(x: dict[str, Array]) -> dict[str, list[float | None]]:
    return {name: _numbers(values) for name, values in x.items()}


def _place(curves: Curves, step: int | None) -> dict[str, float | None]:
    found = curves.at(step or 0)
    return {name: _number(x) for name, x in found.items()}


def _line(line: Line) -> dict[str, Any]:
    made = {"y": _numbers(line.y)}
    if line.low is not None and line.high is not None:
        made |= {"low": _numbers(line.low), "high": _numbers(line.high)}
    return made


def _numbers(values: Array) -> list[float | None]:
    return [*map(_number, values.tolist())]


def _number(value: float) -> float | None:
    if not np.isfinite(value):
        return None
    short = float(f"{value:.{_DIGITS}g}")
    whole = float(f"{value:.12g}")  # a step or a number of tokens stays whole
    return int(whole) if whole.is_integer() and abs(whole) < 2**53 else short
