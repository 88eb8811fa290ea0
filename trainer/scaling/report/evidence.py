"""What a report shows beside the law: the records that the fit leaves aside, forecasts, costs.

    records   every record, with repeats, crosses and checks
    cards     forecasts, with what came out and their score
    crosses   a cell at several learning rates; checks: at several batches
    levels    cells that were repeated with other seeds
    stages    of a planned study: planned, spent, and where the time went

Invariant: derived from records, cards and runs; what isn't there is empty, never guessed.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from forescale.monitor.status import Status
from forescale.scaling.analysis.forecast import Card, Score, cards, score
from forescale.scaling.config import StudyJob
from forescale.scaling.design.noise import Noise, noise_of
from forescale.scaling.design.tuning import Tuned, tuned
from forescale.scaling.fitting.points import Array
from forescale.scaling.study.directory import State, Study
from forescale.storage import read_json

_CROSS = ("grid", "rate")  # roles
_NONE = Noise((), None, 0, 0)


@dataclass(frozen=True)
class Cross:
    """One cell at several learning rates, or batches. values, losses: (n,), in order, inf where it
    diverged; best: the value of least loss, by a parabola in logarithms (`tuned`), or of the runs
    at an edge; least: log loss there; inside: worse ones lie on both sides; bend: of the parabola
    least + bend log(value / best)^2, which reaches over `ends`, None without one."""

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
        """(n,), log loss above the least."""
        return np.log(self.losses) - self.least

    @property
    def found(self) -> int:
        """Which of the runs is the best."""
        return int(np.argmin(self.losses))

    @property
    def gap(self) -> float | None:
        """Log loss that the best of the runs is above the parabola."""
        return float(self.rise.min()) if self.bend is not None else None


@dataclass(frozen=True)
class Stage:
    """cells, ended: how many; spent, low, high: FLOPs, and the plan's; seconds: of the wall clocks
    of its runs, by bucket (goodput.BUCKETS); device_hours: of its complete runs; aside: it is the
    target's, which is paid for beside the cap."""

    number: int
    budget: float | None
    cells: int
    ended: int
    spent: float
    low: float
    high: float
    seconds: Mapping[str, float]
    device_hours: float | None
    aside: bool = False

    @property
    def ettr(self) -> float | None:
        """Compute of kept steps over the wall clock, see Goodput.ettr."""
        wall = sum(self.seconds.values())
        return self.seconds.get("compute", 0.0) / wall if wall else None


@dataclass(frozen=True)
class Evidence:
    """folder, cap, words: of a planned study, its directory, FLOPs, and how many of its cells are
    in which state; versions: of packages that its runs were made by; times: first start and last
    end of them, seconds since the epoch."""

    records: pd.DataFrame
    cards: Sequence[Card] = ()
    score: Score | None = None
    crosses: Sequence[Cross] = ()
    checks: Sequence[Cross] = ()
    noise: Noise = _NONE
    stages: Sequence[Stage] = ()
    folder: str = ""
    cap: float = 0.0
    words: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, Sequence[str]] = field(default_factory=dict)
    times: tuple[float, float] | None = None

    @property
    def fitted(self) -> pd.DataFrame:
        """The records that a law is fitted to."""
        table = self.records
        return table[table["fitted"]].reset_index(drop=True) if "fitted" in table else table


def gather(job: StudyJob, table: pd.DataFrame) -> Evidence:
    """Of records, and of the planned study that they are the cells of, where they are. Raises
    UserError where the chain of forecasts is broken."""
    found = cards(job.forecasts)
    scored = score(found, table) if found else None
    if job.input or not (job.folder / "plan.json").is_file():
        return evidence(job, table, (), cards=found, score=scored)
    study = Study(job.folder)
    states = study.states()
    runs = {s.cell.name: study.run(s.cell.name) for s in states}
    begun = {name: Status(run) for name, run in runs.items() if run.config.is_file()}
    launches = [x for status in begun.values() for x in status.goodput.launches]
    return evidence(
        job, table, states, cards=found, score=scored,
        stages=[_stage(s.number, study, states, begun, table) for s in study.plan.stages],
        folder=str(job.folder), cap=study.plan.cap, words=Counter(s.word for s in states),
        versions=_versions([read_json(runs[name].identity)["versions"] for name in begun]),
        times=_span([x.begun for x in launches], [x.ended for x in launches]),
    )  # fmt: skip


def evidence(
    job: StudyJob, table: pd.DataFrame, states: Sequence[State] = (), **known: Any
) -> Evidence:
    """With what the records themselves show, and which cells diverged."""
    if "role" not in table:
        return Evidence(table, **known)
    bad = [s.cell for s in states if s.word == "diverged"]
    size, gone = f"parameters_{job.size}", {
        "learning_rate": [(c.of, c.learning_rate) for c in bad if c.role in _CROSS],
        "batch": [(c.of, float(c.global_batch)) for c in bad if c.role == "batch"],
    }  # fmt: skip
    noise = noise_of(table, f"flops_{job.cost}")
    crosses = list(_crosses(table, size, "learning_rate", _CROSS, 3, gone["learning_rate"]))
    checks = list(_crosses(table, size, "batch", ("grid", "batch"), 2, gone["batch"]))
    return Evidence(table, crosses=crosses, checks=checks, noise=noise, **known)


def _crosses(
    table: pd.DataFrame, size: str, column: str, roles: Sequence[str], least: int,
    diverged: Sequence[tuple[str, float]],
) -> Iterator[Cross]:  # fmt: skip
    """Of cells that were tried at `least` values or more, the diverged among them."""
    own = table[table["role"].isin(roles)]
    for cell, runs in own.groupby("cell_of", sort=False):
        runs = runs.drop_duplicates(column)
        more = [value for name, value in diverged if name == cell]
        values = np.array([*runs[column].astype(float), *more])
        losses = np.array([*runs["loss"], *[math.inf] * len(more)])
        if len(np.unique(values)) >= least:
            order, first = np.argsort(values), runs.iloc[0]
            budget = float(first["budget"]) if "budget" in runs else None
            at = (budget, float(first[size]), float(first["tokens"]))
            yield cross(str(cell), int(first["stage"]), *at, values[order], losses[order])


def cross(
    cell: str, stage: int, budget: float | None, parameters: float, tokens: float,
    values: Array, losses: Array,
) -> Cross:  # fmt: skip
    """values: (n,), growing; losses: inf where it diverged. Through the best run and its neighbours
    goes the parabola whose lowest point `tuned` takes for the best."""
    i = int(np.argmin(losses))
    own = float(values[i])
    t = Tuned(own, 0.0, False)
    if len(values) >= 3:
        t = tuned(values.tolist(), losses.tolist())
    floor = float(np.log(losses[i])) - t.gap
    at = (cell, stage, budget, parameters, tokens)
    return Cross(
        *at, values, losses, t.learning_rate, floor, t.inside, t.bend, t.ends or (own, own)
    )


def _stage(
    number: int, study: Study, states: Sequence[State], begun: Mapping[str, Status],
    table: pd.DataFrame,
) -> Stage:  # fmt: skip
    planned = next(s for s in study.plan.stages if s.number == number)
    own = [s for s in states if s.cell.stage == number]
    seconds = Counter[str]()
    for s in own:
        if s.cell.name in begun:
            seconds.update(begun[s.cell.name].goodput.buckets)
    hours = None
    if "device_hours" in table and table["device_hours"].notna().all():
        hours = float(table.loc[table["stage"] == number, "device_hours"].sum())
    return Stage(
        number, planned.budget, len(own), sum(s.has_ended for s in own), sum(s.spent for s in own),
        planned.low, planned.high, seconds, hours, all(s.cell.role == "target" for s in own),
    )  # fmt: skip


def _span(begun: Sequence[float], ended: Sequence[float]) -> tuple[float, float] | None:
    return (min(begun), max(ended)) if begun else None


def _versions(each: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Of each package, all that were used."""
    names = sorted({name for one in each for name in one})
    return {name: sorted({one[name] for one in each if name in one}) for name in names}
