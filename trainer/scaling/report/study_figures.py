"""The pictures of what a study knows beside its law, each a plotly figure.

    forecasts   a line a card: the interval of 50 % on that of 90 %, and what came out, over what
                was foretold; hollow: nothing came out yet; a diamond: outside
    basins      a line a cross: log loss above its least over the value over the best; hollow: a
                best run at an edge, which is no optimum; a cross on top: it diverged
    repeats     runs that differ by a seed, around their mean
    hours       shares of the wall clock, a bar a stage

Invariant: as in figures.py: numbers as they are in the evidence, names escaped, budgets one colour.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from forescale.monitor.goodput import BUCKETS
from forescale.scaling.analysis.forecast import Card
from forescale.scaling.design.noise import Level
from forescale.scaling.fitting.points import Array
from forescale.scaling.report import style
from forescale.scaling.report.evidence import Cross, Stage
from forescale.scaling.report.style import INK, OTHER, TARGET, wrapped

OUTER, INNER = "rgb(163,196,219)", OTHER  # of a forecast: light and dark of one blue
WEIGHTS, DATA = OTHER, TARGET
# Wong 2011, "Points of view: Color blindness" (Nature Methods 8): told apart by all eyes.
HUES = {
    "compute": "#0072b2", "data": "#56b4e9", "evaluation": "#009e73", "checkpoint": "#f0e442",
    "startup": "#999999", "recovery": "#e69f00", "lost": "#d55e00", "waiting": "#cc79a7",
    "queue": "#dfe3e8",
}  # fmt: skip
_NAME = 18  # letters of a run's name beside an axis: a phone must hold picture and name
_ROW, _AROUND = 24, 110  # pixels a card, and of the axes
_ABOVE = 1.12  # so much higher than the highest loss a diverged run is drawn
_FINE, _HALF = 48, 0.5  # of a parabola; of percent, the least height of a basin's picture
_DODGE = 0.17
_LINES = ("solid", "dash", "dot", "dashdot")


def forecasts(found: Sequence[Card]) -> go.Figure:
    """In the order of compute, the cheapest on top. x: observed over foretold loss, in %."""
    found = sorted(found, key=_compute)
    names = [_short(card.facts["target"]["run"]) for card in found]
    height = _AROUND + _ROW * max(3, len(found))
    across, down = {"zeroline": True, "zerolinecolor": style.FAINT}, style.ordinal(names, True)
    title = "observed loss over foretold loss (%)"
    figure = style.axes(title, "run, the cheapest first", across, down, height)
    rows = np.arange(len(found), dtype=float)
    for which, colour, width in (("interval", OUTER, 5.0), ("interval_50", INNER, 5.0)):
        ends = [[100 * (end / c.facts["loss"] - 1) for end in c.facts[which]] for c in found]
        figure.add_trace(style.segments(np.array(ends).T, rows.tolist(), colour, width))
    kinds = [_kind(card) for card in found]
    for kind, shape, colour in (("inside", "circle", INK), ("outside", "diamond", TARGET),
                                ("awaited", "circle", INK)):  # fmt: skip
        at = [i for i, k in enumerate(kinds) if k == kind]
        if at:
            own = [found[i] for i in at]
            x = np.array([_error(card) for card in own])
            hollow, told = np.full(len(at), kind == "awaited"), [_told(card) for card in own]
            colours = [colour] * len(at)
            figure.add_trace(style.dots(x, rows[at], colours, hollow, told, shape))
    return figure


def _compute(card: Card) -> tuple[float, str]:
    aim = card.facts["target"]
    c = aim["parameters"] * aim["tokens"]
    return (c if math.isfinite(c) else math.inf), card.id


def _kind(card: Card) -> str:
    outcome, (low, high) = card.outcome, card.facts["interval"]
    if outcome is None:
        return "awaited"
    return "inside" if low <= outcome["loss"] <= high else "outside"


def _error(card: Card) -> float:
    outcome = card.outcome
    return 100 * (outcome["loss"] / card.facts["loss"] - 1) if outcome else 0.0


def _told(card: Card) -> str:
    f, outcome = card.facts, card.outcome
    low, high = f["interval"]
    came = f"came out {outcome['loss']:.5g} ({_error(card):+.2f} %)" if outcome else "awaited"
    return (
        f"<b>{wrapped(f['target']['run'])}</b><br>foretold {f['loss']:.5g}<br>{f['level']:.0%}: "
        f"{low:.5g} to {high:.5g}<br>{came}<br>{f['target']['beyond']:.3g} times the dearest run "
        f"then<br>card {card.id}, {f['time']}"
    )


def basin(found: Sequence[Cross], what: str, shades: Mapping[float, str]) -> go.Figure:
    """what: "learning rate" or "batch". The smallest size of a stage has a solid line, others
    dashes; runs that no parabola goes through are joined to it by thin straight lines."""
    every = np.concatenate([c.values / c.best for c in found])
    highest = max(100 * float(c.rise[np.isfinite(c.rise)].max()) for c in found)
    top = max(highest, _HALF) * _ABOVE
    title = f"{what} over the best"
    figure = style.axes(title, "loss above the least of its cross (%)",
                          {**style.logarithmic(every), **_multiples(every)},
                          {"zeroline": True, "zerolinecolor": style.FAINT,
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
        told, there = _told_of(c, what), np.isfinite(c.losses)
        edge = np.zeros(len(c.values), dtype=bool)
        edge[c.found] = not c.inside
        x, y = c.values / c.best, np.where(there, 100 * c.rise, top)
        for which, shape in ((there, "circle"), (~there, "x")):
            text = [t for t, w in zip(told, which, strict=True) if w]
            if text:
                colours = [colour] * len(text)
                runs = x[which], y[which], colours, edge[which], text
                figure.add_trace(style.dots(*runs, shape))
    return figure


def _multiples(every: Array) -> dict[str, object]:
    """Ticks at powers of two: crosses step by them."""
    low, high = math.floor(np.log2(every.min())), math.ceil(np.log2(every.max()))
    step = max(1, round((high - low) / 7))
    powers = [p for p in range(low, high + 1) if p % step == 0]
    words = [f"{2**p}" if p >= 0 else f"1/{2**-p}" for p in powers]
    reach = [math.log10(every.min() / 1.25), math.log10(every.max() * 1.25)]
    return {"tickvals": [2.0**p for p in powers], "ticktext": words, "range": reach, "minor": {}}


def _dashes(found: Sequence[Cross]) -> list[str]:
    """By size within its stage."""
    sizes = {c.stage: sorted({o.parameters for o in found if o.stage == c.stage}) for c in found}
    return [_LINES[sizes[c.stage].index(c.parameters) % len(_LINES)] for c in found]


def _told_of(c: Cross, what: str) -> list[str]:
    lines = [f"<b>{wrapped(c.cell)}</b>", f"stage {c.stage}", f"N {c.parameters:,.0f}"]
    found = []
    for i, (value, loss) in enumerate(zip(c.values, c.losses, strict=True)):
        own = f"loss {loss:.5g}" if math.isfinite(loss) else "diverged"
        edge = [wrapped("The best of them, at their edge: no optimum.")]
        more = edge if i == c.found and not c.inside else []
        found.append("<br>".join([*lines, f"{what} {value:.4g}", own, *more]))
    return found


def repeats(table: pd.DataFrame, levels: Sequence[Level]) -> go.Figure:
    """Of cells with other seeds: log loss above the mean of all runs of the cell, in %."""
    labels = [f"{_short(level.cell)}, {_flops(level.flops)}" for level in levels]
    figure = style.axes("cell, and C of a run (FLOPs)", "loss above the mean of its repeats (%)",
                          style.ordinal(labels), {"zeroline": True, "zerolinecolor":
                                                    style.FAINT}, 340)  # fmt: skip
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
                told = [f"<b>{wrapped(str(n))}</b><br>{kind}<br>loss {x:.5g}"
                        for n, x in zip(names, losses, strict=True)]  # fmt: skip
                x = np.full(int(which.sum()), i + shift)
                hollow = np.zeros(len(x), dtype=bool)
                colours = [colour] * len(x)
                figure.add_trace(style.dots(x, y[which], colours, hollow, told, shape))
    return figure


_SERIES = {
    "the cell itself": (0.0, "circle", INK),
    "other weights": (-_DODGE, "square", WEIGHTS),
    "other data": (_DODGE, "diamond", DATA),
    "other seeds": (2 * _DODGE, "triangle-up", INK),
}


def _seeds(own: pd.DataFrame) -> Array:
    """What of each run is new, (n,) of words of _SERIES."""
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


def hours(stages: Sequence[Stage]) -> go.Figure:
    """Where the wall clock of each stage's runs went, in % of it."""
    names = [f"stage {s.number}" for s in stages]
    height = _AROUND + 34 * len(stages)
    figure = style.axes("share of the wall clock (%)", "", {"range": [0, 100]},
                          style.ordinal(names, True), height)  # fmt: skip
    figure.update_layout(barmode="stack", bargap=0.35)
    for bucket in buckets_of(stages):
        shares = [100 * s.seconds.get(bucket, 0.0) / sum(s.seconds.values()) for s in stages]
        told = [
            f"<b>{name}</b><br>{wrapped(bucket)}<br>{share:.1f} %, "
            f"{s.seconds.get(bucket, 0.0) / 3600:.3g} h"
            for name, share, s in zip(names, shares, stages, strict=True)
        ]
        figure.add_trace(style.bars(shares, hue(bucket), told))
    return figure


def buckets_of(stages: Sequence[Stage]) -> list[str]:
    """Those that any time went into, in the order of the bars."""
    found = {b for s in stages for b, seconds in s.seconds.items() if seconds}
    return [b for b in (*BUCKETS, *sorted(found - BUCKETS.keys())) if b in found]


def hue(bucket: str) -> str:
    return HUES.get(bucket, INK)


def _short(name: str) -> str:
    half = _NAME // 2
    return name if len(name) <= _NAME else f"{name[: half - 1]}…{name[-half:]}"


def _flops(value: float) -> str:
    mantissa, power = f"{value:.2e}".split("e")
    return f"{mantissa}e{int(power)}"
