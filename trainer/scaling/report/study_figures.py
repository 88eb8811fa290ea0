"""The figures that a study's report has besides the law, each a plotly figure.

    forecasts        a line per forecast: 50 % and 90 % interval and observed loss, relative to the
                     predicted loss; hollow: not observed yet; diamond: outside
    sweep_responses  a line per sweep: log loss above its least over the value relative to the best;
                     hollow: a best run at an edge; a cross at the top: diverged
    repeats          runs that differ by a seed, around their mean
    hours            shares of the wall clock, a bar per stage

Invariant: as in figures.py: the numbers of the evidence, escaped names, one colour per budget.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from forescale.monitor.goodput import BUCKETS
from forescale.monitor.report.colours import FAINT, INK, OTHER, TARGET
from forescale.scaling.analysis.forecast import Forecast
from forescale.scaling.design.noise import Level
from forescale.scaling.fitting.points import Array
from forescale.scaling.report import style
from forescale.scaling.report.evidence import StageCost, SweepResponse
from forescale.scaling.report.style import wrapped

OUTER, INNER = "rgb(163,196,219)", OTHER  # intervals of a forecast: light and dark blue
WEIGHTS, DATA = OTHER, TARGET
# Wong 2011, "Points of view: Color blindness" (Nature Methods 8): distinct to all readers.
HUES = {
    "compute": "#0072b2", "data": "#56b4e9", "evaluation": "#009e73", "checkpoint": "#f0e442",
    "startup": "#999999", "recovery": "#e69f00", "lost": "#d55e00", "waiting": "#cc79a7",
    "queue": "#dfe3e8",
}  # fmt: skip
_NAME = 18  # characters of a run's name beside an axis, so that a figure fits a phone
_ROW, _AROUND = 24, 110  # pixels per forecast, and of the axes
_ABOVE = 1.12  # a diverged run is drawn at this multiple of the highest loss
_FINE, _HALF = 48, 0.5  # points of a parabola; smallest height of a sweep figure, in percent
_DODGE = 0.17
_LINES = ("solid", "dash", "dot", "dashdot")


def forecasts(found: Sequence[Forecast]) -> go.Figure:
    """Forecasts and observed losses, by compute, the cheapest on top."""
    found = sorted(found, key=_compute)
    names = [_short(forecast.facts["target"]["run"]) for forecast in found]
    height = _AROUND + _ROW * max(3, len(found))
    across, down = {"zeroline": True, "zerolinecolor": FAINT}, style.ordinal(names, True)
    title = "observed loss relative to predicted loss (%)"
    figure = style.axes(title, "run, the cheapest first", across, down, height)
    rows = np.arange(len(found), dtype=float)
    for which, colour, width in (("interval", OUTER, 5.0), ("interval_50", INNER, 5.0)):
        ends = [[100 * (end / c.facts["loss"] - 1) for end in c.facts[which]] for c in found]
        figure.add_trace(style.segments(np.array(ends).T, rows.tolist(), colour, width))
    kinds = [_kind(forecast) for forecast in found]
    for kind, shape, colour in (("inside", "circle", INK), ("outside", "diamond", TARGET),
                                ("pending", "circle", INK)):  # fmt: skip
        at = [i for i, k in enumerate(kinds) if k == kind]
        if at:
            own = [found[i] for i in at]
            x = np.array([_error(forecast) for forecast in own])
            hollow, text = (
                np.full(len(at), kind == "pending"),
                [_text(forecast) for forecast in own],
            )
            colours = [colour] * len(at)
            figure.add_trace(style.dots(x, rows[at], colours, hollow, text, shape))
    return figure


def _compute(forecast: Forecast) -> tuple[float, str]:
    aim = forecast.facts["target"]
    c = aim["parameters"] * aim["tokens"]
    return (c if math.isfinite(c) else math.inf), forecast.id


def _kind(forecast: Forecast) -> str:
    outcome, (low, high) = forecast.outcome, forecast.facts["interval"]
    if outcome is None:
        return "pending"
    return "inside" if low <= outcome["loss"] <= high else "outside"


def _error(forecast: Forecast) -> float:
    outcome = forecast.outcome
    return 100 * (outcome["loss"] / forecast.facts["loss"] - 1) if outcome else 0.0


def _text(forecast: Forecast) -> str:
    """The text shown when hovering over a forecast."""
    f, outcome = forecast.facts, forecast.outcome
    low, high = f["interval"]
    observed = "pending"
    if outcome:
        observed = f"observed {outcome['loss']:.5g} ({_error(forecast):+.2f} %)"
    return (
        f"<b>{wrapped(f['target']['run'])}</b><br>predicted {f['loss']:.5g}<br>{f['level']:.0%}: "
        f"{low:.5g} to {high:.5g}<br>{observed}<br>{f['target']['extrapolation_factor']:.3g} times "
        f"the most expensive run<br>forecast {forecast.id}, {f['time']}"
    )


def sweep_responses(
    found: Sequence[SweepResponse], problem: str, shades: Mapping[float, str]
) -> go.Figure:
    """Responses to learning rates or batches. what: "learning rate" or "batch".

    The smallest size of a stage has a solid line, the others dashed ones. Runs beyond the parabola
    are joined to it by thin straight lines.
    """
    every = np.concatenate([c.values / c.best for c in found])
    highest = max(100 * float(c.rise[np.isfinite(c.rise)].max()) for c in found)
    top = max(highest, _HALF) * _ABOVE
    title = f"{problem}, relative to the best"
    figure = style.axes(title, "loss above the least of its sweep (%)",
                          {**style.logarithmic(every), **_multiples(every)},
                          {"zeroline": True, "zerolinecolor": FAINT,
                           "range": [-0.07 * top, top * 1.06]})  # fmt: skip
    for c, dash in zip(found, _dashes(found), strict=True):
        colour = shades.get(c.budget, INK) if c.budget else INK
        if c.bend is not None:
            x = np.geomspace(*c.ends, _FINE) / c.best
            figure.add_trace(style.line(x, 100 * c.bend * np.log(x) ** 2, colour, dash))
        for side in (c.values <= c.ends[0], c.values >= c.ends[1]):
            own = side & np.isfinite(c.losses)
            if own.sum() > 1:
                thin = style.line(c.values[own] / c.best, 100 * c.rise[own], colour, dash)
                figure.add_trace(thin.update(line_width=0.7))
    for c in found:
        colour = shades.get(c.budget, INK) if c.budget else INK
        texts, there = _texts(c, problem), np.isfinite(c.losses)
        edge = np.zeros(len(c.values), dtype=bool)
        edge[c.found] = not c.inside
        x, y = c.values / c.best, np.where(there, 100 * c.rise, top)
        for which, shape in ((there, "circle"), (~there, "x")):
            text = [t for t, w in zip(texts, which, strict=True) if w]
            if text:
                colours = [colour] * len(text)
                runs = x[which], y[which], colours, edge[which], text
                figure.add_trace(style.dots(*runs, shape))
    return figure


def _multiples(every: Array) -> dict[str, object]:
    """Ticks at powers of two, the factors of the sweeps."""
    low, high = math.floor(np.log2(every.min())), math.ceil(np.log2(every.max()))
    step = max(1, round((high - low) / 7))
    powers = [p for p in range(low, high + 1) if p % step == 0]
    labels = [f"{2**p}" if p >= 0 else f"1/{2**-p}" for p in powers]
    reach = [math.log10(every.min() / 1.25), math.log10(every.max() * 1.25)]
    return {"tickvals": [2.0**p for p in powers], "ticktext": labels, "range": reach, "minor": {}}


def _dashes(found: Sequence[SweepResponse]) -> list[str]:
    """The dash style of each sweep, by size within its stage."""
    sizes = {c.stage: sorted({o.parameters for o in found if o.stage == c.stage}) for c in found}
    return [_LINES[sizes[c.stage].index(c.parameters) % len(_LINES)] for c in found]


def _texts(c: SweepResponse, problem: str) -> list[str]:
    lines = [f"<b>{wrapped(c.cell)}</b>", f"stage {c.stage}", f"N {c.parameters:,.0f}"]
    found = []
    for i, (value, loss) in enumerate(zip(c.values, c.losses, strict=True)):
        own = f"loss {loss:.5g}" if math.isfinite(loss) else "diverged"
        edge = [wrapped("The best of the sweep, but at its edge: no optimum.")]
        more = edge if i == c.found and not c.inside else []
        found.append("<br>".join([*lines, f"{problem} {value:.4g}", own, *more]))
    return found


def repeats(table: pd.DataFrame, levels: Sequence[Level]) -> go.Figure:
    """Repeats of cells: log loss above the mean of all runs of the cell, in %."""
    labels = [f"{_short(level.cell)}, {_flops(level.flops)}" for level in levels]
    figure = style.axes("cell, and C of a run (FLOPs)", "loss above the mean of the repeats (%)",
                          style.ordinal(labels), {"zeroline": True, "zerolinecolor":
                                                    FAINT}, 340)  # fmt: skip
    for i, level in enumerate(levels):
        own = table[(table["cell_of"] == level.cell) & table["role"].isin(("grid", "seed"))]
        y = 100 * np.log(own["loss"].to_numpy(dtype=float))
        y = y - y.mean()
        kinds = _seeds(own)
        for kind, (shift, shape, colour) in _SERIES.items():
            which = kinds == kind
            if which.any():
                names = own["name"][which]
                losses = own["loss"][which]
                text = [f"<b>{wrapped(str(n))}</b><br>{kind}<br>loss {x:.5g}"
                        for n, x in zip(names, losses, strict=True)]  # fmt: skip
                x = np.full(int(which.sum()), i + shift)
                hollow = np.zeros(len(x), dtype=bool)
                colours = [colour] * len(x)
                figure.add_trace(style.dots(x, y[which], colours, hollow, text, shape))
    return figure


_SERIES = {
    "the cell itself": (0.0, "circle", INK),
    "other weights": (-_DODGE, "square", WEIGHTS),
    "other data": (_DODGE, "diamond", DATA),
    "other seeds": (2 * _DODGE, "triangle-up", INK),
}


def _seeds(own: pd.DataFrame) -> Array:
    """The kind of each run, (n,), a key of _SERIES."""
    first = own[own["role"] == "grid"]
    if first.empty or not {"seed", "init_seed"} <= set(own.columns):
        return np.where(own["role"] == "grid", "the cell itself", "other seeds")
    data = own["seed"] != first["seed"].iloc[0]
    weights = own["init_seed"] != first["init_seed"].iloc[0]
    return np.select(
        [data & weights, weights, data],
        ["other seeds", "other weights", "other data"],
        "the cell itself",
    )


def hours(stages: Sequence[StageCost]) -> go.Figure:
    """Shares of the wall clock of each stage's runs, in %."""
    names = [f"stage {s.number}" for s in stages]
    height = _AROUND + 34 * len(stages)
    figure = style.axes("share of the wall clock (%)", "", {"range": [0, 100]},
                          style.ordinal(names, True), height)  # fmt: skip
    figure.update_layout(barmode="stack", bargap=0.35)
    for bucket in buckets_of(stages):
        shares = [100 * s.seconds.get(bucket, 0.0) / sum(s.seconds.values()) for s in stages]
        text = [
            f"<b>{name}</b><br>{wrapped(bucket)}<br>{share:.1f} %, "
            f"{s.seconds.get(bucket, 0.0) / 3600:.3g} h"
            for name, share, s in zip(names, shares, stages, strict=True)
        ]
        figure.add_trace(style.bars(shares, hue(bucket), text))
    return figure


def buckets_of(stages: Sequence[StageCost]) -> list[str]:
    """Return the buckets with any time, in the order of the bars."""
    found = {b for s in stages for b, seconds in s.seconds.items() if seconds}
    return [b for b in (*BUCKETS, *sorted(found - BUCKETS.keys())) if b in found]


def hue(bucket: str) -> str:
    """Return the colour of a bucket."""
    return HUES.get(bucket, INK)


def _short(name: str) -> str:
    half = _NAME // 2
    return name if len(name) <= _NAME else f"{name[: half - 1]}…{name[-half:]}"


def _flops(value: float) -> str:
    mantissa, power = f"{value:.2e}".split("e")
    return f"{mantissa}e{int(power)}"
