"""The predicted loss of a run: how `study fit`, `predict` and `report` get it.

    up to the runs' compute   the law, with its calibrated doubt (forecasting/calibrated.py)
    beyond                    the method of the job: "combined", which forecasts the lowest loss of
                              a budget and the loss off the optimum apart
                              (forecasting/forecaster.py), or the law
    run_of                    what a target leaves open is filled in: N* and D* of its compute

Invariant: the law is the same whatever method predicts the loss.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from forescale.ground.errors import UserError
from forescale.scaling.analysis.optimum import optimum
from forescale.scaling.config import TargetPoint
from forescale.scaling.fitting import laws
from forescale.scaling.fitting.effective import R_N
from forescale.scaling.fitting.points import ONCE, SETTINGS, Array, spent
from forescale.scaling.forecasting.combination import PARTS
from forescale.scaling.forecasting.forecaster import (
    BUDGETS,
    SIZES,
    Forecaster,
    continued,
    forecasters,
)
from forescale.scaling.forecasting.predictor import COMBINED, LAW, Predicted

if TYPE_CHECKING:
    from forescale.scaling.analysis.table_fit import StudyFit

FAR = 40.0  # greatest extrapolation factor of a prediction without target.far
_END = 1e-6  # a best setting so near the end of the runs' is the end, relative
_OF_SIZE = ("parameters", "tokens")
WORTHLESS = 0.1  # of a fresh token: repeated ones below it bring next to nothing

Interval = tuple[float, float]


@dataclass(frozen=True)
class Prediction:
    """The predicted loss of a run.

    loss: by `method`; inner, outer: intervals of 50 % and of the requested level; law: the loss by
    the law alone; resampled: its interval from the resampled fits; sizes: intervals of N* and of D*
    at the requested level if the target is given by its compute alone, else None;
    extrapolation_factor: the run's compute over the greatest of the fit; origins: number of earlier
    forecasts that the intervals were calibrated with; parts: of a combined forecast, by name: the
    loss that each part predicts, and its weight; optima: N* by each way to find it (optimum.py);
    settings: what the law reads beside N, D and C; best: the interval of the one that was chosen;
    repetition: what repeated tokens cost, if the target says how many are unique.
    """

    method: str
    parameters: float
    tokens: float
    flops: float
    loss: float
    inner: Interval
    outer: Interval
    law: float
    resampled: Interval
    sizes: tuple[Interval, Interval] | None
    extrapolation_factor: float
    origins: int
    parts: dict[str, tuple[float, float]]
    optima: dict[str, float]
    settings: dict[str, float]
    best: dict[str, Interval]
    repetition: dict[str, float]


def forecasters_of(study: "StudyFit") -> list[Forecaster]:
    """Return the forecasters of the first two budgets, of the first three, and so on up to all;
    none if the job asks for the law, or if the runs have too few budgets with enough sizes. Raises
    UserError if the job asks for the combination all the same."""
    if study.job.method == LAW:
        return []
    if study.form.columns != _OF_SIZE:
        why = f"the law {study.form.name} isn't one of N and D"
    elif "budget" not in study.table:
        why = "the table has no column 'budget'"
    else:
        points, budgets = study.all_points, study.table["budget"].to_numpy(dtype=float)
        usable = continued(budgets, np.exp(points.log("parameters")))
        if usable.any():
            return list(forecasters(points.take(usable), budgets[usable]))
        why = f"fewer than {BUDGETS} budgets have {SIZES} sizes"
    if study.job.method == COMBINED:
        raise UserError("method", f"combined is not possible: {why}", "write method=law")
    return []


def predicted(study: "StudyFit", columns: Mapping[str, Array], flops: Array) -> Predicted:
    """Return the prediction for m runs. columns: what the law reads; flops: C; (m,) each."""
    by_law = study.calibrated.predicted(dict(columns), flops)
    forecaster = study.forecaster
    if forecaster is None:
        return by_law
    n, d = columns["parameters"], columns["tokens"]
    center, deviation = by_law.log_loss.copy(), by_law.deviation.copy()
    freedom = np.full(len(n), float(by_law.freedom))
    for i, budget in enumerate((forecaster.shape.per * n * d).tolist()):
        if forecaster.is_beyond(budget):
            run = {"parameters": n[i : i + 1], "tokens": d[i : i + 1]}
            one = forecaster.of_runs(run, flops[i : i + 1], budget)
            center[i], deviation[i] = one.log_loss[0], one.deviation[0]
            freedom[i] = one.freedom
    return Predicted(center, deviation, freedom)


def predict(study: "StudyFit", target: TargetPoint) -> Prediction | None:
    """Return the prediction for a target, or None if it is empty. Raises UserError if it is too far
    beyond the runs, or lacks what the law reads."""
    if not target.is_given:
        return None
    columns, n, d, c = run_of(study, target)
    factor = c / float(spent(study.points).max())
    if factor > FAR and not target.far:
        problem = f"needs {factor:.0f} times the compute of the largest run"
        todo = (
            f"add larger runs, or write target.far=true for a prediction beyond {FAR:.0f} times, "
            "where errors are known only from much nearer forecasts"
        )
        raise UserError("target", problem, todo)

    repetition = _repetition(study, target, n, d)
    lost = 0.0 if "unique_tokens" in columns else repetition.get("lost", 0.0)  # else in the law

    def loss(values: Array) -> Array:
        return study.form.predict(values, **columns)[..., 0] * np.exp(lost)

    level, best, choice = study.job.level, None, _open(study, target)
    chosen = dict[str, Interval]()
    if not target.parameters and not target.tokens and not choice and np.isfinite(n):
        best = optimum(study, target.flops or c, level, target)
    sizes = best.sizes if best else None
    if choice:
        ends = study.replicates.interval(level, _best(study, target)).T
        of_n, of_d, chosen[choice] = ((float(low), float(high)) for low, high in ends)
        sizes = None if target.parameters else (of_n, of_d)
    one = predicted(study, {k: np.array([v]) for k, v in columns.items()}, np.array([c]))
    one = replace(one, log_loss=one.log_loss + lost)
    inner, outer = (tuple(one.interval(each).ravel().tolist()) for each in (0.5, level))
    forecaster = study.forecaster
    by_combination = forecaster is not None and forecaster.is_beyond(forecaster.shape.per * n * d)
    earlier = forecaster.earlier if forecaster and by_combination else study.discrepancy.origins
    low, high = study.replicates.interval(level, loss)
    parts = dict[str, tuple[float, float]]()
    if forecaster is not None and by_combination:
        parts = _parts(forecaster, forecaster.shape.per * n * d, float(one.loss[0]))
    return Prediction(
        COMBINED if by_combination else LAW, n, d, c, float(one.loss[0]), inner, outer,
        float(loss(study.fit.vector)), (float(low), float(high)),
        sizes, factor, earlier, parts, best.parts if best else {},
        {name: columns[name] for name in study.form.settings}, chosen, repetition,
    )  # fmt: skip


def _repetition(study: "StudyFit", t: TargetPoint, n: float, d: float) -> dict[str, float]:
    """Return what repeated tokens cost a target; empty if it doesn't say how many are unique.

    lost: log loss above the same run on fresh tokens; epochs_end: those beyond which a repeated
    token is worth less than WORTHLESS of a fresh one; flops_end: of the best run with so many.
    """
    if t.unique is None:
        return {}
    law, values = laws.DATA_CONSTRAINED, laws.repeated(study.form, study.fit.vector)
    at, per = {"parameters": n, "tokens": d}, study.points.per_token
    loss = law.predict(values, **at, unique_tokens=[min(d, t.unique), d])
    epochs = 1 - float(values[5]) * float(np.log(WORTHLESS))
    flops = per * t.unique * np.geomspace(1, 1e15, 601)
    _, best = laws.compute_optimal(law, values, flops, per, unique_tokens=t.unique)
    end = float(np.exp(np.interp(np.log(t.unique * epochs), np.log(best), np.log(flops))))
    return {
        "unique_tokens": t.unique, "epochs": d / t.unique, "lost": float(np.log(loss[0] / loss[1])),
        "epochs_end": epochs, "flops_end": end, "R_D": float(values[5]), "R_N": R_N,
    }  # fmt: skip


def _parts(one: Forecaster, budget: float, loss: float) -> dict[str, tuple[float, float]]:
    """Return the loss of a run by each part of the combination, and its weight. loss: by all."""
    each = loss * np.exp(one.parts.at(budget) - one.minimum(budget).log_loss)
    return {
        name: (float(x), float(w))
        for name, x, w in zip(PARTS, each, one.weights, strict=True)
        if w > 0
    }


def run_of(study: "StudyFit", t: TargetPoint) -> tuple[dict[str, float], float, float, float]:
    """Return the columns that the law reads of a target, and its N, D and C. FLOPs alone mean the
    compute-optimal run. Raises UserError if more values are needed."""
    n, d, c = t.parameters, t.tokens, t.flops
    form, per = study.form, study.per_token
    choice = _open(study, t)
    for name in SETTINGS:
        if name not in form.columns and getattr(t, name) is not None:
            todo = f"leave it out, or fit form={SETTINGS[name][1]} to runs with a column {name}"
            raise UserError(f"target.{name}", f"the law {form.name} doesn't read it", todo)
    other = form.columns != _OF_SIZE and bool(t.served or not choice)
    if (t.served or t.most_parameters) and (n or d or not c or other):
        key = "target.served" if t.served else "target.most_parameters"
        todo = "write target.flops= alone beside it" + ", and form=chinchilla" * other
        raise UserError(key, "chooses N and D of a compute", todo)
    held = {name: getattr(t, name) for name in form.settings}
    for name in held:
        if held[name] is None and name != choice:
            todo = f"write target.{name}="
            if name == form.CHOICE:
                todo += ", or target.flops= without target.tokens=, for the best"
            raise UserError("target", f"has no {name}, which the law {form.name} reads", todo)
    if form.columns == ("flops",):
        if c is None:
            problem = f"has no flops, which the law {form.name} reads"
            raise UserError("target", problem, "write target.flops=")
        return {"flops": c}, float("nan"), float("nan"), c
    if choice and c is not None:
        n, d, held[choice] = map(float, _best(study, t)(study.fit.vector[None])[0])
    elif n is None and d is None and c is not None:
        if "unique_tokens" in form.columns and t.unique is None:
            problem = "does not say how often data is repeated, which the law reads"
            raise UserError("target.flops", problem, "write target.unique= beside it")
        best = optimum(study, c, study.job.level, t)
        n, d = best.parameters, best.tokens
        c = per * n * d * _cost(study, n, held)  # what is spent on training
    elif n is None or d is None:
        if c is None:
            todo = "give two of target.parameters, target.tokens and target.flops, or flops"
            raise UserError("target", "does not determine a run", todo)
        n = n or c / (per * (d or 1.0) * _cost(study, n, held))
        d = d or c / (per * n * _cost(study, n, held))
    columns = {"parameters": n, "tokens": d, **{k: v for k, v in held.items() if v}}
    if "unique_tokens" in form.columns:
        columns["unique_tokens"] = min(d, t.unique or d)
    return columns, n, d, c or per * n * d * _cost(study, n, held)


def _open(study: "StudyFit", t: TargetPoint) -> str:
    """Return the setting whose best value a target of a compute leaves open; "" for none."""
    choice = study.form.CHOICE
    if choice not in study.form.columns or t.flops is None or t.tokens is not None:
        return ""
    return "" if getattr(t, choice) is not None else choice


def setting_doubts(study: "StudyFit", columns: Mapping[str, float]) -> Iterator[str]:
    """Yield a sentence for each setting of a target that the runs don't have on both sides, and for
    more epochs than they have."""
    choice, unique, most = _open(study, study.job.target), study.job.target.unique, ONCE
    if study.form is laws.DATA_CONSTRAINED:
        runs = study.points.columns(["tokens", "unique_tokens"])
        most = float((runs["tokens"] / runs["unique_tokens"]).max())
    if unique and (epochs := columns.get("tokens", 0.0) / unique) > most:
        yield (
            f"The target sees its tokens {epochs:.3g} times, and the law knows at most {most:.2g} "
            "from the runs: nothing tests what more cost, and no interval knows its error. Fit "
            "form=data-constrained to runs with more epochs."
        )
    for name in study.form.settings:
        runs, value = getattr(study.points, name), columns[name]
        low, high = float(runs.min()), float(runs.max())
        at_end = _END if name == choice else -_END
        if not low * (1 + at_end) <= value <= high * (1 - at_end):
            place, why = "outside of", "where nothing tests the law"
            if low * (1 - _END) <= value <= high * (1 + _END):
                place, why = "at an end of", "so that another one may be better"
            yield (
                f"The target's {name}, {value:.3g}, is {place} those of the runs ({low:.3g} to "
                f"{high:.3g}), {why}. Add runs beyond it."
            )


def _cost(study: "StudyFit", n: float | None, held: dict[str, float | None]) -> float:
    """Return C over per N D of a run with these settings."""
    logs = {name: np.log(x) for name, x in {"parameters": n, **held}.items() if x}
    if n is None and study.form is laws.VOCABULARY:
        raise UserError("target", "has no N, which C of N_v depends on", "write target.parameters=")
    return float(np.exp(study.form.log_cost(logs)))


def _best(study: "StudyFit", t: TargetPoint) -> Callable[[Array], Array]:
    """Return the function from parameters of the law, (R, p), to N*, D* and the best setting.
    Raises UserError if a largest N can't be compared with the runs' total parameters."""
    form, largest, low, high = study.form, t.most_parameters, *study.form.BETWEEN
    runs, share = getattr(study.points, form.CHOICE), 0.0  # of the experts in the active parameters
    ends = float(runs.min()) if low is None else low, float(runs.max()) if high is None else high
    if largest and form.CHOICE == "expansion":
        if (total := study.table.get("parameters_total")) is None:
            problem = "bounds all experts, and the table has no total parameters"
            raise UserError("target.most_parameters", problem, "add a column parameters_total")
        ratio = total[study.is_fitted].to_numpy(dtype=float) / study.points.parameters
        if not (ratio > 0.99).all():  # by rounding
            problem = "a run has no total parameters, or fewer than active ones"
            raise UserError("target.most_parameters", problem, "correct parameters_total")
        share = float(np.median((ratio[runs > 1] - 1) / (runs[runs > 1] - 1)))
    most = largest and (lambda log: np.log(largest) - np.log1p(share * np.expm1(log)))
    return lambda values: laws.best_setting(
        form, values, t.flops or 1.0, study.per_token, ends, t.parameters, most or None
    )
