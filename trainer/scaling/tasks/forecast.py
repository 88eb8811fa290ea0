"""The metric in a forecast file, beside the loss; and how it compares with what came.

    facts["task"]    column, metric, link, predicted value, both intervals

Invariant: it is written with the forecast, before the run is trained, and part of its hash.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from forescale.scaling.analysis.forecast import Forecast
from forescale.scaling.analysis.task_fit import TaskFit


def facts_of(one: TaskFit) -> dict[str, Any]:
    """Return what a forecast says of the metric; without a value if the data can't tell."""
    made: dict[str, Any] = {
        "column": one.task.name, "metric": one.job.metric, "link": one.link.form.name,
    }  # fmt: skip
    if (p := one.chained) is None:
        return made | {"unseen": one.unseen}
    return made | {
        "value": p.value, "interval_50": list(p.inner), "interval": list(p.outer),
    }  # fmt: skip


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
        """Whether the observed metric is inside the interval."""
        if self.observed is None:
            return None
        return self.interval[0] <= self.observed <= self.interval[1]


def columns_of(found: Sequence[Forecast]) -> list[str]:
    """Return the columns of metrics that forecasts predict, each once."""
    said = (one.facts.get("task", {}).get("column") for one in found)
    return list(dict.fromkeys(column for column in said if column))


def score_tasks(found: Sequence[Forecast], table: pd.DataFrame) -> list[TaskScore]:
    """Return the metric of each forecast that predicts one, with that of the run in `table`."""
    scored = []
    for one in found:
        task = one.facts.get("task", {})
        if "value" not in task:
            continue
        run, column = one.facts["target"]["run"], task["column"]
        observed = None
        if "name" in table and column in table:
            own = pd.to_numeric(table.loc[table["name"] == run, column], errors="coerce").dropna()
            observed = float(own.iloc[-1]) if len(own) else None
        low, high = task["interval"]
        scored.append(
            TaskScore(one.id, run, column, task["metric"], task["value"], (low, high), observed)
        )
    return scored
