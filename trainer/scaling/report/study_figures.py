"""The figures of a study's report besides those of the law.

    forecasts        a line per forecast: 50 % and 90 % interval and observed loss, relative to the
                     predicted loss; hollow: not observed yet; diamond: outside
    sweep_responses  a line per sweep: log loss above its least over the value relative to the best;
                     hollow: a best run at an edge; a cross at the top: diverged
    repeats          runs that differ by a seed, around their mean
    hours            shares of the wall clock, a bar per stage

Invariant: as in fit_figures.py: the numbers of the evidence, one colour per budget.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from forescale.monitor.goodput import BUCKETS
from forescale.pages import figure as chart
from forescale.scaling.analysis.forecast import Forecast
from forescale.scaling.design.noise import Level
from forescale.scaling.report.evidence import StageCost, SweepResponse

OUTER, INNER = "#a3c4db", chart.OTHER  # intervals of a forecast: light and dark blue
WEIGHTS, DATA = chart.OTHER, chart.TARGET
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
_DASHES = ("", "dash", "dot", "dashdot")
_SERIES = {  # of repeated runs
    "the cell itself": (0.0, "circle", chart.INK),
    "other weights": (-_DODGE, "square", WEIGHTS),
    "other data": (_DODGE, "diamond", DATA),
    "other seeds": (2 * _DODGE, "triangle", chart.INK),
}


def forecasts(rows: Sequence[Forecast]) -> chart.Figure:
    """Return forecasts and observed losses, by compute, the cheapest on top."""

    def compute(forecast: Forecast) -> tuple[float, str]:
        c = forecast.facts["target"]["parameters"] * forecast.facts["target"]["tokens"]
        return (c if math.isfinite(c) else math.inf), forecast.id

    rows = sorted(rows, key=compute)
    names = [_short(forecast.facts["target"]["run"]) for forecast in rows]
    figure = chart.Figure(
        chart.Axis("observed loss relative to predicted loss (%)", zero=True),
        chart.ordinal("run, the cheapest first", names, down=True),
        _AROUND + _ROW * max(3, len(rows)),
    )
    at = np.arange(len(rows), dtype=float)
    for key, colour in (("interval", OUTER), ("interval_50", INNER)):
        ends = [[100 * (end / c.facts["loss"] - 1) for end in c.facts[key]] for c in rows]
        figure.add(chart.segments(np.array(ends).T, at.tolist(), colour, 5.0))
    kinds, errors, texts = list[str](), list[float](), list[str]()
    for forecast in rows:
        f, outcome, (low, high) = forecast.facts, forecast.outcome, forecast.facts["interval"]
        kind, error, observed = "pending", 0.0, "pending"
        factor = f["target"].get("extrapolation_factor", math.nan)
        if outcome is not None:
            kind = "inside" if low <= outcome["loss"] <= high else "outside"
            error = 100 * (outcome["loss"] / f["loss"] - 1)
            observed = f"observed {outcome['loss']:.5g} ({error:+.2f} %)"
        kinds.append(kind)
        errors.append(error)
        texts.append(
            f"{f['target']['run']}\npredicted {f['loss']:.5g}\n{f['level']:.0%}: {low:.5g} to "
            f"{high:.5g}\n{observed}\n{factor:.3g} times the most "
            f"expensive run\nforecast {forecast.id}, {f.get('time')}"
        )
    marks = {"inside": ("circle", chart.INK), "outside": ("diamond", chart.TARGET),
             "pending": ("circle", chart.INK)}  # fmt: skip
    for kind, (shape, colour) in marks.items():
        if which := [i for i, k in enumerate(kinds) if k == kind]:
            hollow = np.full(len(which), kind == "pending")
            x, text = np.array(errors)[which], [texts[i] for i in which]
            figure.add(chart.dots(x, at[which], [colour], text, hollow, shape))
    return figure


def sweep_responses(
    sweeps: Sequence[SweepResponse], name: str, shades: Mapping[float, str]
) -> chart.Figure:
    """Return responses to learning rates or batches. name: "learning rate" or "batch".

    The smallest size of a stage has a solid line, the others dashed ones. Runs beyond the parabola
    are joined to it by thin straight lines.
    """
    every = np.concatenate([c.values / c.best for c in sweeps])
    highest = max(100 * float(c.rise[np.isfinite(c.rise)].max()) for c in sweeps)
    top = max(highest, _HALF) * _ABOVE
    # Ticks at powers of two, the factors of the sweeps.
    low, high = math.floor(np.log2(every.min())), math.ceil(np.log2(every.max()))
    powers = [p for p in range(low, high + 1) if p % max(1, round((high - low) / 7)) == 0]
    ticks = [(2.0**p, f"{2**p}" if p >= 0 else f"1/{2**-p}") for p in powers]
    ends = float(every.min()) / 1.25, float(every.max()) * 1.25
    figure = chart.Figure(
        chart.Axis(f"{name}, relative to the best", log=True, ticks=ticks, ends=ends),
        chart.Axis(
            "loss above the least of its sweep (%)", zero=True, ends=(-0.07 * top, top * 1.06)
        ),
    )
    for c in sweeps:
        sizes = sorted({other.parameters for other in sweeps if other.stage == c.stage})
        dash = _DASHES[sizes.index(c.parameters) % len(_DASHES)]
        colour = shades.get(c.budget, chart.INK) if c.budget else chart.INK
        if c.bend is not None:
            x = np.geomspace(*c.ends, _FINE) / c.best
            figure.add(chart.line(x, 100 * c.bend * np.log(x) ** 2, colour, dash))
        for side in (c.values <= c.ends[0], c.values >= c.ends[1]):
            which = side & np.isfinite(c.losses)
            if which.sum() > 1:
                x, rise = c.values[which] / c.best, 100 * c.rise[which]
                figure.add(chart.line(x, rise, colour, dash, width=0.7))
    for c in sweeps:
        colour = shades.get(c.budget, chart.INK) if c.budget else chart.INK
        there, texts = np.isfinite(c.losses), list[str]()
        edge = np.zeros(len(c.values), dtype=bool)
        edge[c.lowest] = not c.inside
        for value, loss, at_edge in zip(c.values, c.losses, edge, strict=True):
            result = f"loss {loss:.5g}" if math.isfinite(loss) else "diverged"
            note = [chart.wrapped("The best of the sweep, but at its edge: no optimum.")] * bool(
                at_edge
            )
            facts = [c.cell, f"stage {c.stage}", f"N {c.parameters:,.0f}", f"{name} {value:.4g}"]
            texts.append("\n".join([*facts, result, *note]))
        x, y = c.values / c.best, np.where(there, 100 * c.rise, top)
        for which, shape in ((there, "circle"), (~there, "cross")):
            if text := [t for t, w in zip(texts, which, strict=True) if w]:
                figure.add(chart.dots(x[which], y[which], [colour], text, edge[which], shape))
    return figure


def repeats(table: pd.DataFrame, levels: Sequence[Level]) -> chart.Figure:
    """Return the repeats of cells: log loss above the mean of all runs of the cell, in %."""
    flops = [f"{level.flops:.2e}".split("e") for level in levels]
    labels = [f"{_short(level.cell)}, {mantissa}e{int(power)}"
              for level, (mantissa, power) in zip(levels, flops, strict=True)]  # fmt: skip
    across = chart.ordinal("cell, and C of a run (FLOPs)", labels)
    figure = chart.Figure(
        across, chart.Axis("loss above the mean of the repeats (%)", zero=True), 340
    )
    for i, level in enumerate(levels):
        runs = table[(table["cell_of"] == level.cell) & table["role"].isin(("grid", "seed"))]
        y = 100 * np.log(runs["loss"].to_numpy(dtype=float))
        y, first = y - y.mean(), runs[runs["role"] == "grid"]
        kinds = np.where(runs["role"] == "grid", "the cell itself", "other seeds")
        if len(first) and {"seed", "init_seed"} <= set(runs.columns):
            data = runs["seed"] != first["seed"].iloc[0]
            weights = runs["init_seed"] != first["init_seed"].iloc[0]
            names = ["other seeds", "other weights", "other data"]
            kinds = np.select([data & weights, weights, data], names, "the cell itself")
        for kind, (shift, shape, colour) in _SERIES.items():
            which = kinds == kind
            if which.any():
                pairs = zip(runs["name"][which], runs["loss"][which], strict=True)
                texts = [f"{name}\n{kind}\nloss {loss:.5g}" for name, loss in pairs]
                x = np.full(int(which.sum()), i + shift)
                figure.add(chart.dots(x, y[which], [colour], texts, shape=shape))
    return figure


def hours(stages: Sequence[StageCost]) -> chart.Figure:
    """Return the shares of the wall clock of each stage's runs, in %."""
    names = [f"stage {s.number}" for s in stages]
    across = chart.Axis("share of the wall clock (%)", ends=(0, 100))
    figure = chart.Figure(across, chart.ordinal("", names, down=True), _AROUND + 34 * len(stages))
    starts = np.zeros(len(stages))
    for bucket in buckets_of(stages):
        seconds = [s.seconds.get(bucket, 0.0) for s in stages]
        shares = np.array(
            [100 * x / sum(s.seconds.values()) for x, s in zip(seconds, stages, strict=True)]
        )
        texts = [f"{name}\n{bucket}\n{share:.1f} %, {x / 3600:.3g} h"
                 for name, share, x in zip(names, shares, seconds, strict=True)]  # fmt: skip
        figure.add(chart.bars(starts, shares, hue(bucket), texts))
        starts = starts + shares
    return figure


def buckets_of(stages: Sequence[StageCost]) -> list[str]:
    """Return the buckets with any time, in the order of the bars."""
    used = {b for s in stages for b, seconds in s.seconds.items() if seconds}
    return [b for b in (*BUCKETS, *sorted(used - BUCKETS.keys())) if b in used]


def hue(bucket: str) -> str:
    """Return the colour of a bucket."""
    return HUES.get(bucket, chart.INK)


def _short(name: str) -> str:
    half = _NAME // 2
    return name if len(name) <= _NAME else f"{name[: half - 1]}…{name[-half:]}"
