"""The pictures of a study's fit, each a plotly figure, or the sentence that says why there is none.

    budgets   one colour each, the dearer the darker; without budgets all runs have one colour
    hollow    what was not used: a refused budget, a run that the law is not fitted to
    star      the target; grey bands are of the law, the interval's own colour is the target's

Invariant: what is drawn are the StudyFit's numbers and what its law says at a grid of points,
nothing is smoothed or left out; names reach plotly escaped, for it reads text as markup.
"""

from functools import cached_property
from typing import TypeAlias

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from forescale.errors import UserError
from forescale.scaling.analysis.answer import Foretold, StudyFit
from forescale.scaling.fitting import laws
from forescale.scaling.fitting.backtest import spent
from forescale.scaling.fitting.isoflop import IsoFlop
from forescale.scaling.fitting.points import Array
from forescale.scaling.report import style
from forescale.scaling.report.style import axes, logarithmic, wrapped

_GRID, _FINE = 61, 72
_AHEAD = 10.0  # times the dearest run: so far the law is drawn where no target is further
_UNREPEATED = 1e30  # unique tokens: as many as are ever read

Picture: TypeAlias = go.Figure | str


class Figures:
    """Of one study. Each method is a figure or a sentence. size, cost, unit: how N, C and the loss
    are counted, for the axes."""

    def __init__(self, made: StudyFit, size: str, cost: str, unit: str):
        self.made, self.iso = made, made.isoflop
        self.n = f"N (parameters, {size})"
        self.c, self.d = f"C (FLOPs, {cost})", "D (tokens)"
        self.loss = f"loss ({unit})"
        try:
            self.foretold: Foretold | str | None = made.foretold()
        except UserError as e:
            self.foretold = str(e)
        every = made.every
        self.spent: Array | None = None
        if every.flops is not None or (every.parameters is not None and every.tokens is not None):
            self.spent = spent(every)
        self.fitted = _predicted(made)

    @cached_property
    def shades(self) -> dict[float, str]:
        """The colour of each budget."""
        if "budget" not in self.made.table:
            return {}
        return style.shades(self.made.table["budget"].to_numpy())

    @cached_property
    def _colours(self) -> Array:
        """Of each run, (n,)."""
        if not self.shades:
            return np.full(len(self.made.every), sample_colorscale("Viridis", [0.35])[0])
        return np.array([self.shades[float(b)] for b in self.made.table["budget"]])

    @cached_property
    def _refused(self) -> dict[float, str]:
        if isinstance(self.iso, str):
            return dict.fromkeys(self.shades, "no budget has a parabola of use")
        return {r.budget: r.why for r in self.iso.refusals} if self.iso else {}

    @cached_property
    def _told(self) -> list[str]:
        """Of each run, for the pointer."""
        made = self.made
        names = made.table.get("name", made.table.index)
        found = []
        for i, name in enumerate(names):
            label = str(name) if "name" in made.table else f"run {name}"
            lines = [f"<b>{wrapped(label)}</b>"]
            for symbol, x in (("N", made.every.parameters), ("D", made.every.tokens),
                              ("C", self.spent), ("loss", made.every.loss)):  # fmt: skip
                if x is not None:
                    lines.append(f"{symbol} {x[i]:.5g}")
            if not made.near[i]:
                lines.append(wrapped(f"The law is not fitted to it: more than {made.job.near:.0%} "
                                      "above the least loss of its budget."))  # fmt: skip
            found.append("<br>".join(lines))
        return found

    def _runs(self, x: Array, y: Array, more: list[str] | None = None, hollow: Array | None = None):
        """A trace of all runs."""
        empty = ~self.made.near if hollow is None else hollow
        text = self._told
        if more is not None:
            text = [f"{t}<br>{m}" if m else t for t, m in zip(text, more, strict=True)]
        return style.dots(x, y, self._colours, empty, text)

    @cached_property
    def grid(self) -> Array:
        """C, from the cheapest run to the target, or some way beyond the dearest run."""
        assert self.spent is not None
        most = float(self.spent.max()) * _AHEAD
        if isinstance(f := self.foretold, Foretold):
            most = max(most, f.beyond * self.made.sure.greatest)
        return np.geomspace(float(self.spent.min()), most, _GRID)

    @cached_property
    def frontier(self) -> dict[str, tuple[Array, Array]] | str:
        """By "parameters", "tokens" and "loss", the best for each C of the grid by the law, (m,),
        and its interval by the resampled fits, (2, m)."""
        made = self.made
        if self.spent is None:
            return "The runs have neither C nor both N and D."
        ways = []
        for values in (made.fit.vector[None], made.replicates.values):
            try:
                columns = self._best(values, self.grid)
            except UserError as e:
                return str(e)
            ways.append(columns | {"loss": made.form.predict(values, **columns)})
        one, many = ways
        wanted = [name for name in ("parameters", "tokens", "loss") if name in one]
        return {name: (one[name][0], self._band(many[name])) for name in wanted}

    def _best(self, values: Array, flops: Array) -> dict[str, Array]:
        """What the law of published parameters (..., p) reads of the best run for each C."""
        form = self.made.form
        if form.columns == ("flops",):
            return {"flops": flops}
        asked = {"unique_tokens": _UNREPEATED} if "unique_tokens" in form.columns else {}
        n, d = laws.compute_optimal(form, values, flops, self.made.per_token(), **asked)
        unique = {name: np.full_like(n, u) for name, u in asked.items()}
        return {"parameters": n, "tokens": d, **unique}

    def _band(self, values: Array) -> Array:
        tail = 50 * (1 - self.made.job.level)
        return np.percentile(values, [tail, 100 - tail], axis=0)

    def isoflop(self) -> Picture:
        """Loss over N of each budget."""
        made, table = self.made, self.made.table
        if "budget" not in table:
            return "The table has no budgets, so no runs of one compute to draw a parabola through."
        if (n := made.every.parameters) is None:
            return "The table has no N to draw the loss of a budget over."
        figure = axes(self.n, self.loss, logarithmic(n), {})
        budgets = table["budget"].to_numpy(dtype=float)
        if isinstance(self.iso, IsoFlop):
            whole = [b for b in self.shades if b not in self._refused]
            for budget, v in zip(whole, self.iso.vertices, strict=True):
                of = n[budgets == budget]
                x = np.geomspace(of.min(), of.max(), _FINE)
                y = v.floor + v.bend * np.log(x / v.parameters) ** 2
                figure.add_trace(style.line(x, y, self.shades[budget]))
        whys = {b: wrapped(f"No parabola: {w}") for b, w in self._refused.items()}
        why = [whys.get(float(b), "") for b in budgets]
        hollow = ~made.near | np.isin(budgets, list(self._refused))
        figure.add_trace(self._runs(n, made.every.loss, why, hollow))
        if isinstance(self.iso, IsoFlop):
            told = [
                f"<b>{v.budget:.3g} FLOPs</b><br>N* {v.parameters:.5g}<br>D* {v.tokens:.5g}<br>"
                f"loss {v.floor:.5g}<br>{v.runs} runs"
                for v in self.iso.vertices
            ]
            at = [v.parameters for v in self.iso.vertices], [v.floor for v in self.iso.vertices]
            figure.add_trace(style.marks(*at, told))
        return figure

    def optimum(self, which: str) -> Picture:
        """N* or D* over C. which: "parameters" or "tokens"."""
        symbol = {"parameters": "N", "tokens": "D"}[which]
        label = {"parameters": self.n, "tokens": self.d}[which].replace(symbol, f"{symbol}*", 1)
        frontier = self.frontier
        known = None if isinstance(frontier, str) else frontier.get(which)
        if known is None and not isinstance(self.iso, IsoFlop):
            law = frontier if isinstance(frontier, str) else f"This law knows no {symbol}."
            return f"{self.iso or 'The table has no budgets.'} {law}"
        laws_of = [known[0]] if known else []
        if isinstance(self.iso, IsoFlop):
            laws_of.append(getattr(self.iso, which)(self.grid))
        of_c = logarithmic(self.grid, power=True)
        figure = axes(self.c, label, of_c, logarithmic(*laws_of))
        if known is not None:
            value, band = known
            figure.add_trace(style.band(self.grid, band, style.BAND))
            told = [f"by the law<br>C {c:.4g}<br>{symbol}* {x:.4g}" for c, x in
                    zip(self.grid, value, strict=True)]  # fmt: skip
            figure.add_trace(style.line(self.grid, value, style.INK, text=told))
        if isinstance(self.iso, IsoFlop):
            law_of = getattr(self.iso, which)
            band = law_of.interval(self.made.job.level, self.grid)
            if np.isfinite(band).all():
                figure.add_trace(style.band(self.grid, band, style.OTHER_BAND))
            figure.add_trace(style.line(self.grid, law_of(self.grid), style.OTHER, "dash"))
            told = [f"<b>{v.budget:.3g} FLOPs</b><br>{symbol}* {getattr(v, which):.5g}"
                    for v in self.iso.vertices]  # fmt: skip
            at = (
                [v.budget for v in self.iso.vertices],
                [getattr(v, which) for v in self.iso.vertices],
            )
            figure.add_trace(style.marks(*at, told))
        if isinstance(f := self.foretold, Foretold) and np.isfinite(getattr(f, which)):
            figure.add_trace(self._star(f.beyond * self.made.sure.greatest, getattr(f, which), f))
        return figure

    def loss_by_compute(self) -> Picture:
        if isinstance(frontier := self.frontier, str):
            return frontier
        assert self.spent is not None
        of_c = logarithmic(self.grid, power=True)
        made, figure = self.made, axes(self.c, self.loss, of_c, {"type": "log"})
        value, band = frontier["loss"]
        on = np.append(self.made.sure.greatest, self.grid[self.grid > self.made.sure.greatest])
        at = self._best(made.fit.vector, on)
        for level, colour in ((made.job.level, style.WIDE), (0.5, style.NARROW)):
            figure.add_trace(
                style.band(on, np.stack(self.made.sure.interval(at, on, level)), colour)
            )
        figure.add_trace(style.band(self.grid, band, style.BAND))
        told = [f"L*({c:.4g}) = {x:.5g}" for c, x in zip(self.grid, value, strict=True)]
        figure.add_trace(style.line(self.grid, value, style.INK, text=told))
        figure.add_trace(self._runs(self.spent, made.every.loss))
        if isinstance(f := self.foretold, Foretold):
            figure.add_trace(self._star(f.beyond * self.made.sure.greatest, f.loss, f, f.outer))
        return figure

    def contours(self) -> Picture:
        """L(N, D)."""
        made, n, d = self.made, self.made.every.parameters, self.made.every.tokens
        if not {"parameters", "tokens"} <= set(made.form.columns) or n is None or d is None:
            return f"The law ({made.form.name}) doesn't know N and D, so it has no such surface."
        ends = [[n.min(), n.max()], [d.min(), d.max()]]
        if isinstance(f := self.foretold, Foretold):
            for end, value in zip(ends, (f.parameters, f.tokens), strict=True):
                end[:] = min(end[0], value), max(end[1], value)
        x, y = (np.geomspace(low / 1.6, high * 1.6, _GRID) for low, high in ends)
        at = {"parameters": np.tile(x, _GRID), "tokens": np.repeat(y, _GRID)}
        if "unique_tokens" in made.form.columns:
            at["unique_tokens"] = at["tokens"]
        z = made.fit.predict(**at).reshape(_GRID, _GRID)
        figure = axes(self.n, self.d, logarithmic(x), logarithmic(y))
        low, high = float(z.min()), max(float(made.every.loss.max()), float(np.median(z)))
        step = _nice((high - low) / 14)
        levels = {"start": np.ceil(low / step) * step, "end": high, "size": step}
        drawn = {
            "coloring": "lines",
            "showlabels": True,
            "labelfont": {"size": 11, "color": style.INK},
        }
        figure.add_contour(
            x=x, y=y, z=z, contours=levels | drawn, line={"width": 1}, showscale=False,
            colorscale=[[0, style.FAINT], [1, style.FAINT]],
            hovertemplate="N %{x:.4g}<br>D %{y:.4g}<br>L(N, D) %{z:.5g}<extra></extra>",
        )  # fmt: skip
        if not isinstance(frontier := self.frontier, str):
            best = frontier["parameters"][0], frontier["tokens"][0]
            figure.add_trace(style.line(*best, style.INK, "dash"))
            figure.update_xaxes(range=np.log10(x[[0, -1]]).tolist())
            figure.update_yaxes(range=np.log10(y[[0, -1]]).tolist())
        figure.add_trace(self._runs(n, d))
        if isinstance(f, Foretold):
            figure.add_trace(self._star(f.parameters, f.tokens, f))
        return figure

    def residuals(self, over: str) -> Picture:
        """over: "flops" or "parameters"."""
        x = self.spent if over == "flops" else self.made.every.parameters
        if x is None:
            return f"The runs have no {'C' if over == 'flops' else 'N'} to draw them over."
        label = self.c if over == "flops" else self.n
        figure = axes(
            label,
            "residual of log loss (%)",
            logarithmic(x, power=over == "flops"),
            {"zeroline": True},
        )
        percent = 100 * np.log(self.made.every.loss / self.fitted)
        figure.add_trace(self._runs(x, percent, [f"residual {p:+.3f} %" for p in percent]))
        return figure

    def fan(self) -> Picture:
        """How the law met dearer runs than it was fitted to, by how much dearer they were."""
        made = self.made
        if not made.roll_outs:
            lacks = "budgets" if "budget" not in made.table else "enough budgets (four or more)"
            return f"The table has no {lacks} to foretell the dearer ones from the cheaper ones."
        x = np.geomspace(1, max(r.factors.max() for r in made.roll_outs) * 1.1, _GRID)
        figure = axes(
            "compute beyond the fitted runs (times)",
            "observed loss over foretold loss (%)",
            logarithmic(x),
            {"zeroline": True},
        )
        for level, colour in ((made.job.level, style.WIDE), (0.5, style.NARROW)):
            figure.add_trace(style.band(x, 100 * (self._along(x, level) - 1), colour))
        rows = np.flatnonzero(made.near)
        budgets = made.table["budget"].to_numpy(dtype=float)[rows]
        distinct = np.unique(budgets)
        for r in made.roll_outs:
            later = rows[budgets > distinct[r.budgets - 1]]
            seen = 100 * np.expm1(-r.errors)
            told = [
                f"{self._told[i]}<br>foretold {made.every.loss[i] * np.exp(e):.5g} from {r.runs} "
                f"runs of {r.budgets} budgets<br>{'inside' if c else 'outside'} of the interval "
                f"calibrated then,<br>{'inside' if b else 'outside'} of that of resampling alone"
                for i, e, b, c in zip(later, r.errors, r.bare, r.calibrated, strict=True)
            ]
            shade = np.full(len(later), self.shades[float(distinct[r.budgets - 1])])
            figure.add_trace(style.dots(r.factors, seen, shade, ~r.calibrated, told))
        return figure

    def _along(self, factors: Array, level: float) -> Array:
        """The law's interval of today over what it says, along its best runs, so many times beyond
        its dearest run: (2, m)."""
        flops = factors * self.made.sure.greatest
        at = self._best(self.made.fit.vector, flops)
        return np.stack(self.made.sure.interval(at, flops, level)) / self.made.fit.predict(**at)

    def _star(self, x: float, y: float, f: Foretold, ends: tuple[float, float] | None = None):
        level = f"{self.made.job.level:.0%}"
        told = (
            f"<b>target</b><br>N {f.parameters:.4g}<br>D {f.tokens:.4g}<br>loss {f.loss:.5g}"
            f"<br>50%: {f.inner[0]:.5g} to {f.inner[1]:.5g}"
            f"<br>{level}: {f.outer[0]:.5g} to {f.outer[1]:.5g}"
        )
        return style.star(x, y, told, ends)


def _predicted(made: StudyFit) -> Array:
    """What the law says of every run, of those that it isn't fitted to as well."""
    every = made.every
    return made.fit.predict(**{c: np.exp(every.log(c)) for c in made.form.columns})


def _nice(step: float) -> float:
    """Down to 1, 2 or 5 times a power of ten."""
    power = 10.0 ** np.floor(np.log10(step))
    return float(max(m for m in (1, 2, 5) if m * power <= step * (1 + 1e-9)) * power)
