"""One question answered whole: the law of these runs, how sure it is, and what it says of a run.

    table -> points -> fit, with its certificate -> the same by other objectives
                    -> replicates -> intervals of parameters, of N* and D*, of a target's loss
                    -> the isoFLOP parabolas, where runs share budgets
                    -> the same under every convention of N and C, where that is asked

Invariant: whatever makes the answer doubtful (no certificate, an edge, another basin, objectives
that disagree, a target far beyond the runs) is a note of it, in words.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from forescale.errors import UserError
from forescale.scaling.analysis.sensitivity import Row, sensitivity
from forescale.scaling.analysis.weights import RunNoise, noise_of_repeats, weigh
from forescale.scaling.config import StudyJob, TargetPoint
from forescale.scaling.fitting import bootstrap, laws
from forescale.scaling.fitting.backtest import Discrepancy, RollOut, Sure, roll_outs, spent, sure_of
from forescale.scaling.fitting.fit import Fit, fit
from forescale.scaling.fitting.forms import Form
from forescale.scaling.fitting.isoflop import IsoFlop, isoflop
from forescale.scaling.fitting.objective import Objective
from forescale.scaling.fitting.points import Array, Points, near_best
from forescale.scaling.records.records import points

FORMS: Mapping[str, Form] = {
    "chinchilla": laws.CHINCHILLA,
    "shared-exponent": laws.SHARED_EXPONENT,
    "over-training": laws.OVER_TRAINING,
    "kaplan": laws.KAPLAN,
    "frontier": laws.FRONTIER,
    "data-constrained": laws.data_constrained(),
}
_OTHERS = {"Huber 1e-3": 1e-3, "Huber 3e-2": 3e-2, "least absolute deviations": 0.0}
_FAR = 30.0  # times the greatest compute of the runs: beyond that nothing is said
_PER = 6.0  # FLOPs a parameter and token, of C = 6 N D


@dataclass(frozen=True)
class Foretold:
    """A run to come. loss: as the law has it; inner, outer: intervals of 50 % and of the level that
    is asked for; bare: of the resampled fits alone; beyond: its compute over the greatest of the
    runs; origins: roll-outs that the intervals were calibrated by."""

    parameters: float
    tokens: float
    loss: float
    inner: tuple[float, float]
    outer: tuple[float, float]
    bare: tuple[float, float]
    beyond: float
    origins: int


class StudyFit:
    """Of a table of records; where it says which are `fitted`, of those. known: all of them. Raises
    UserError where the runs can't tell the law."""

    def __init__(self, table: pd.DataFrame, job: StudyJob, where: str):
        self.job, self.notes, self.known = job, list[str](), table
        self.table = self._kept(table)
        self.every = self._points(where)
        self.near = self._near()
        self.points = self.every.take(self.near)
        self.form = FORMS[job.form]
        self.goal = Objective(np.inf if job.delta is None else job.delta)
        self.noise: RunNoise = noise_of_repeats(self.table, self.every)
        self.weights = self._weighed(self.points)
        self.fit: Fit = fit(self.form, self.points, self.goal, self.weights)
        self._doubt()

    def _kept(self, table: pd.DataFrame) -> pd.DataFrame:
        table = table[table["fitted"]] if "fitted" in table else table
        bad = table[~(table["loss"] < np.inf)]  # NaN too
        if len(bad):
            self.notes.append(f"{len(bad)} runs whose loss is no number are left out (diverged).")
            table = table[table["loss"] < np.inf]
        if drop := self.job.drop_largest:
            limit = table["loss"].nlargest(drop).iloc[-1]
            self.notes.append(f"The {drop} runs of loss {limit:.4g} and more are left out.")
            table = table[table["loss"] < limit]
        return table.reset_index(drop=True)

    def _points(self, where: str) -> Points:
        table = self.table
        counted = {"parameters", f"parameters_{self.job.size}"} & set(table.columns)
        if "tokens" not in table and "flops" in table and counted:
            self.notes.append("The table has no tokens: D is taken as C / 6N.")
            sizes = table.get("parameters", table.get(f"parameters_{self.job.size}"))
            table = table.assign(tokens=table["flops"] / _PER / sizes)
        return points(table, self.job.size, self.job.cost, where)

    def _near(self) -> Array:
        """(n,) of bool: the runs that the law is fitted to. Far from each budget's optimum it has
        other things to bend to (measured on public sets: half the error without those)."""
        near, table = self.job.near, self.table
        if near is None or "budget" not in table:
            return np.ones(len(table), dtype=bool)
        kept = near_best(table["loss"].to_numpy(), table["budget"].to_numpy(), near)
        if not kept.all():
            what = f"within {near:.0%} of the least loss of their budget, or its best three"
            self.notes.append(f"The law is fitted to the {kept.sum()} of {len(kept)} runs {what}.")
        return kept

    @cached_property
    def roll_outs(self) -> list[RollOut]:
        """Where the table has budgets."""
        if "budget" not in self.table:
            return []
        budgets = self.table["budget"].to_numpy()[self.near]
        return roll_outs(self.form, self.points, budgets, self.goal, self.job.level)

    @cached_property
    def discrepancy(self) -> Discrepancy:
        return Discrepancy().after([r.a_decade for r in self.roll_outs])

    def _doubt(self) -> None:
        certificate = self.fit.certificate
        self.notes += [f"The fit is not certified: {p}." for p in certificate.problems]
        if self.job.weights in ("noise", "both") and not self.noise.freedom:
            what = "No two runs share N, D and recipe with other seeds"
            self.notes.append(f"{what}: the noise is taken as {self.noise.at:.1%} for all.")
        if self.job.weights != "none" and "budget" in self.table:
            self.notes.append("Roll-outs are of the law without weights.")
        self.notes += [
            f"{edge} of its range: these runs don't tell it." for edge in certificate.edges
        ]
        rivals = [b for b in certificate.basins[1:] if b.objective < 1.05 * self.fit.value]
        if rivals:
            what = ", ".join(f"{k} {v:.4g}" for k, v in rivals[0].values.items())
            self.notes.append(f"Another minimum is nearly as low: {what}.")

    @cached_property
    def replicates(self) -> bootstrap.Replicates:
        return self.resample(self.fit, self.job.bootstraps)

    def resample(self, made: Fit, count: int) -> bootstrap.Replicates:
        """Of a fit of these runs, in the way that is asked for."""
        job, trunks = self.job, self.table[self.near].get("trunk")
        if job.resample == "residuals":
            return bootstrap.residuals(made, count, job.seed)
        if job.resample == "clusters" and trunks is not None and trunks.nunique() > 1:
            return bootstrap.clusters(made, trunks.to_numpy(), count, job.seed)
        return bootstrap.pairs(made, count, job.seed)

    @cached_property
    def others(self) -> dict[str, Fit]:
        """The same law by other objectives, and fitted to all runs."""

        def by(delta: float) -> Fit:
            own = delta == self.goal.delta
            return self.fit if own else fit(self.form, self.points, Objective(delta), self.weights)

        found = {name: by(delta) for name, delta in _OTHERS.items()}
        if not self.near.all():
            weights = self._weighed(self.every)
            found["all runs"] = fit(self.form, self.every, self.goal, weights)
        return found

    def disagreements(self) -> list[str]:
        """Where another objective moves a parameter by more than its standard error."""
        errors, found = self.replicates.errors, []
        for name, other in self.others.items():
            for symbol, value in self.fit.values.items():
                if abs(other.values[symbol] - value) > errors[symbol]:
                    found.append(
                        f"By {name}, {symbol} is {other.values[symbol]:.4g}, not {value:.4g}."
                    )
        return found

    @property
    def allocation(self) -> tuple[float, Array] | None:
        """a of N* ~ C^a, and its interval; None for a law without one."""
        try:
            value = float(laws.allocation(self.form, self.fit.vector))
        except UserError:
            return None

        def of(values: Array) -> Array:
            return laws.allocation(self.form, values)

        return value, self.replicates.interval(self.job.level, of)

    @cached_property
    def isoflop(self) -> IsoFlop | str | None:
        """Where the table has budgets; the sentence where parabolas say nothing."""
        if "budget" not in self.table:
            return None
        try:
            return isoflop(self.every, self.table["budget"].to_numpy())
        except UserError as e:
            return str(e)

    @cached_property
    def sure(self) -> Sure:
        """The law with all that is known of how far it may be off."""
        return sure_of(self.fit, self.replicates, self.discrepancy)

    def foretold(self, target: TargetPoint | None = None) -> Foretold | None:
        """The loss of the target, or of another. Raises UserError for one that is too far, or that
        the law doesn't know."""
        target = target or self.job.target
        if not target.is_given:
            return None
        columns, parameters, tokens, flops = self.run_of(target)
        beyond = flops / float(spent(self.points).max())
        if beyond > _FAR:
            what = f"is {beyond:.0f} times beyond the largest run"
            raise UserError("target", what, f"nothing is said beyond {_FAR:.0f} times: add runs")

        def loss(values: Array) -> Array:
            return self.form.predict(values, **columns)[..., 0]

        bare = self.replicates.interval(self.job.level, loss)
        law = self.sure
        arrays = {name: np.array([value]) for name, value in columns.items()}

        def within(level: float) -> tuple[float, float]:
            low, high = law.interval(arrays, np.array([flops]), level)
            return float(low[0]), float(high[0])

        value = float(self.fit.predict(**columns)[0])
        ends = (within(0.5), within(self.job.level), (float(bare[0]), float(bare[1])))
        return Foretold(parameters, tokens, value, *ends, beyond, self.discrepancy.origins)

    def run_of(self, t: TargetPoint) -> tuple[dict[str, float], float, float, float]:
        """The columns that the law reads, and N, D and C."""
        n, d, c = t.parameters, t.tokens, t.flops
        if self.form.columns == ("flops",):
            if c is None:
                raise UserError("target", f"{self.form.name} asks for flops", "write target.flops=")
            return {"flops": c}, float("nan"), float("nan"), c
        if n is None and d is None and c is not None:
            if "unique_tokens" in self.form.columns:
                todo = "give target.parameters and target.tokens"
                raise UserError("target.flops", "leaves open how often data is repeated", todo)
            best = laws.compute_optimal(self.form, self.fit.vector, c, self.per_token())
            n, d = float(best[0][0]), float(best[1][0])
        elif n is None or d is None:
            if c is None:
                todo = "give two of target.parameters, target.tokens and target.flops, or flops"
                raise UserError("target", "names no run", todo)
            n = n or c / (self.per_token() * (d or 1.0))
            d = d or c / (self.per_token() * n)
        columns = {"parameters": n, "tokens": d}
        if "unique_tokens" in self.form.columns:
            columns["unique_tokens"] = d
        return columns, n, d, c or self.per_token() * n * d

    def _weighed(self, points: Points) -> Array | None:
        """(n,), or None: all alike."""
        kind, t = self.job.weights, self.job.target
        if kind == "none":
            return None
        c = None
        if kind != "noise":
            c = t.flops or self.per_token() * (t.parameters or 0.0) * (t.tokens or 0.0)
            if not c:
                todo = "write target.flops=, or target.parameters= and target.tokens="
                raise UserError("weights", f"{kind} asks for the target's compute", todo)
        return weigh(spent(points), None if kind == "distance" else self.noise, c)

    @cached_property
    def sensitivity(self) -> list[Row] | None:
        """Where it is asked for."""
        return sensitivity(self) if self.job.sensitivity else None

    def per_token(self) -> float:
        """FLOPs a parameter and token of these runs: 6 but for attention."""
        p = self.points
        if p.flops is None or p.parameters is None or p.tokens is None:
            return _PER
        return float(np.exp(np.mean(np.log(p.flops / p.parameters / p.tokens))))

    def influence(self, most: int = 5) -> list[tuple[str, dict[str, float]]]:
        """The runs that move the law most, in standard errors of the parameter that they move most;
        by each, what leaving it in adds to every parameter."""
        moved = bootstrap.influence(self.fit)
        errors = np.array([self.replicates.errors[s] for s in self.form.symbols])
        score = np.abs(moved / errors).max(1)
        rows = self.table.index[self.near]
        names = (
            self.table["name"] if "name" in self.table else "run " + rows.astype(str).to_series()
        )
        names = names[self.near] if "name" in self.table else names
        order = np.argsort(-score)[:most]
        return [
            (str(names.iloc[i]), dict(zip(self.form.symbols, map(float, moved[i]), strict=True)))
            for i in order
        ]

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        c, r, foretold = self.fit.certificate, self.replicates, self.foretold()
        ends = zip(self.form.symbols, r.interval(self.job.level).T.tolist(), strict=True)
        return {
            "runs": len(self.points),
            "convention": self.points.convention,
            "weights": None if self.weights is None else self.weights.tolist(),
            "noise": vars(self.noise),
            "form": self.form.name,
            "source": self.form.source,
            "objective": self.fit.value,
            "values": self.fit.values,
            "errors": r.errors,
            "interval": dict(ends),
            "level": self.job.level,
            "certificate": {
                "holds": c.holds,
                "scaled_gradient": c.scaled_gradient,
                "curvature": c.curvature,
                "method": c.method,
                "edges": list(c.edges),
                "basins": [vars(b) for b in c.basins],
                "astray": c.astray,
            },
            "uncertified_replicates": r.uncertified,
            "others": {name: other.values for name, other in self.others.items()},
            "allocation": None if self.allocation is None else [
                self.allocation[0], *map(float, self.allocation[1])
            ],
            "foretold": vars(foretold) if foretold else None,
            "sensitivity": None if self.sensitivity is None else [
                vars(row) for row in self.sensitivity
            ],
            "discrepancy_a_decade": self.discrepancy.a_decade,
            "roll_outs": [
                {
                    "budgets": r.budgets,
                    "runs": r.runs,
                    "factors": r.factors.tolist(),
                    "errors": r.errors.tolist(),
                    "inside_bare": r.bare.tolist(),
                    "inside": r.calibrated.tolist(),
                }
                for r in self.roll_outs
            ],
            "notes": [*self.notes, *self.disagreements()],
        }  # fmt: skip
