"""The charts of the page: which there are, and the numbers that runs.js draws.

Invariant: a chart without numbers is a sentence that says why. Numbers keep six digits; what isn't
finite is null.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from forescale.monitor.report.curves import LAYERS, Array, Curves, Line
from forescale.monitor.report.events import LOOKS, Event
from forescale.pages.figure import LINES, rounded
from forescale.run.abilities import column_of

_DASHES = ("", "7 3", "2 3", "9 3 2 3")  # of the runs after those that differ by colour
_MOST_EVENTS = 500  # that are drawn of one run
_RATES, _EXTRA = "learning_rate.", "extra."


@dataclass(frozen=True)
class Panel:
    """One chart. lines: the names of its lines; a run is drawn with those that it has; held: the
    score of held-out datasets, or of layers, that is drawn instead, "" for none; graded: its lines
    get darker in their order; log: the y axis is logarithmic;
    zero: it begins at 0; factor: multiplies the numbers; events: rollbacks, failures and the like
    are marked; smooth: a running median is drawn too; absent: the sentence if there are no numbers.
    """

    name: str
    title: str
    lines: tuple[str, ...] = ()
    held: str = ""
    graded: bool = False
    log: bool = False
    zero: bool = False
    factor: float = 1.0
    events: bool = False
    smooth: bool = False
    absent: str = ""


@dataclass(frozen=True)
class RunCurves:
    """The curves of one run. saves: the steps of its checkpoints."""

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


def panels(runs: Sequence[RunCurves]) -> list[Panel]:
    """Return the charts, in the order of the page."""
    names = list(dict.fromkeys(name for run in runs for name in run.curves.lines))
    rates = tuple(name for name in names if name.startswith(_RATES))
    rate = Panel("learning-rate", "Learning rate", rates, zero=True,
                 absent="No row has a learning rate.")  # fmt: skip
    others = [
        Panel("layer-norms", "Gradient norm of each layer, the last ones darkest", held=LAYERS,
              graded=True, log=True, absent="No step before an evaluation was made."),
        *[Panel("memory", "Memory of rank 0 (GiB)", ("memory",), zero=True, factor=2**-30)]
        * ("memory" in names),
    ]  # fmt: skip
    others += [
        Panel(f"extra-{i}", name.removeprefix(_EXTRA).replace("_", " "), (name,), smooth=True)
        for i, name in enumerate(n for n in names if n.startswith(_EXTRA))
    ]
    # Abilities (validation.abilities): for each task and number of examples the accuracy, and the
    # loss of an answer.
    for name in dict.fromkeys(n for run in runs for of in run.curves.scores.values() for n in of):
        if (column := column_of(name)) is not None:
            title = f"{column.task} after {column.shots} example{'s' * (column.shots != 1)}"
            panel = Panel(name.replace("/", "-"), f"{title}: nats an answer", held=name)
            if column.kind != "nats":
                title += ": right answers (%)"
                panel = replace(panel, title=title, zero=True, factor=100)
            others.append(panel)
    return [*_MAIN[:3], rate, *_MAIN[3:], *others]


def has_numbers(panel: Panel, runs: Sequence[RunCurves]) -> bool:
    """Return True if a run has a number that the chart shows."""
    if panel.held:
        return any(panel.held in of for run in runs for of in run.curves.scores.values())
    return any(name in run.curves.lines for run in runs for name in panel.lines)


def look(number: int) -> tuple[str, str]:
    """Return the colour and the dash pattern of the run with this number, from 0."""
    return LINES[number % len(LINES)], _DASHES[number // len(LINES) % len(_DASHES)]


def payload(runs: Sequence[RunCurves], charts: Sequence[Panel], x: str) -> dict[str, Any]:
    """Return the data of runs.js. x: what the curves are drawn over at first."""
    return {
        "x": x,
        "looks": LOOKS,
        "panels": [vars(panel) for panel in charts],
        "runs": [_run(run, *look(i)) for i, run in enumerate(runs)],
    }


def _run(run: RunCurves, colour: str, dash: str) -> dict[str, Any]:
    curves, order = run.curves, [*LOOKS]
    at = next((line.x for line in curves.lines.values()), {})
    placed = [e for e in run.events if e.step is not None]
    important = sorted(placed, key=lambda e: order.index(e.sort))[:_MOST_EVENTS]
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
        **({"band": _line(b)} if (b := curves.band) else {}),
        "dropped": [{"x": _places(line.x), **_line(line)} for line in curves.dropped],
        "broken": [_place(curves, step) for step in curves.broken[:_MOST_EVENTS]],
        "events": [
            {"sort": e.sort, "text": e.text, "x": _place(curves, e.step)}
            for e in sorted(important, key=lambda e: e.step or 0)
        ],
        "saves": [_place(curves, step) for step in run.saves],
    }


def _places(x: dict[str, Array]) -> dict[str, list[float | None]]:
    return {name: rounded(values) for name, values in x.items()}


def _place(curves: Curves, step: int | None) -> dict[str, float | None]:
    return {name: rounded([x])[0] for name, x in curves.at(step or 0).items()}


def _line(line: Line) -> dict[str, Any]:
    numbers = {"y": rounded(line.y)}
    if line.low is not None and line.high is not None:
        numbers |= {"low": rounded(line.low), "high": rounded(line.high)}
    return numbers
