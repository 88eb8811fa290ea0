"""Forecast files of a study: predictions made before the runs, later scored by what was observed.

    studies/<name>/forecasts/
      0001.json            a forecast: target, predicted loss and intervals, those of each branch of
                           the target, the curve of the training loss up to each, predictions of
                           simpler methods, the metric of a task, fit, hashes, time;
                           run/forecast.py reads it
      0001.outcome.json    the observed loss, and the forecasts of it that the run made at its
                           checkpoints; `score` writes it, and leaves the forecast unchanged

Invariant: a forecast is written once, before its target has a record, and holds the hash of the
forecast before it, so that any change, removal or insertion breaks the chain and `read_forecasts`
names the place. A forecast whose target has no record counts as abandoned; a score leaves none out.
"""

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from forescale.ground.errors import UserError
from forescale.ground.storage import write_json
from forescale.run.directory import Run
from forescale.run.forecast import GENESIS, SAME, Forecast, hash_of, read_forecasts
from forescale.run.rows import read_rows
from forescale.scaling.analysis.table_fit import Prediction, StudyFit
from forescale.scaling.analysis.task_fit import TaskFit
from forescale.scaling.config import TargetPoint
from forescale.scaling.fitting.points import COLUMNS, Array, Points, spent
from forescale.scaling.forecasting.curve import Curve, shape_of, smoothed
from forescale.scaling.forecasting.predictor import LAST, simple_losses

__all__ = ["GENESIS", "Forecast", "hash_of", "read_forecasts"]


def write_forecast(
    law: StudyFit, folder: Path, run: str, target: TargetPoint | None = None,
    task: TaskFit | None = None,
) -> Forecast:  # fmt: skip
    """Write the forecast of `run`, with a prediction for its end and for each branch.

    target: by default that of the fit; task: the metric to predict too. Raises UserError if there
    is no target, if the run or a branch has a record already, if the run has a forecast already, or
    if a branch is not shorter than the run.
    """
    points = _predictions(law, run, target or law.job.target)
    end, earlier = points[0], read_forecasts(folder)
    if any(forecast.facts["target"]["run"] == run for forecast in earlier):
        problem = f"has a forecast already, in {folder}"
        raise UserError(run, problem, "name another run: a run is forecast once")
    factor = end.extrapolation_factor
    facts: dict[str, Any] = {
        "target": {
            "run": run, "parameters": end.parameters, "tokens": end.tokens,
            "extrapolation_factor": factor,
        },
        "loss": end.loss,
        "interval_50": list(end.inner),
        "interval": list(end.outer),
        "level": law.job.level,
        "points": [
            {"tokens": p.tokens, "loss": p.loss, "interval_50": list(p.inner),
             "interval": list(p.outer), **curve_facts(law, p.parameters, p.tokens)}
            for p in points if math.isfinite(p.tokens)
        ],
        "rivals": rivals(law.points, factor)
        | {"law alone": {"loss": end.law, "interval": list(end.resampled)}},
        "method": end.method,
        "backtests": end.origins,
        "form": law.form.name,
        "values": law.fit.values,
        "certified": law.fit.certificate.holds,
        "convention": law.points.convention,
        "data": data_hash(law.points),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "previous_hash": earlier[-1].facts["hash"] if earlier else GENESIS,
        **({} if task is None else {"task": task_facts(task)}),
    }  # fmt: skip
    facts["hash"] = hash_of(facts)
    folder.mkdir(parents=True, exist_ok=True)
    forecast = Forecast(folder / f"{len(earlier) + 1:04d}.json", facts)
    write_json(forecast.path, facts)
    return forecast


def _predictions(law: StudyFit, run: str, target: TargetPoint) -> list[Prediction]:
    """Return the predictions for the end of a run and for each of its branches: runs of its N that
    decay earlier. Raises UserError as write_forecast."""
    end = law.predict(target)
    if end is None:
        todo = "write target.parameters= and target.tokens=, or target.flops="
        raise UserError("target", "is not given", todo)
    _refuse_known(law, run, end.parameters, end.tokens)
    points = [end]
    for tokens in target.branches:
        if not 0 < tokens < end.tokens * (1 - SAME):  # D is NaN for a law of FLOPs alone
            problem = f"a branch of {tokens:g} tokens is not shorter than its run of {end.tokens:g}"
            todo = "give the tokens at which shorter decays end"
            raise UserError("target.branches", problem, todo)
        branch = law.predict(TargetPoint(parameters=end.parameters, tokens=tokens))
        assert branch is not None  # both N and D are given
        _refuse_known(law, run, end.parameters, tokens)
        points.append(branch)
    return points


def _refuse_known(law: StudyFit, run: str, n: float, d: float) -> None:
    table, problem = law.records, "has a record already, so it can't be predicted"
    if "name" in table and (table["name"] == run).any():
        raise UserError(run, problem, "make a forecast before the run is trained")
    sizes = table.get("parameters", table.get(f"parameters_{law.job.size}"))
    if sizes is None or "tokens" not in table:
        return
    near = (np.abs(np.log(sizes / n)) < SAME) & (np.abs(np.log(table["tokens"] / d)) < SAME)
    if near.any():
        problem = f"a run of {n:.4g} parameters on {d:.4g} tokens {problem}"
        raise UserError("target", problem, "choose an N or D that no run has")


def curve_facts(law: StudyFit, parameters: float, tokens: float) -> dict[str, Any]:
    """Return {"curve": FACTS}: the training loss above the predicted end, at shares of the steps,
    from the curves of the law's runs; {} if fewer than three of one schedule have theirs. Runs of a
    table have none."""
    size, known = f"parameters_{law.job.size}", {"folder", "schedule", "steps"}
    if not known <= set(law.table) or size not in law.table:
        return {}
    schedules = law.table["schedule"].mode()
    rows = law.table[law.table["schedule"].isin(schedules[:1])].to_dict("records")
    curves = [Curve(row[size], row["tokens"], *_smoothed(row["folder"], row["steps"], row["loss"]),
                    float(row["warmup_steps"] or 0) / row["steps"]) for row in rows]  # fmt: skip
    shape = shape_of(curves, parameters, tokens)
    if shape is None:
        return {}
    numbers = {k: v.round(6).tolist() for k, v in asdict(shape).items() if k != "runs"}
    decays = [float(row["decay_steps"] or 0) / row["steps"] for row in rows]
    facts = {"runs": shape.runs, "schedule": schedules[0], "decay": float(np.median(decays))}
    return {"curve": numbers | facts}


@lru_cache(maxsize=1024)
def _smoothed(folder: str, steps: int, loss: float) -> tuple[Array, Array]:
    """Return the curve of a finished run, whose rows no longer change."""
    rows = [r for r in read_rows(Run(Path(folder)).metrics, kind="train") if "loss" in r]
    shares = np.array([row["step"] / steps for row in rows])
    return smoothed(shares, np.array([row["loss"] for row in rows]), loss)


def data_hash(points: Points) -> str:
    """Return the SHA-256 of everything that the fit read."""
    digest = hashlib.sha256(str(points.convention).encode())
    for name in COLUMNS:
        if (column := getattr(points, name)) is not None:
            digest.update(name.encode() + np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()


def rivals(points: Points, extrapolation_factor: float) -> dict[str, dict[str, float]]:
    """Return the losses that the line and L(C) predict for the target, by method.

    extrapolation_factor: compute of the target over the greatest of the runs. The methods read the
    best run of every budget; one for which there are too few runs is absent.
    """
    cost = spent(points)
    target = float(cost.max()) * extrapolation_factor
    order = np.argsort(cost)
    groups = np.split(order, np.flatnonzero(np.diff(np.log(cost[order])) > np.log1p(0.05)) + 1)
    best = np.array([g[np.argmin(points.loss[g])] for g in groups])
    methods = simple_losses(cost[best], points.loss[best])
    return {name: {"loss": loss(target)} for name, loss in methods.items() if name != LAST}


def task_facts(task: TaskFit) -> dict[str, Any]:
    """Return what a forecast says of the metric; without a value if the data can't tell."""
    link = {"column": task.name, "metric": task.job.metric, "link": task.link.form.name}
    if (p := task.chained) is None:
        return link | {"unseen": task.unseen}
    return link | {"value": p.value, "interval_50": list(p.inner), "interval": list(p.outer)}


@dataclass(frozen=True)
class Score:
    """The score of all forecasts of a study.

    errors: log of predicted over observed loss, by forecast; inside, inside_50: number of observed
    losses inside the interval and the 50 % interval; interval_score: mean, in loss, at the
    forecasts' level, lower is better (Gneiting and Raftery 2007, eq. 43); skill: by rival, 1 - mean
    absolute error over the rival's, on the forecasts that both have; abandoned: forecasts whose
    target has no record; anew: of each forecast that a run made of its own end, the share of the
    steps, the log of predicted over observed loss, and 1 if that is inside the interval.
    """

    errors: dict[str, float]
    inside: int
    inside_50: int
    interval_score: float
    skill: dict[str, float]
    abandoned: list[str]
    anew: list[tuple[float, float, int]] = field(default_factory=list)


def score(forecasts: Sequence[Forecast], table: pd.DataFrame) -> Score:
    """Record the outcomes that are in `table`, and score all forecasts that have an outcome."""
    rows = {row["name"]: row for row in table.to_dict("records")} if "name" in table else {}
    for forecast in forecasts:
        run = forecast.facts["target"]["run"]
        if (row := rows.get(run)) is not None and forecast.outcome is None:
            folder = row.get("folder")
            runs = [Run(Path(folder))] if isinstance(folder, str) else []  # a table has none
            events = [event for r in runs for event in r.read_events(kind="forecast_anew")]
            forecast.record_outcome(run, float(row["loss"]), events)
    marks, pairs = list[float](), dict[str, list[tuple[float, float]]]()
    errors, inside, inside_50 = dict[str, float](), 0, 0
    anew = list[tuple[float, float, int]]()
    for forecast in forecasts:
        if (outcome := forecast.outcome) is None or not 0 < outcome["loss"] < math.inf:
            continue
        f, loss = forecast.facts, outcome["loss"]
        errors[forecast.id] = math.log(f["loss"] / loss)
        for end in outcome.get("anew", []):
            is_inside = int(end["low"] <= loss <= end["high"])
            anew.append((end["share"], math.log(end["loss"] / loss), is_inside))
        low, high = f["interval"]
        miss = max(low - loss, loss - high, 0.0)
        marks.append(high - low + 2 / (1 - f["level"]) * miss)
        inside += low <= loss <= high
        inside_50 += f["interval_50"][0] <= loss <= f["interval_50"][1]
        for name, rival in f.get("rivals", {}).items():
            if 0 < rival["loss"] < math.inf:
                both = (abs(errors[forecast.id]), abs(math.log(rival["loss"] / loss)))
                pairs.setdefault(name, []).append(both)
    skill = {}
    for name, each in pairs.items():
        error, of_rival = np.mean(each, axis=0).tolist()
        skill[name] = 1 - error / of_rival if of_rival else 0.0
    return Score(
        errors, inside, inside_50, float(np.mean(marks)) if marks else math.nan, skill,
        [forecast.id for forecast in forecasts if forecast.outcome is None], anew,
    )  # fmt: skip


@dataclass(frozen=True)
class TaskScore:
    """The metric of one forecast. observed: None before its run has a record with it."""

    forecast: str
    run: str
    column: str
    metric: str
    predicted: float
    interval: tuple[float, float]
    observed: float | None

    @property
    def inside(self) -> bool | None:
        """Return whether the observed metric is inside the interval."""
        if self.observed is None:
            return None
        return self.interval[0] <= self.observed <= self.interval[1]


def columns_of(forecasts: Sequence[Forecast]) -> list[str]:
    """Return the columns of metrics that forecasts predict, each once."""
    tasks = (one.facts.get("task") for one in forecasts)
    return list(dict.fromkeys(task["column"] for task in tasks if task))


def score_tasks(forecasts: Sequence[Forecast], table: pd.DataFrame) -> list[TaskScore]:
    """Return the metric of each forecast that predicts one, with that of the run in `table`."""
    scores = []
    for one in forecasts:
        task = one.facts.get("task")
        if task is None or "value" not in task:
            continue
        run, column = one.facts["target"]["run"], task["column"]
        observed = None
        if "name" in table and column in table:
            cells = pd.to_numeric(table.loc[table["name"] == run, column], errors="coerce").dropna()
            observed = float(cells.iloc[-1]) if len(cells) else None
        low, high = task["interval"]
        scores.append(
            TaskScore(one.id, run, column, task["metric"], task["value"], (low, high), observed)
        )
    return scores
