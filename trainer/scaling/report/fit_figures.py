"""The figures of a fit: each a figure, or a sentence that says why there is none.

    budgets   one colour each, darker if more expensive; without budgets all runs have one colour
    hollow    not used: a rejected budget, or a run that the law is not fitted to
    star      the target; grey bands belong to the law, orange ones are prediction intervals

Invariant: figures show the numbers of the StudyFit and its law on a grid of points; nothing is
smoothed or left out.
"""

from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from forescale.ground.errors import UserError
from forescale.pages import figure as chart
from forescale.pages.document import Cell, number
from forescale.scaling.analysis import backtest
from forescale.scaling.analysis.forecast import Forecast
from forescale.scaling.analysis.optimum import optimum
from forescale.scaling.analysis.table_fit import Prediction, StudyFit
from forescale.scaling.fitting import laws
from forescale.scaling.fitting.isoflop import IsoFlop
from forescale.scaling.fitting.points import Array, spent
from forescale.scaling.forecasting.predictor import INNER, OUTER
from forescale.scaling.report.fit_sections import no_backtests

_GRID, _FINE = 61, 72
_NEXT = 1.01  # times the most expensive run: where the forecast begins
_FIRST = 350  # pixels: the height of the picture on the first screen
_AHEAD = 10.0  # the law is drawn to this multiple of the most expensive run, or to the target
_UNREPEATED = 1e30  # unique tokens, so many that none is repeated

Picture: TypeAlias = chart.Figure | str


def flops_key(shades: dict[float, str]) -> list[tuple[Cell, str]]:
    """Return the label and colour of each budget."""
    return [(number(budget, 3) + " FLOPs" * (i == 0), c)
            for i, (budget, c) in enumerate(shades.items())]  # fmt: skip


class Figures:
    """The figures of one fit. size, cost, unit: how N, C and the loss are counted, for the axes."""

    def __init__(self, study: StudyFit, size: str, cost: str, unit: str):
        self.study, self.iso = study, study.isoflop
        self.n = f"N (parameters, {size})"
        self.c, self.d = f"C (FLOPs, {cost})", "D (tokens)"
        self.loss = f"loss ({unit})"
        try:
            self.prediction: Prediction | str | None = study.predict()
        except UserError as e:
            self.prediction = str(e)
        every = study.all_points
        self.compute: Array | None = None
        if every.flops is not None or (every.parameters is not None and every.tokens is not None):
            self.compute = spent(every)

    @cached_property
    def shades(self) -> dict[float, str]:
        """The colour of each budget."""
        if "budget" not in self.study.table:
            return {}
        return chart.shades(self.study.table["budget"].to_numpy())

    @cached_property
    def _refused(self) -> dict[float, str]:
        if isinstance(self.iso, str):
            return dict.fromkeys(self.shades, "no budget has a usable parabola")
        return {r.budget: r.why for r in self.iso.refusals} if self.iso else {}

    @cached_property
    def _texts(self) -> list[str]:
        """The text of each run."""
        study = self.study
        names = study.table.get("name", study.table.index)
        texts = []
        for i, name in enumerate(names):
            lines = [str(name) if "name" in study.table else f"run {name}"]
            for symbol, x in (("N", study.all_points.parameters), ("D", study.all_points.tokens),
                              ("C", self.compute), ("loss", study.all_points.loss)):  # fmt: skip
                if x is not None:
                    lines.append(f"{symbol} {x[i]:.5g}")
            if not study.is_fitted[i]:
                why = f"more than {study.job.near:.0%} above the lowest loss of its budget"
                lines.append(chart.wrapped(f"The law is not fitted to it: {why}."))
            texts.append("\n".join(lines))
        return texts

    def _runs(
        self, x: Array, y: Array, notes: list[str] | None = None, hollow: Array | None = None
    ):
        """Return a dot for each run. notes: more lines of its text; hollow: (n,), by default the
        runs that the law is not fitted to."""
        empty = ~self.study.is_fitted if hollow is None else hollow
        texts = self._texts
        if notes is not None:
            texts = [f"{t}\n{note}" if note else t for t, note in zip(texts, notes, strict=True)]
        return chart.dots(x, y, self._colours, texts, empty)

    @cached_property
    def _colours(self) -> list[str]:
        """The colour of each run: that of its budget."""
        if not self.shades:
            return chart.viridis([0.35]) * len(self.study.all_points)
        return [self.shades[float(b)] for b in self.study.table["budget"]]

    @cached_property
    def grid(self) -> Array:
        """C from the cheapest run to the target, at least to _AHEAD times the most expensive
        run."""
        assert self.compute is not None
        most = float(self.compute.max()) * _AHEAD
        if isinstance(f := self.prediction, Prediction):
            most = max(most, f.extrapolation_factor * self.study.calibrated.greatest)
        return np.geomspace(float(self.compute.min()), most, _GRID)

    @cached_property
    def frontier(self) -> dict[str, tuple[Array, Array]] | str:
        """The best "parameters", "tokens" and "loss" for each C of the grid by the law, (m,), and
        the interval from the resampled fits, (2, m)."""
        study = self.study
        if self.compute is None:
            return "The runs have neither C nor both N and D."
        ways = []
        for values in (study.fit.vector[None], study.replicates.values):
            try:
                columns = self.best(values, self.grid)
            except UserError as e:
                return str(e)
            ways.append(columns | {"loss": study.form.predict(values, **columns)})
        one, many = ways
        known = [name for name in ("parameters", "tokens", "loss") if name in one]
        tail = 50 * (1 - study.job.level)
        return {
            name: (one[name][0], np.percentile(many[name], [tail, 100 - tail], axis=0))
            for name in known
        }

    def best(self, values: Array, flops: Array) -> dict[str, Array]:
        """The columns that the law reads, for the best run of each C. values: (..., p),
        parameters."""
        form = self.study.form
        if form.columns == ("flops",):
            return {"flops": flops}
        fixed = self._held
        n, d = laws.compute_optimal(form, values, flops, self.study.per_token, **fixed)
        rest = {name: np.full_like(n, value) for name, value in fixed.items()}
        return {"parameters": n, "tokens": d, **rest}

    @cached_property
    def _held(self) -> dict[str, float]:
        """The columns that the law reads beside N and D, at one value: the target's, its best
        one, or that of most runs."""
        study, values_of = self.study, dict[str, float]()
        if "unique_tokens" in study.form.columns:
            values_of["unique_tokens"] = study.job.target.unique or _UNREPEATED
        at = self.prediction.settings if isinstance(self.prediction, Prediction) else {}
        for name in study.form.settings:
            values, counts = np.unique(study.points.columns([name])[name], return_counts=True)
            values_of[name] = at.get(name, float(values[counts.argmax()]))
        return values_of

    def isoflop(self) -> Picture:
        """Loss over N, for each budget."""
        study, table = self.study, self.study.table
        if "budget" not in table:
            return (
                "The table has no budgets, so no parabola can be fitted to runs of equal compute."
            )
        if (n := study.all_points.parameters) is None:
            return "The table has no N."
        budgets = table["budget"].to_numpy(dtype=float)
        figure = chart.Figure(chart.Axis(self.n, log=True), self._loss_axis())
        if isinstance(self.iso, IsoFlop):
            usable = [b for b in self.shades if b not in self._refused]
            for budget, v in zip(usable, self.iso.vertices, strict=True):
                x = np.geomspace(*v.sizes, _FINE)
                y = v.floor + v.bend * np.log(x / v.parameters) ** 2
                figure.add(chart.line(x, y, self.shades[budget]))
        whys = {b: chart.wrapped(f"No parabola: {w}") for b, w in self._refused.items()}
        why = [whys.get(float(b), "") for b in budgets]
        hollow = ~study.is_fitted | np.isin(budgets, list(self._refused))
        figure.add(self._runs(n, study.all_points.loss, why, hollow))
        self._add_vertices(figure, "parameters", "floor")
        return figure

    def _loss_axis(self) -> chart.Axis:
        """The axis of the losses, clipped above the minima where the runs share budgets."""
        study, losses = self.study, self.study.all_points.loss
        if not self.shades:
            return chart.Axis(self.loss, log=True)
        budgets = study.table["budget"].to_numpy(dtype=float)
        lowest = np.array([losses[budgets == b].min() for b in self.shades])
        return chart.clipped(self.loss, losses, lowest)

    def above(self) -> str:
        """Return a sentence about runs above the axis of the losses; empty if there are none."""
        top = (self._loss_axis().ends or (0, np.inf))[1]
        count = int((self.study.all_points.loss > top).sum())
        return f" {count} runs with a loss above {top:.4g} are beyond the edge." if count else ""

    def optimum(self, which: str) -> Picture:
        """N* or D* over C. which: "parameters" or "tokens"."""
        symbol = {"parameters": "N", "tokens": "D"}[which]
        label = {"parameters": self.n, "tokens": self.d}[which].replace(symbol, f"{symbol}*", 1)
        frontier = self.frontier
        known = None if isinstance(frontier, str) else frontier.get(which)
        if known is None and not isinstance(self.iso, IsoFlop):
            law = frontier if isinstance(frontier, str) else f"This law has no {symbol}."
            return f"{self.iso or 'The table has no budgets.'} {law}"
        figure = chart.Figure(chart.Axis(self.c, log=True, power=True), chart.Axis(label, log=True))
        if known is not None:
            value, ends = known
            figure.add(chart.band(self.grid, ends, chart.BAND))
            text = [f"by the law\nC {c:.4g}\n{symbol}* {x:.4g}" for c, x in
                    zip(self.grid, value, strict=True)]  # fmt: skip
            figure.add(chart.line(self.grid, value, chart.INK, texts=text, name="law"))
        if isinstance(self.iso, IsoFlop):
            law_of = getattr(self.iso, which)
            ends = law_of.interval(self.study.job.level, self.grid)
            if np.isfinite(ends).all():
                figure.add(chart.band(self.grid, ends, chart.OTHER_BAND))
            name = "line of the minima"
            figure.add(chart.line(self.grid, law_of(self.grid), chart.OTHER, "dash", name=name))
            self._add_vertices(figure, "budget", which)
        if isinstance(f := self.prediction, Prediction) and np.isfinite(getattr(f, which)):
            self._add_star(figure, "flops", which)
        return figure

    def loss_by_compute(self, forecast: Forecast | None = None) -> Picture:
        """The lowest loss of each budget over C, the law, and the prediction intervals beyond. The
        axes fit these, not the runs above. forecast: of the target, in place of today's."""
        if isinstance(frontier := self.frontier, str):
            return frontier
        assert self.compute is not None
        study, f, most = self.study, self.prediction, float(self.grid[-1])
        greatest = study.calibrated.greatest
        if isinstance(f, Prediction) and f.extrapolation_factor > _NEXT:
            most = f.extrapolation_factor * greatest
        on = np.geomspace(_NEXT * greatest, most, _GRID)
        ahead = study.predicted(self._optimal(on), on)
        figure = chart.Figure(
            chart.Axis(self.c, log=True, power=True), chart.Axis(self.loss, log=True), _FIRST
        )
        for level, colour in ((study.job.level, chart.WIDE), (0.5, chart.NARROW)):
            figure.add(chart.band(on, ahead.interval(level), colour, f"{level:.0%} prediction"))
        texts = [
            f"C {c:.4g}\npredicted {x:.5g}\n{study.job.level:.0%}: {low:.5g} to {high:.5g}"
            for c, x, low, high in zip(on, ahead.loss, *ahead.interval(study.job.level),
                                       strict=True)
        ]  # fmt: skip
        figure.add(chart.line(on, ahead.loss, chart.TARGET, "dot", texts=texts, name="predicted"))
        known, value = self.grid <= most, frontier["loss"][0]
        figure.add(chart.line(self.grid[known], value[known], chart.FAINT, name="law"))
        at, losses = self._lowest, study.all_points.loss
        colours, texts = ([each[i] for i in at] for each in (self._colours, self._texts))
        figure.add(chart.dots(self.compute[at], losses[at], colours, texts))
        if forecast is None or not isinstance(f, Prediction):
            self._add_star(figure, "flops", "loss")
            return figure
        facts = forecast.facts
        text = f"target\npredicted before its run: {facts['loss']:.5g}"
        figure.add(chart.star(f.flops, facts["loss"], text, tuple(facts["interval"])))
        if outcome := forecast.outcome:
            c, y = np.array([f.flops]), np.array([outcome["loss"]])
            text = f"target\nobserved {y[0]:.5g}"
            figure.add(chart.dots(c, y, [chart.INK], [text], shape="diamond"))
        return figure

    def _optimal(self, flops: Array) -> dict[str, Array]:
        """The columns that the law reads, for the best run of each C as a target has them."""
        if self.study.form.columns != ("parameters", "tokens"):
            return self.best(self.study.fit.vector, flops)
        each = [optimum(self.study, float(c), self.study.job.level) for c in flops]
        return {name: np.array([getattr(one, name) for one in each])
                for name in ("parameters", "tokens")}  # fmt: skip

    @property
    def _lowest(self) -> list[int]:
        """The best run of each budget; where there are none, the runs that no cheaper one beats."""
        losses, flops = self.study.all_points.loss, self.compute
        if self.shades or flops is None:
            budgets = self.study.table["budget"].to_numpy(dtype=float)
            return [int(np.where(budgets == b, losses, np.inf).argmin()) for b in self.shades]
        order = np.lexsort((losses, flops))
        least = np.minimum.accumulate(losses[order])
        return order[losses[order] <= least].tolist()

    def contours(self) -> Picture:
        """Contours of L(N, D)."""
        from contourpy import contour_generator

        study, n, d = self.study, self.study.all_points.parameters, self.study.all_points.tokens
        if not {"parameters", "tokens"} <= set(study.form.columns) or n is None or d is None:
            return f"The law ({study.form.name}) doesn't depend on both N and D."
        ends = [[n.min(), n.max()], [d.min(), d.max()]]
        if isinstance(f := self.prediction, Prediction):
            for end, value in zip(ends, (f.parameters, f.tokens), strict=True):
                end[:] = min(end[0], value), max(end[1], value)
        x, y = (np.geomspace(low / 1.6, high * 1.6, _GRID) for low, high in ends)
        at = {"parameters": np.tile(x, _GRID), "tokens": np.repeat(y, _GRID)}
        at |= {name: np.full(_GRID**2, value) for name, value in self._held.items()}
        z = study.fit.predict(**at).reshape(_GRID, _GRID)
        figure = chart.Figure(
            chart.Axis(self.n, log=True, ends=(float(x[0]), float(x[-1]))),
            chart.Axis(self.d, log=True, ends=(float(y[0]), float(y[-1]))),
        )
        low, high = float(z.min()), max(float(study.all_points.loss.max()), float(np.median(z)))
        power = 10.0 ** np.floor(np.log10((high - low) / 14))  # steps of 1, 2 or 5 times it
        step = max(m * power for m in (1, 2, 5) if m * power <= (high - low) / 14 * (1 + 1e-9))
        contours: Any = contour_generator(np.log(x), np.log(y), z)
        for level in np.arange(np.ceil(low / step) * step, high, step):
            for points in contours.lines(level):
                n_line, d_line = np.exp(points).T
                texts = [f"L(N, D) {level:.5g}\nN {n:.4g}\nD {d:.4g}"
                         for n, d in zip(n_line, d_line, strict=True)]  # fmt: skip
                figure.add(chart.line(n_line, d_line, chart.FAINT, width=1.0, texts=texts,
                                label=f"{level:.4g}"))  # fmt: skip
        if not isinstance(frontier := self.frontier, str):
            best = frontier["parameters"][0], frontier["tokens"][0]
            figure.add(chart.line(*best, chart.INK, "dash"))
        figure.add(self._runs(n, d))
        self._add_star(figure, "parameters", "tokens")
        return figure

    def residuals(self, over: str) -> Picture:
        """Residuals over C or N. over: "flops" or "parameters"."""
        x = self.compute if over == "flops" else self.study.all_points.parameters
        if x is None:
            return f"The runs have no {'C' if over == 'flops' else 'N'}."
        label = self.c if over == "flops" else self.n
        across = chart.Axis(label, log=True, power=over == "flops")
        figure = chart.Figure(across, chart.Axis("residual of log loss (%)", zero=True))
        study, every = self.study, self.study.all_points
        law = study.fit.predict(**{c: np.exp(every.log(c)) for c in study.form.columns})
        percent = 100 * np.log(every.loss / law)
        figure.add(self._runs(x, percent, [f"residual {p:+.3f} %" for p in percent]))
        return figure

    def backtests(self) -> Picture:
        """Errors of the predictions that the fit's method would have made at earlier origins."""
        study = self.study
        if study.earlier is None:
            return no_backtests(study)
        rows = study.earlier[study.earlier["method"] == study.method]
        rows = rows[rows["group"] != backtest.MINIMA]
        x = np.geomspace(1, rows["beyond"].max() * 1.1, _GRID)
        flops = x * study.calibrated.greatest
        today = study.predicted(self.best(study.fit.vector, flops), flops)
        figure = chart.Figure(
            chart.Axis("compute, relative to the largest known budget", log=True),
            chart.Axis("observed loss relative to predicted loss (%)", zero=True),
        )
        for level, colour in ((OUTER, chart.WIDE), (INNER, chart.NARROW)):
            ends = 100 * (today.interval(level) / today.loss - 1)
            figure.add(chart.band(x, ends, colour, f"today's {level:.0%} interval"))
        colours = list(self.shades.values())
        for origin, ahead in rows.groupby("origin"):
            outside = (ahead["inside_90"] == 0).to_numpy()
            texts = [
                f"predicted {y * np.exp(e):.5g} from {origin} budgets\nobserved {y:.5g}\n"
                f"{'outside' if out else 'inside'} the 90% interval"
                for y, e, out in zip(ahead["observed"], ahead["error"], outside, strict=True)
            ]
            observed = 100 * np.expm1(-ahead["error"].to_numpy())
            shade = [colours[int(origin) - 1]]
            figure.add(chart.dots(ahead["beyond"].to_numpy(), observed, shade, texts, outside))
        return figure

    def _add_vertices(self, figure: chart.Figure, x: str, y: str) -> None:
        """Add the minima of the parabolas, if there are any. x, y: fields of a vertex."""
        if not isinstance(self.iso, IsoFlop):
            return
        texts = [
            f"{v.budget:.3g} FLOPs\nN* {v.parameters:.5g}\nD* {v.tokens:.5g}\nloss {v.floor:.5g}\n"
            f"{v.runs} runs"
            for v in self.iso.vertices
        ]
        at = [[getattr(v, field) for v in self.iso.vertices] for field in (x, y)]
        figure.add(chart.marks(at[0], at[1], texts, "minimum of a parabola"))

    def _add_star(self, figure: chart.Figure, x: str, y: str) -> None:
        """Add the target, if it is predicted. x, y: the fields of its prediction."""
        if not isinstance(f := self.prediction, Prediction):
            return
        text = (
            f"target\nN {f.parameters:.4g}\nD {f.tokens:.4g}\nloss {f.loss:.5g}"
            f"\n50%: {f.inner[0]:.5g} to {f.inner[1]:.5g}"
            f"\n{self.study.job.level:.0%}: {f.outer[0]:.5g} to {f.outer[1]:.5g}"
        )
        at = {**vars(f), "flops": f.extrapolation_factor * self.study.calibrated.greatest}
        figure.add(chart.star(at[x], at[y], text, f.outer if y == "loss" else None))
