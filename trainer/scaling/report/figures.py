"""The figures of a fit: each a plotly figure, or a sentence that says why there is none.

    budgets   one colour each, darker if more expensive; without budgets all runs have one colour
    hollow    not used: a rejected budget, or a run that the law is not fitted to
    star      the target; grey bands belong to the law, orange ones are prediction intervals

Invariant: figures show the numbers of the StudyFit and its law on a grid of points; nothing is
smoothed or left out. Names reach plotly escaped, since it reads text as markup.
"""

from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from forescale.errors import UserError
from forescale.monitor.report import colours
from forescale.scaling.analysis import backtest
from forescale.scaling.analysis.table_fit import Prediction, StudyFit
from forescale.scaling.fitting import laws
from forescale.scaling.fitting.isoflop import IsoFlop
from forescale.scaling.fitting.points import Array, spent
from forescale.scaling.report import style
from forescale.scaling.report.style import axes, logarithmic, wrapped

_GRID, _FINE = 61, 72
_AHEAD = 10.0  # the law is drawn to this multiple of the most expensive run, or to the target
_UNREPEATED = 1e30  # unique tokens, so many that none is repeated

Picture: TypeAlias = go.Figure | str


class Figures:
    """The figures of one fit. size, cost, unit: how N, C and the loss are counted, for the axes."""

    def __init__(self, made: StudyFit, size: str, cost: str, unit: str):
        self.made, self.iso = made, made.isoflop
        self.n = f"N (parameters, {size})"
        self.c, self.d = f"C (FLOPs, {cost})", "D (tokens)"
        self.loss = f"loss ({unit})"
        try:
            self.prediction: Prediction | str | None = made.predict()
        except UserError as e:
            self.prediction = str(e)
        every = made.all_points
        self.compute: Array | None = None
        if every.flops is not None or (every.parameters is not None and every.tokens is not None):
            self.compute = spent(every)
        self.fitted = _predicted(made)

    @cached_property
    def shades(self) -> dict[float, str]:
        """The colour of each budget."""
        if "budget" not in self.made.table:
            return {}
        return style.shades(self.made.table["budget"].to_numpy())

    @cached_property
    def _colours(self) -> Array:
        """The colour of each run, (n,)."""
        if not self.shades:
            return np.full(len(self.made.all_points), sample_colorscale("Viridis", [0.35])[0])
        return np.array([self.shades[float(b)] for b in self.made.table["budget"]])

    @cached_property
    def _refused(self) -> dict[float, str]:
        if isinstance(self.iso, str):
            return dict.fromkeys(self.shades, "no budget has a usable parabola")
        return {r.budget: r.why for r in self.iso.refusals} if self.iso else {}

    @cached_property
    def _hover_text(self) -> list[str]:
        """The text shown when hovering over each run."""
        made = self.made
        names = made.table.get("name", made.table.index)
        found = []
        for i, name in enumerate(names):
            label = str(name) if "name" in made.table else f"run {name}"
            lines = [f"<b>{wrapped(label)}</b>"]
            for symbol, x in (("N", made.all_points.parameters), ("D", made.all_points.tokens),
                              ("C", self.compute), ("loss", made.all_points.loss)):  # fmt: skip
                if x is not None:
                    lines.append(f"{symbol} {x[i]:.5g}")
            if not made.is_fitted[i]:
                why = f"more than {made.job.near:.0%} above the lowest loss of its budget"
                lines.append(wrapped(f"The law is not fitted to it: {why}."))
            found.append("<br>".join(lines))
        return found

    def _runs(self, x: Array, y: Array, more: list[str] | None = None, hollow: Array | None = None):
        """A trace with a dot for each run; hollow: (n,), by default those not fitted."""
        empty = ~self.made.is_fitted if hollow is None else hollow
        text = self._hover_text
        if more is not None:
            text = [f"{t}<br>{m}" if m else t for t, m in zip(text, more, strict=True)]
        return style.dots(x, y, self._colours, empty, text)

    @cached_property
    def grid(self) -> Array:
        """C from the cheapest run to the target, at least to _AHEAD times the most expensive
        run."""
        assert self.compute is not None
        most = float(self.compute.max()) * _AHEAD
        if isinstance(f := self.prediction, Prediction):
            most = max(most, f.extrapolation_factor * self.made.calibrated.greatest)
        return np.geomspace(float(self.compute.min()), most, _GRID)

    @cached_property
    def frontier(self) -> dict[str, tuple[Array, Array]] | str:
        """The best "parameters", "tokens" and "loss" for each C of the grid by the law, (m,), and
        the interval from the resampled fits, (2, m)."""
        made = self.made
        if self.compute is None:
            return "The runs have neither C nor both N and D."
        ways = []
        for values in (made.fit.vector[None], made.replicates.values):
            try:
                columns = self.best(values, self.grid)
            except UserError as e:
                return str(e)
            ways.append(columns | {"loss": made.form.predict(values, **columns)})
        one, many = ways
        wanted = [name for name in ("parameters", "tokens", "loss") if name in one]
        return {name: (one[name][0], self._band(many[name])) for name in wanted}

    def best(self, values: Array, flops: Array) -> dict[str, Array]:
        """The columns that the law reads, for the best run of each C. values: (..., p),
        parameters."""
        form = self.made.form
        if form.columns == ("flops",):
            return {"flops": flops}
        fixed = self._held
        n, d = laws.compute_optimal(form, values, flops, self.made.per_token(), **fixed)
        rest = {name: np.full_like(n, value) for name, value in fixed.items()}
        return {"parameters": n, "tokens": d, **rest}

    @cached_property
    def _held(self) -> dict[str, float]:
        """The columns that the law reads beside N and D, at one value: the target's expansion, or
        that of most runs."""
        made, found = self.made, dict[str, float]()
        if "unique_tokens" in made.form.columns:
            found["unique_tokens"] = _UNREPEATED
        if "expansion" in made.form.columns and made.points.expansion is not None:
            values, counts = np.unique(made.points.expansion, return_counts=True)
            found["expansion"] = made.job.target.expansion or float(values[counts.argmax()])
        return found

    def _band(self, values: Array) -> Array:
        tail = 50 * (1 - self.made.job.level)
        return np.percentile(values, [tail, 100 - tail], axis=0)

    def isoflop(self) -> Picture:
        """Loss over N, for each budget."""
        made, table = self.made, self.made.table
        if "budget" not in table:
            return (
                "The table has no budgets, so no parabola can be fitted to runs of equal compute."
            )
        if (n := made.all_points.parameters) is None:
            return "The table has no N."
        budgets = table["budget"].to_numpy(dtype=float)
        figure = axes(self.n, self.loss, logarithmic(n), self._of_loss())
        if isinstance(self.iso, IsoFlop):
            usable = [b for b in self.shades if b not in self._refused]
            for budget, v in zip(usable, self.iso.vertices, strict=True):
                x = np.geomspace(*v.sizes, _FINE)
                y = v.floor + v.bend * np.log(x / v.parameters) ** 2
                figure.add_trace(style.line(x, y, self.shades[budget]))
        whys = {b: wrapped(f"No parabola: {w}") for b, w in self._refused.items()}
        why = [whys.get(float(b), "") for b in budgets]
        hollow = ~made.is_fitted | np.isin(budgets, list(self._refused))
        figure.add_trace(self._runs(n, made.all_points.loss, why, hollow))
        if isinstance(self.iso, IsoFlop):
            text = [
                f"<b>{v.budget:.3g} FLOPs</b><br>N* {v.parameters:.5g}<br>D* {v.tokens:.5g}<br>"
                f"loss {v.floor:.5g}<br>{v.runs} runs"
                for v in self.iso.vertices
            ]
            at = [v.parameters for v in self.iso.vertices], [v.floor for v in self.iso.vertices]
            figure.add_trace(style.marks(*at, text, "minimum of a parabola"))
        return figure

    def _of_loss(self) -> dict[str, Any]:
        """The axis of the losses, clipped above the minima where the runs share budgets."""
        made, y = self.made, self.made.all_points.loss
        if not self.shades:
            return {"type": "log"}
        budgets = made.table["budget"].to_numpy(dtype=float)
        return style.clipped(y, np.array([y[budgets == b].min() for b in self.shades]))

    def above(self) -> str:
        """A sentence about the runs above the axis of the losses; empty if all are on it."""
        top = 10 ** self._of_loss().get("range", (0, np.inf))[1]
        count = int((self.made.all_points.loss > top).sum())
        return f" {count} runs with a loss above {top:.4g} are not shown." if count else ""

    def optimum(self, which: str) -> Picture:
        """N* or D* over C. which: "parameters" or "tokens"."""
        symbol = {"parameters": "N", "tokens": "D"}[which]
        label = {"parameters": self.n, "tokens": self.d}[which].replace(symbol, f"{symbol}*", 1)
        frontier = self.frontier
        known = None if isinstance(frontier, str) else frontier.get(which)
        if known is None and not isinstance(self.iso, IsoFlop):
            law = frontier if isinstance(frontier, str) else f"This law has no {symbol}."
            return f"{self.iso or 'The table has no budgets.'} {law}"
        laws_of = [known[0]] if known else []
        if isinstance(self.iso, IsoFlop):
            laws_of.append(getattr(self.iso, which)(self.grid))
        of_c = logarithmic(self.grid, power=True)
        figure = axes(self.c, label, of_c, logarithmic(*laws_of))
        if known is not None:
            value, band = known
            figure.add_trace(style.band(self.grid, band, style.BAND))
            text = [f"by the law<br>C {c:.4g}<br>{symbol}* {x:.4g}" for c, x in
                    zip(self.grid, value, strict=True)]  # fmt: skip
            figure.add_trace(style.line(self.grid, value, colours.INK, text=text, name="law"))
        if isinstance(self.iso, IsoFlop):
            law_of = getattr(self.iso, which)
            band = law_of.interval(self.made.job.level, self.grid)
            if np.isfinite(band).all():
                figure.add_trace(style.band(self.grid, band, style.OTHER_BAND))
            figure.add_trace(
                style.line(
                    self.grid, law_of(self.grid), colours.OTHER, "dash", name="line of the minima"
                )
            )
            text = [f"<b>{v.budget:.3g} FLOPs</b><br>{symbol}* {getattr(v, which):.5g}"
                    for v in self.iso.vertices]  # fmt: skip
            at = (
                [v.budget for v in self.iso.vertices],
                [getattr(v, which) for v in self.iso.vertices],
            )
            figure.add_trace(style.marks(*at, text, "minimum of a parabola"))
        if isinstance(f := self.prediction, Prediction) and np.isfinite(getattr(f, which)):
            flops = f.extrapolation_factor * self.made.calibrated.greatest
            figure.add_trace(self._star(flops, getattr(f, which), f))
        return figure

    def loss_by_compute(self) -> Picture:
        """Loss over C, with the prediction intervals beyond the runs."""
        if isinstance(frontier := self.frontier, str):
            return frontier
        assert self.compute is not None
        of_c = logarithmic(self.grid, power=True)
        made = self.made
        figure = axes(self.c, self.loss, of_c, {"type": "log"})
        value, band = frontier["loss"]
        greatest = made.calibrated.greatest
        on = np.append(greatest, self.grid[self.grid > greatest])
        at = self.best(made.fit.vector, on)
        ahead = made.predicted(at, on)
        for level, colour in ((made.job.level, style.WIDE), (0.5, style.NARROW)):
            ends = ahead.interval(level)
            figure.add_trace(style.band(on, ends, colour, f"{level:.0%} prediction"))
        figure.add_trace(style.line(on, ahead.loss, colours.TARGET, "dot", name="predicted"))
        figure.add_trace(style.band(self.grid, band, style.BAND))
        text = [f"L*({c:.4g}) = {x:.5g}" for c, x in zip(self.grid, value, strict=True)]
        figure.add_trace(style.line(self.grid, value, colours.INK, text=text, name="law"))
        figure.add_trace(self._runs(self.compute, made.all_points.loss))
        if isinstance(f := self.prediction, Prediction):
            flops = f.extrapolation_factor * made.calibrated.greatest
            figure.add_trace(self._star(flops, f.loss, f, f.outer))
        return figure

    def contours(self) -> Picture:
        """Contours of L(N, D)."""
        made, n, d = self.made, self.made.all_points.parameters, self.made.all_points.tokens
        if not {"parameters", "tokens"} <= set(made.form.columns) or n is None or d is None:
            return f"The law ({made.form.name}) doesn't depend on both N and D."
        ends = [[n.min(), n.max()], [d.min(), d.max()]]
        if isinstance(f := self.prediction, Prediction):
            for end, value in zip(ends, (f.parameters, f.tokens), strict=True):
                end[:] = min(end[0], value), max(end[1], value)
        x, y = (np.geomspace(low / 1.6, high * 1.6, _GRID) for low, high in ends)
        at = {"parameters": np.tile(x, _GRID), "tokens": np.repeat(y, _GRID)}
        at |= {name: np.full(_GRID**2, value) for name, value in self._held.items()}
        z = made.fit.predict(**at).reshape(_GRID, _GRID)
        figure = axes(self.n, self.d, logarithmic(x), logarithmic(y))
        low, high = float(z.min()), max(float(made.all_points.loss.max()), float(np.median(z)))
        step = _nice((high - low) / 14)
        levels = {"start": np.ceil(low / step) * step, "end": high, "size": step}
        drawn = {
            "coloring": "lines",
            "showlabels": True,
            "labelfont": {"size": 11, "color": colours.INK},
        }
        figure.add_contour(
            x=x, y=y, z=z, contours=levels | drawn, line={"width": 1}, showscale=False,
            colorscale=[[0, colours.FAINT], [1, colours.FAINT]],
            hovertemplate="N %{x:.4g}<br>D %{y:.4g}<br>L(N, D) %{z:.5g}<extra></extra>",
        )  # fmt: skip
        if not isinstance(frontier := self.frontier, str):
            best = frontier["parameters"][0], frontier["tokens"][0]
            figure.add_trace(style.line(*best, colours.INK, "dash"))
            figure.update_xaxes(range=np.log10(x[[0, -1]]).tolist())
            figure.update_yaxes(range=np.log10(y[[0, -1]]).tolist())
        figure.add_trace(self._runs(n, d))
        if isinstance(f, Prediction):
            figure.add_trace(self._star(f.parameters, f.tokens, f))
        return figure

    def residuals(self, over: str) -> Picture:
        """Residuals over C or N. over: "flops" or "parameters"."""
        x = self.compute if over == "flops" else self.made.all_points.parameters
        if x is None:
            return f"The runs have no {'C' if over == 'flops' else 'N'}."
        label = self.c if over == "flops" else self.n
        figure = axes(
            label,
            "residual of log loss (%)",
            logarithmic(x, power=over == "flops"),
            {"zeroline": True},
        )
        percent = 100 * np.log(self.made.all_points.loss / self.fitted)
        figure.add_trace(self._runs(x, percent, [f"residual {p:+.3f} %" for p in percent]))
        return figure

    def backtests(self) -> Picture:
        """Errors of the predictions that the fit's method would have made at earlier origins."""
        made = self.made
        if made.earlier is None:
            has = "no budgets" if "budget" not in made.table else "fewer than four budgets"
            return f"The table has {has}, so cheap ones can't predict more expensive ones."
        rows = made.earlier[made.earlier["method"] == made.method]
        rows = rows[rows["group"] != backtest.MINIMA]
        x = np.geomspace(1, rows["beyond"].max() * 1.1, _GRID)
        figure = axes(
            "compute, relative to the largest known budget",
            "observed loss relative to predicted loss (%)",
            logarithmic(x),
            {"zeroline": True},
        )
        for level, colour in ((backtest.OUTER, style.WIDE), (backtest.INNER, style.NARROW)):
            ends = 100 * (self._along(x, level) - 1)
            figure.add_trace(style.band(x, ends, colour, f"today's {level:.0%} interval"))
        shades = list(self.shades.values())
        for origin, own in rows.groupby("origin"):
            outside = (own["error"].abs() > own["outer"]).to_numpy()
            text = [
                f"predicted {y * np.exp(e):.5g} from {origin} budgets<br>observed {y:.5g}<br>"
                f"{'outside' if out else 'inside'} the 90% interval"
                for y, e, out in zip(own["observed"], own["error"], outside, strict=True)
            ]
            shade = np.full(len(own), shades[int(origin) - 1])
            seen = 100 * np.expm1(-own["error"].to_numpy())
            figure.add_trace(style.dots(own["beyond"].to_numpy(), seen, shade, outside, text))
        return figure

    def _along(self, factors: Array, level: float) -> Array:
        """Today's interval divided by the predicted loss, (2, m), along the best runs, at these
        multiples of the most expensive run."""
        flops = factors * self.made.calibrated.greatest
        found = self.made.predicted(self.best(self.made.fit.vector, flops), flops)
        return found.interval(level) / found.loss

    def _star(self, x: float, y: float, f: Prediction, ends: tuple[float, float] | None = None):
        level = f"{self.made.job.level:.0%}"
        text = (
            f"<b>target</b><br>N {f.parameters:.4g}<br>D {f.tokens:.4g}<br>loss {f.loss:.5g}"
            f"<br>50%: {f.inner[0]:.5g} to {f.inner[1]:.5g}"
            f"<br>{level}: {f.outer[0]:.5g} to {f.outer[1]:.5g}"
        )
        return style.star(x, y, text, ends)


def _predicted(made: StudyFit) -> Array:
    """The loss by the law of every run, fitted or not."""
    every = made.all_points
    return made.fit.predict(**{c: np.exp(every.log(c)) for c in made.form.columns})


def _nice(step: float) -> float:
    """The step rounded down to 1, 2 or 5 times a power of ten."""
    power = 10.0 ** np.floor(np.log10(step))
    return float(max(m for m in (1, 2, 5) if m * power <= step * (1 + 1e-9)) * power)
