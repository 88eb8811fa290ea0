"""The fit of one table of runs: the law, its uncertainty, and the loss predicted for a target.

    table -> points -> fit, with its certificate -> the same with other objectives
                    -> replicates -> intervals of parameters, of N* and D*, of a target's loss
                    -> the isoFLOP parabolas, if runs share budgets
                    -> the same under every convention of N and C, if the job asks for it

Invariant: everything that makes the result doubtful is one of its `doubts`, as a sentence; `notes`
say what was done with the table.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from forescale.ground.errors import UserError
from forescale.scaling.analysis import backtest, prediction
from forescale.scaling.analysis.prediction import Prediction
from forescale.scaling.analysis.sensitivity import SensitivityRow, sensitivity
from forescale.scaling.config import StudyJob, TargetPoint
from forescale.scaling.doubts.budgets import grouped
from forescale.scaling.doubts.gain import gain_doubts
from forescale.scaling.doubts.law import Target, doubts
from forescale.scaling.fitting import bootstrap, laws
from forescale.scaling.fitting.fit import Fit, fit
from forescale.scaling.fitting.isoflop import IsoFlop, isoflop
from forescale.scaling.fitting.objective import Objective
from forescale.scaling.fitting.points import SETTINGS, Array, near_best, repeats, spent
from forescale.scaling.forecasting.calibrated import Backtest, CalibratedLaw, backtests, calibrate
from forescale.scaling.forecasting.forecaster import Forecaster
from forescale.scaling.forecasting.predictor import COMBINED, LAW, Discrepancy, Predicted
from forescale.scaling.records.records import PER, points

_OTHERS = {"Huber 1e-3": 1e-3, "Huber 3e-2": 3e-2, "least absolute deviations": 0.0}


class StudyFit:
    """The fit of a table of records, with what follows from it.

    If the table has a column `fitted`, only those rows count; `records` keeps all of them. Raises
    UserError if the runs don't determine the law. all_points: the runs with a finite loss; points:
    those of them that the law is fitted to, by the mask `is_fitted`.
    """

    def __init__(self, table: pd.DataFrame, job: StudyJob, where: str):
        self.job, self.notes, self.records = job, list[str](), table
        self.goal = Objective.of(job.delta, job.residual)
        table = table[table["fitted"]] if "fitted" in table else table
        is_finite = table["loss"] < np.inf  # False for NaN too
        if not is_finite.all():
            count = int((~is_finite).sum())
            self.notes.append(f"{count} diverged runs are left out: their loss is not finite.")
            table = table[is_finite]
        if drop := job.drop_largest:
            limit = table["loss"].nlargest(drop).iloc[-1]
            self.notes.append(f"The {drop} runs with a loss of {limit:.4g} or more are left out.")
            table = table[table["loss"] < limit]
        table = table.reset_index(drop=True)
        if job.form == "experts" and "parameters" not in table and job.size != "active":
            problem = f"{job.size} counts experts that a token doesn't use, the law "
            raise UserError("size", f"{problem}{job.form} doesn't", "write size=active")
        every = points(table, job.size, job.cost, where)
        self.form = laws.FORMS[job.form].suited(every.varied)
        if self.form.PRICED:
            logs = {c: every.log(c) for c in self.form.columns}
            cost = logs["parameters"] + logs["tokens"] + self.form.log_cost(logs)
            every = replace(every, flops=PER * np.exp(cost))
            self.notes.append(self.form.PRICED)
        self.all_points = every
        if "tokens" not in table and every.tokens is not None:
            self.notes.append("The table has no tokens: D is computed as C / 6N.")
        n = every.parameters if "budget" not in table and every.tokens is not None else None
        if n is not None and (groups := grouped(spent(every), n)) is not None:
            table = table.assign(budget=groups[0])
            self.notes.append(groups[1])
        self.table = table
        self.is_fitted = self._near_best()
        self.points = every.take(self.is_fitted)
        self.fit: Fit = fit(self.form, self.points, self.goal)

    def _near_best(self) -> Array:
        """Return the mask of the runs near the optimum of their budget, (n,).

        Runs far from it distort the law: without them the error halves on public data sets.
        """
        near, table = self.job.near, self.table
        if near is None or "budget" not in table or "unique_tokens" in self.form.columns:
            return np.ones(len(table), dtype=bool)
        # Each setting has its own optimum.
        rows = np.stack((table["budget"].to_numpy(), *self.all_points.varied.values()), axis=1)
        budgets = np.unique(rows, axis=0, return_inverse=True)[1].ravel()
        mask = near_best(table["loss"].to_numpy(), budgets, near)
        if not mask.all():
            rule = f"within {near:.0%} of the least loss of their budget, or its best three"
            self.notes.append(f"The law is fitted to {mask.sum()} of {len(mask)} runs: {rule}.")
        return mask

    @property
    def per_token(self) -> float:
        """Return C over N D, beside what the settings of a run cost."""
        return PER if self.form.PRICED else self.points.per_token

    @cached_property
    def backtests(self) -> list[Backtest]:
        """Return the backtests of the law; empty if the table has no budgets."""
        if "budget" not in self.table:
            return []
        budgets = self.table["budget"].to_numpy()[self.is_fitted]
        return backtests(self.form, self.points, budgets, self.goal, self.job.level)

    @property
    def method(self) -> str:
        """Return what predicts losses beyond the largest budget."""
        return COMBINED if self.forecaster else LAW

    @cached_property
    def earlier(self) -> pd.DataFrame | None:
        """Return what this method and its rivals would have predicted at earlier origins; None with
        few budgets. See backtest.forecasts."""
        return backtest.earlier(self.table, self.job, self.method, self._forecasters)

    @cached_property
    def skill(self) -> list[backtest.Scores]:
        """Return how far off those predictions were; empty with few budgets."""
        return [] if self.earlier is None else backtest.scores(self.earlier)

    @cached_property
    def discrepancy(self) -> Discrepancy:
        """Return the law's error beyond its runs, as the backtests show it."""
        return Discrepancy().after([b.per_decade for b in self.backtests])

    @cached_property
    def doubts(self) -> list[str]:
        """Return what makes the numbers doubtful as sentences, the most serious first."""
        sentences = [
            f"The runs' {name} ({SETTINGS[name][0]}) is {x.min():.3g} to {x.max():.3g}, which the "
            f"law {self.form.name} does not know: write form={SETTINGS[name][1]}, or keep runs of "
            f"one {name} with rows=."
            for name, x in self.all_points.varied.items()
            if name not in self.form.columns
        ]
        count = repeats(self.all_points).sum()
        if count and "unique_tokens" not in self.form.columns:
            sentences.append(
                f"{count} of {len(self.all_points)} runs repeat their data, which the law "
                f"{self.form.name} takes for fresh: write form=data-constrained."
            )
        target = None
        if self.job.target.is_given:
            columns, *run = prediction.run_of(self, self.job.target)
            target = Target(*run)
            sentences += prediction.setting_doubts(self, columns)
        level, names = self.job.level, self.job.columns
        table, runs = self.table, self.all_points
        iso = None if set(runs.varied) & set(self.form.columns) else self.isoflop
        if self.form.PRICED:  # doubts of C are of one that is N D alone
            table, runs = table.drop(columns="budget", errors="ignore"), replace(runs, flops=None)
        facts = (table, runs, self.replicates, iso, target, level, names)
        return [*sentences, *doubts(*facts), *self.disagreements()]

    @property
    def gains(self) -> list[str]:
        """Return a sentence if the losses fall faster than any law between two budgets."""
        named = self.table["budget"].to_numpy(dtype=float) if "budget" in self.table else None
        return gain_doubts(self.all_points, named, self.fit)

    @cached_property
    def replicates(self) -> bootstrap.Replicates:
        """Return the resampled fits."""
        return self.resample(self.fit, self.job.bootstraps)

    def resample(self, law: Fit, count: int) -> bootstrap.Replicates:
        """Resample a fit of these runs, by the method of the job."""
        job, trunks = self.job, self.table[self.is_fitted].get("trunk")
        if job.resample == "clusters" and trunks is not None and trunks.nunique() > 1:
            return bootstrap.clusters(law, trunks.to_numpy(), count, job.seed)
        return bootstrap.pairs(law, count, job.seed)

    @cached_property
    def others(self) -> dict[str, Fit]:
        """Return fits of the law with other objectives and, if some were left out, all runs."""
        fits = {
            name: self.fit if (goal := Objective.of(delta, "log")) == self.goal
            else fit(self.form, self.points, goal)
            for name, delta in _OTHERS.items()
        }  # fmt: skip
        if not self.is_fitted.all():
            fits["all runs"] = fit(self.form, self.all_points, self.goal)
        return fits

    def disagreements(self) -> list[str]:
        """Return a sentence for each fit of `others` that moves a parameter by over its error."""
        errors, sentences = self.replicates.errors, []
        for name, other in self.others.items():
            moved = [
                f"{symbol} is {other.values[symbol]:.4g}, not {value:.4g}"
                for symbol, value in self.fit.values.items()
                if abs(other.values[symbol] - value) > errors[symbol]
            ]
            if moved:
                sentences.append(f"With {name}, {'; '.join(moved)}.")
        return sentences

    @property
    def allocation(self) -> tuple[float, Array] | None:
        """Return a of N* ~ C^a and its interval, or None for a law without it."""
        return self.replicates.allocation(self.job.level)

    @cached_property
    def isoflop(self) -> IsoFlop | str | None:
        """Return the isoFLOP analysis; the error if it fails, None without budgets to compare."""
        if "budget" not in self.table or "unique_tokens" in self.form.columns:
            return None
        if different := " and ".join(self.all_points.varied):
            return f"Runs of one budget differ in their {different}: keep one with rows=."
        try:
            return isoflop(self.all_points, self.table["budget"].to_numpy(), self.job.near)
        except UserError as e:
            return str(e)

    @cached_property
    def calibrated(self) -> CalibratedLaw:
        """Return the law with all that is known of its errors."""
        return calibrate(self.fit, self.replicates, self.discrepancy)

    @property
    def forecaster(self) -> Forecaster | None:
        """Return the forecaster of budgets beyond the runs, or None if the law predicts them."""
        return self._forecasters[-1] if self._forecasters else None

    @cached_property
    def _forecasters(self) -> list[Forecaster]:
        return prediction.forecasters_of(self)

    def predicted(self, columns: Mapping[str, Array], flops: Array) -> Predicted:
        """Return the prediction for m runs; see prediction.py."""
        return prediction.predicted(self, columns, flops)

    def predict(self, target: TargetPoint | None = None) -> Prediction | None:
        """Return the prediction for `target`, by default the job's; see prediction.py."""
        return prediction.predict(self, target or self.job.target)

    @cached_property
    def sensitivity(self) -> list[SensitivityRow] | None:
        """Return the fits under every convention, or None if the job doesn't ask for them."""
        return sensitivity(self) if self.job.sensitivity else None

    def influence(self, most: int = 5) -> list[tuple[str, dict[str, float]]]:
        """Return the runs that change the law most: name, and its effect on each parameter.

        Runs are ordered by their largest effect in standard errors of that parameter.
        """
        moved, symbols = bootstrap.influence(self.fit), self.form.symbols
        errors = np.array([self.replicates.errors[s] for s in symbols])
        # No run counts for a parameter that is the same in all replicates: runs without noise.
        score = np.abs(np.divide(moved, errors, np.zeros_like(moved), where=errors > 0)).max(1)
        table = self.table[self.is_fitted]
        names = list(table["name"] if "name" in table else (f"run {i}" for i in table.index))
        return [
            (str(names[i]), dict(zip(symbols, map(float, moved[i]), strict=True)))
            for i in np.argsort(-score)[:most]
        ]


def as_dict(study: StudyFit) -> dict[str, Any]:
    """Return all results of a fit."""
    c, r, prediction = study.fit.certificate, study.replicates, study.predict()
    ends = zip(study.form.symbols, r.interval(study.job.level).T.tolist(), strict=True)
    return {
        "runs": len(study.points),
        "convention": study.points.convention,
        "form": study.form.name,
        "source": study.form.source,
        "objective": study.fit.value,
        "values": study.fit.values,
        "errors": r.errors,
        "interval": dict(ends),
        "level": study.job.level,
        "certificate": {
            "holds": c.holds, "scaled_gradient": c.scaled_gradient, "curvature": c.curvature,
            "method": c.method, "edges": list(c.edges), "minima": [vars(m) for m in c.minima],
            "failed_starts": c.failed_starts,
        },
        "uncertified_replicates": r.uncertified,
        "others": {name: other.values for name, other in study.others.items()},
        "allocation": None if study.allocation is None else [
            study.allocation[0], *map(float, study.allocation[1])
        ],
        "prediction": vars(prediction) if prediction else None,
        "sensitivity": None if study.sensitivity is None else [
            vars(row) for row in study.sensitivity
        ],
        "discrepancy_per_decade": study.discrepancy.per_decade,
        "backtests": [
            {"budgets": b.budgets, "runs": b.runs, "factors": b.factors.tolist(),
             "errors": b.errors.tolist(), "inside_resampled": b.inside_resampled.tolist(),
             "inside": b.inside_calibrated.tolist()}
            for b in study.backtests
        ],
        "skill": backtest.as_dict(study.skill)["scores"],
        "doubts": study.doubts,
        "notes": study.notes,
    }  # fmt: skip
