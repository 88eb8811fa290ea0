"""The loss of runs as a picture for papers and READMEs: SVG or PNG.

Invariant: the same rows give the same bytes. Imports matplotlib, so it is imported where a picture
is drawn.
"""

import math
from collections.abc import Sequence

import numpy as np

from forescale.ground.console import visible
from forescale.ground.errors import UserError, shortened
from forescale.monitor.report.curves import Array, Line, read_curves
from forescale.monitor.report.events import LOOKS, events_of
from forescale.monitor.report.html import joined, labels, points_of
from forescale.monitor.report.panels import RunCurves, look
from forescale.monitor.status import Status
from forescale.pages.figure import Axis, Figure, Trace, line
from forescale.pages.picture import pictures
from forescale.run.directory import Run

_SIZE = (7.2, 3.3)  # inches
_MEDIAN = 25  # points of the running median
_DOTS = 1500  # pale dots of one run, at most
_EARLY = 0.03  # of the x axis: a higher loss there may lie above the axis
_DENSE = 60  # points of a line for which that holds
_LONGEST = 24  # characters of a label
_TITLES = {"step": "step", "tokens": "tokens", "flops": "compute (FLOPs)"}
_UNITS = ((1.0, "seconds", 180.0), (60.0, "minutes", 10_800.0), (3600.0, "hours", 259_200.0),
          (86_400.0, "days", math.inf))  # fmt: skip


def picture(runs: Sequence[Run], x: str, form: str) -> bytes:
    """Return the losses of runs over x as a picture. form: "svg" or "png". Raises UserError if a
    run's files are damaged, or if no run has made a step."""
    points = points_of(runs)
    curves = [
        RunCurves(label, read_curves(run, points), events_of(Status(run)), ())
        for run, label in zip(runs, labels(runs), strict=True)
    ]
    if not any(run.curves.lines for run in curves):
        problem = "has made no step yet, so there is no loss to draw"
        raise UserError(joined([run.label for run in curves]), problem, "look again later")
    return pictures([losses(curves, x)], size=_SIZE, forms=[form])[form]


def losses(runs: Sequence[RunCurves], x: str) -> Figure:
    """Return the figure of training and held-out losses over x. A run without a step is in the key
    alone."""
    lines = [loss for run in runs for loss in (_training(run), _held_out(run)) if loss is not None]
    places = np.concatenate([np.zeros(1), *(loss.x[x] for loss in lines)])
    high, size = float(places[np.isfinite(places)].max()) or 1.0, 1.0
    across = Axis(_TITLES.get(x, ""), power=x == "flops", ends=(0.0, 1.01 * high), grid=False)
    if x == "time":  # in the unit that fits
        size, unit, _ = next(unit for unit in _UNITS if high < unit[2])
        title = f"training time ({unit}, kept steps)"
        across = Axis(title, ends=(0.0, 1.01 * high / size), grid=False)
    figure = Figure(across, Axis("loss (nats a token)", ends=_ends(lines, x)))
    for i, run in enumerate(runs):
        for event in run.events:
            at = run.curves.at(event.step or 0).get(x, math.nan) / size
            if event.step is not None and event.sort != "note" and math.isfinite(at):
                _, colour, label = LOOKS[event.sort]
                ends = np.array(figure.ends("y"))
                figure.add(line(np.full(2, at), ends, colour, "dash", width=1.0, name=label))
        _add_curves(figure, run, i, x, size, is_alone=len(runs) == 1)
    return figure


def _training(run: RunCurves) -> Line | None:
    return run.curves.lines.get("loss")


def _held_out(run: RunCurves) -> Line | None:
    return run.curves.scores.get("validation", {}).get("loss")


def _ends(lines: Sequence[Line], x: str) -> tuple[float, float]:
    """Return the ends of the axis of losses. The first steps of long lines may lie above it, and
    one point of 500 anywhere."""
    values = [np.zeros(0)]
    for loss in lines:
        known = np.isfinite(loss.y)
        if known.sum() > _DENSE:
            known &= loss.x[x] >= _EARLY * np.nanmax(loss.x[x])
        values.append(loss.y[known])
    every = np.concatenate(values)
    low, high = (float(every.min()), float(np.quantile(every, 0.998))) if len(every) else (0.0, 1.0)
    room = max(0.07 * (high - low), 1e-3 * abs(high), 1e-9)
    return low - room, high + room


def _add_curves(
    figure: Figure, run: RunCurves, number: int, x: str, size: float, is_alone: bool
) -> None:
    colour, _ = look(number)
    dash = ("", "dash", "dot", "dashdot")[number // 8 % 4]  # as look's, of runs of one colour
    label = shortened(visible(run.label), _LONGEST) if not is_alone else "training"
    for dropped in run.curves.dropped:
        figure.add(line(dropped.x[x] / size, dropped.y, colour, "dot", width=1.0))
    loss = _training(run) or Line({x: np.zeros(0)}, np.zeros(0))
    every = max(1, -(-len(loss.y) // _DOTS))
    figure.add(
        Trace("dots", loss.x[x][::every] / size, loss.y[::every], [f"{colour}59"], size=1.8,
              width=0.0),
        line(loss.x[x] / size, running_median(loss.y, _MEDIAN), colour, dash, width=1.7,
             name=label),
    )  # fmt: skip
    if (held := _held_out(run)) is not None:
        figure.add(Trace("dots", held.x[x] / size, held.y, [colour], size=7.5, edge="#ffffff",
                         name="held-out text"))  # fmt: skip


def running_median(values: Array, window: int) -> Array:
    """Return the running median over `window` points, centred. At the beginning, where the loss
    falls fast, over fewer points around each; at the end over those that are left. NaN stays NaN,
    and is in no median."""
    medians = np.full(len(values), np.nan)
    for i in range(len(values)):
        if np.isfinite(values[i]):
            reach = min(window // 2, i)
            medians[i] = np.nanmedian(values[i - reach : i + reach + 1])
    return medians
