"""The evidence of a report besides the law: all records, the forecasts, sweeps, noise and costs.

    records        every record, with repeats and sweeps, to which the law is not fitted
    forecasts      with the observed losses and their score
    rate_sweeps    cells at several learning rates; batch_sweeps: at several batches
    noise          cells that were repeated with other seeds
    stages         of a planned study: planned and spent FLOPs, and where the time went

Invariant: everything is derived from records, forecasts and runs. What is missing is empty, never
guessed.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from forescale.monitor.status import Status
from forescale.scaling.analysis.forecast import Forecast, Score, read_forecasts, score
from forescale.scaling.config import StudyJob
from forescale.scaling.design.noise import Noise, noise_of
from forescale.scaling.design.plan import StudyStage
from forescale.scaling.design.tuning import Tuned, tuned
from forescale.scaling.fitting.points import Array
from forescale.scaling.study.directory import CellState, Study

_RATES = ("grid", "rate", "pilot")  # roles
_NONE = Noise((), None, 0, 0)


@dataclass(frozen=True)
class SweepResponse:
    """The losses of one cell at several learning rates, or at several batches.

    values, losses: (n,), by increasing value; the loss is inf if the run diverged.
    best: the value of the lowest loss, by a parabola in logarithms (`tuned`), or the best run's if
    that is at an edge; least: log loss there; inside: worse values are on both sides.
    bend: of the parabola least + bend log(value / best)^2 over `ends`; None without a parabola.
    """

    cell: str
    stage: int
    budget: float | None
    parameters: float
    tokens: float
    values: Array
    losses: Array
    best: float
    least: float
    inside: bool
    bend: float | None
    ends: tuple[float, float]

    @property
    def rise(self) -> Array:
        """Log loss above the least, (n,)."""
        return np.log(self.losses) - self.least

    @property
    def lowest(self) -> int:
        """The index of the best run."""
        return int(np.argmin(self.losses))

    @property
    def gap(self) -> float | None:
        """Log loss by which the best run is above the parabola's minimum; None without one."""
        return float(self.rise.min()) if self.bend is not None else None


@dataclass(frozen=True)
class StageCost:
    """The costs of one stage.

    cells, ended: numbers of cells; spent: FLOPs; low, high: the planned range; seconds: wall clock
    of its runs, by bucket (goodput.BUCKETS); device_hours: of its complete runs; is_target: it is
    the target's stage, which does not count against the cap.
    """

    number: int
    budget: float | None
    cells: int
    ended: int
    spent: float
    low: float
    high: float
    seconds: Mapping[str, float]
    device_hours: float | None
    is_target: bool = False

    @property
    def ettr(self) -> float | None:
        """Time of kept compute divided by the wall clock, see Goodput.ettr."""
        wall = sum(self.seconds.values())
        return self.seconds.get("compute", 0.0) / wall if wall else None


@dataclass(frozen=True)
class StudyEvidence:
    """All evidence of a report besides the law.

    folder, cap, statuses: of a planned study: its directory, FLOPs, and number of cells by status;
    versions: package versions of its runs; times: first start and last end, seconds since 1970.
    """

    records: pd.DataFrame
    forecasts: Sequence[Forecast] = ()
    score: Score | None = None
    rate_sweeps: Sequence[SweepResponse] = ()
    batch_sweeps: Sequence[SweepResponse] = ()
    noise: Noise = _NONE
    stages: Sequence[StageCost] = ()
    folder: str = ""
    cap: float = 0.0
    statuses: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, Sequence[str]] = field(default_factory=dict)
    times: tuple[float, float] | None = None

    @property
    def fitted(self) -> pd.DataFrame:
        """The records that a law is fitted to."""
        table = self.records
        return table[table["fitted"]].reset_index(drop=True) if "fitted" in table else table


def gather(job: StudyJob, table: pd.DataFrame) -> StudyEvidence:
    """Return the evidence of these records, and of their study if it is a planned one. Raises
    UserError if the hash chain of the forecasts is broken."""
    forecasts = read_forecasts(job.forecasts)
    scored = score(forecasts, table) if forecasts else None
    if job.input or not (job.folder / "plan.json").is_file():
        return evidence(job, table, (), forecasts=forecasts, score=scored)
    study = Study(job.folder)
    states = study.states()
    runs = {s.cell.name: study.run(s.cell.name) for s in states}
    started = {name: Status(run) for name, run in runs.items() if run.config.is_file()}
    starts = [x for status in started.values() for x in status.goodput.launches]
    used = [runs[name].read_identity().get("versions", {}) for name in started]
    names = sorted({name for one in used for name in one})
    return evidence(
        job, table, states, forecasts=forecasts, score=scored,
        stages=[_stage(stage, states, started, table) for stage in study.plan.stages],
        folder=str(job.folder), cap=study.plan.cap, statuses=Counter(s.status for s in states),
        versions={name: sorted({one[name] for one in used if name in one}) for name in names},
        times=(min(x.begun for x in starts), max(x.ended for x in starts)) if starts else None,
    )  # fmt: skip


def evidence(
    job: StudyJob, table: pd.DataFrame, states: Sequence[CellState] = (), **known: Any
) -> StudyEvidence:
    """Return the evidence of the records alone. states: of the cells; some may have diverged."""
    if "role" not in table:
        return StudyEvidence(table, **known)
    diverged = [s.cell for s in states if s.status == "diverged"]
    size, gone = f"parameters_{job.size}", {
        "learning_rate": [(c.cell_of, c.learning_rate) for c in diverged if c.role in _RATES],
        "batch": [(c.cell_of, float(c.global_batch)) for c in diverged if c.role == "batch"],
    }  # fmt: skip
    noise = noise_of(table, f"flops_{job.cost}")
    rates = list(_sweeps(table, size, "learning_rate", _RATES, 3, gone["learning_rate"]))
    batches = list(_sweeps(table, size, "batch", ("grid", "batch", "pilot"), 2, gone["batch"]))
    return StudyEvidence(table, rate_sweeps=rates, batch_sweeps=batches, noise=noise, **known)


def _sweeps(
    table: pd.DataFrame, size: str, column: str, roles: Sequence[str], least: int,
    diverged: Sequence[tuple[str, float]],
) -> Iterator[SweepResponse]:  # fmt: skip
    """The sweeps with `least` or more values, diverged runs included."""
    rows = table[table["role"].isin(roles)]
    for cell, runs in rows.groupby("cell_of", sort=False):
        runs = runs.drop_duplicates(column)
        gone = [value for name, value in diverged if name == cell]
        values = np.array([*runs[column].astype(float), *gone])
        losses = np.array([*runs["loss"], *[math.inf] * len(gone)])
        if len(np.unique(values)) >= least:
            order, first = np.argsort(values), runs.iloc[0]
            budget = float(first["budget"]) if "budget" in runs else None
            at = (budget, float(first[size]), float(first["tokens"]))
            yield sweep_response(str(cell), int(first["stage"]), *at, values[order], losses[order])


def sweep_response(
    cell: str, stage: int, budget: float | None, parameters: float, tokens: float,
    values: Array, losses: Array,
) -> SweepResponse:  # fmt: skip
    """Return the response of one sweep. values: (n,), increasing; losses: inf if diverged. The best
    value is the minimum of the parabola through the best run and its neighbours (see `tuned`)."""
    i = int(np.argmin(losses))
    lowest = float(values[i])
    t = tuned(values.tolist(), losses.tolist()) if len(values) >= 3 else Tuned(lowest, 0.0, False)
    return SweepResponse(
        cell, stage, budget, parameters, tokens, values, losses, t.learning_rate,
        float(np.log(losses[i])) - t.gap, t.inside, t.bend, t.ends or (lowest, lowest),
    )  # fmt: skip


def _stage(
    stage: StudyStage, states: Sequence[CellState], started: Mapping[str, Status],
    table: pd.DataFrame,
) -> StageCost:  # fmt: skip
    cells = [s for s in states if s.cell.stage == stage.number]
    seconds = Counter[str]()
    for s in cells:
        if s.cell.name in started:
            seconds.update(started[s.cell.name].goodput.buckets)
    hours = None
    if "device_hours" in table and table["device_hours"].notna().all():
        hours = float(table.loc[table["stage"] == stage.number, "device_hours"].sum())
    return StageCost(
        stage.number, stage.budget, len(cells), sum(s.has_ended for s in cells),
        sum(s.spent for s in cells), stage.low, stage.high, seconds, hours,
        all(s.cell.role == "target" for s in cells),
    )  # fmt: skip
