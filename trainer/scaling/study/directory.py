"""The directory of a study: its plan, its decisions, and the runs of its cells.

    studies/<name>/
      study.yaml         the settings of `study plan`, frozen
      plan.json          all cells, stage by stage; rewritten as a whole at each revision
      events.jsonl       revisions, starts and ends of cells, exclusions with their reasons
      cells/<cell>/      the run of each cell
      logs/<cell>.log    the output of each cell on this machine
      waves/NNNN.txt     the cells of each submission to the queue
      forecasts/         see run/forecast.py

Invariant: only facts and decisions are stored; states, losses and costs are read from the runs. One
process at a time decides (`deciding`), and each decision is one atomic write, so that after a kill
the same command resumes.
"""

import json
import math
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Required, cast

import pandas as pd
from filelock import FileLock, Timeout
from typing_extensions import TypedDict

from forescale.config.frozen import freeze, thaw
from forescale.config.schema import plain
from forescale.config.sections.optimizer import OTHER_RATES
from forescale.config.tree import build
from forescale.ground.errors import DONE, GAVE_UP, INTERRUPTED, USER, UserError, shortened
from forescale.ground.foreign import read_text
from forescale.ground.storage import make_folder, read_json, write_file, write_json
from forescale.ground.typed import Count, Whole, typed
from forescale.monitor.status import Status
from forescale.resilience.outcome import LaunchRecord, launch_of
from forescale.run.directory import Run
from forescale.run.forecast import read_forecasts
from forescale.run.rows import RowWriter, read_rows
from forescale.scaling.config import StudyJob
from forescale.scaling.design.cells import Cell
from forescale.scaling.design.pilot import PILOT
from forescale.scaling.design.plan import StudyPlan, dump, load
from forescale.scaling.design.recipes import is_set_by
from forescale.scaling.records.records import of_runs

_UNQUOTED = re.compile(r"[\w./ %+-]*")
# What a command does and where it writes: never by a stored file, which anybody may have written.
_OF_COMMAND = ("launch", "to", "live", "add", "cap", "cells", "why", "run")
# Keys that only earlier versions have, and those of them that say nothing.
_GONE = re.compile(
    r"^(?:json: .*|weights: .*|resample: residuals|task(?:s|_losses):.*(?:\n .*)*)\n", re.MULTILINE
)
_DEFAULTS = ("json: false", "json: true", "weights: none", "tasks: {}", "task_losses: {}")
# Columns of a study's records, beside those of their runs: what each run is there for.
PLANNED = ("stage", "role", "cell_of", "batch", "fitted")
TARGET = "target"  # name of the cell whose loss the study predicts


CellStatus = Literal[
    "waiting", "ready", "running", "interrupted", "crashed", "complete", "diverged", "failed",
    "excluded",
]  # fmt: skip
ENDED = ("complete", "diverged", "failed", "excluded")  # such a cell is not started again
MOST_CRASHES = 3  # a cell that crashed this often has failed


# A row of events.jsonl: of a cell how it ended, or why it is excluded; of a stage a decision.
StudyEvent = TypedDict(  # noqa: UP013
    "StudyEvent",
    {"kind": Required[str], "cell": str, "code": Whole, "why": str, "stage": Count}, total=False,
)  # fmt: skip


@dataclass(frozen=True)
class CellState:
    """The state of a cell. loss: validation loss of its last step, nan if it diverged; spent: FLOPs
    so far, including lost steps (a branch: since its trunk); done: share of its steps; seconds:
    in which it was running; why: the reason if it ended without a loss."""

    cell: Cell
    status: CellStatus
    loss: float | None = None
    spent: float = 0.0
    done: float = 0.0
    seconds: float = 0.0
    why: str = ""

    @property
    def has_ended(self) -> bool:
        """True if it will not be started again."""
        return self.status in ENDED


def state_of(cell: Cell, run: Run, events: Sequence[StudyEvent], cost: str) -> CellState:
    """Return the state of a cell. events: the study's of it, since it was last let start again;
    cost: the convention of FLOPs that the study counts by."""
    state = _state(cell, run, events, cost)
    for event in events:
        if event["kind"] == "cell_excluded":
            return replace(state, status="excluded", why=event.get("why", ""))
    return state


def _state(cell: Cell, run: Run, events: Sequence[StudyEvent], cost: str) -> CellState:
    status: CellStatus
    if not run.config.is_file():
        if cell.waits_for:
            return CellState(cell, "waiting")
        # It may have ended before its run directory was created.
        status, why = _failure(events, run) or ("ready", "")
        return CellState(cell, status, why=why)
    view = Status(run)
    if view.state == "complete":  # whose last row may have come since the others were read
        view = Status(run)
    job, per = view.job, cell.flops[cost] / cell.tokens
    first, last = cell.trunk_step or 0, view.step + view.lost().steps
    windows = job.batch_ramp.samples(last) - job.batch_ramp.samples(first)
    state = CellState(
        cell,
        "ready",
        spent=max(0, windows) * job.tokens_per_window * per,
        done=view.step / job.total_steps,
        seconds=view.goodput.alive,
    )
    if (score := view.validation) and score["step"] == job.total_steps:
        state = replace(state, loss=score["loss"])
    if view.state == "complete":
        loss, chance = state.loss, math.log(getattr(job.model, "vocab_size", None) or math.inf)
        if loss is None:
            return replace(state, status="failed", why="its last step was not evaluated")
        if not loss < chance:
            why = f"its loss is {loss:.4g}; uniform guessing has {chance:.4g}"
            return replace(state, status="diverged", loss=math.nan, why=why)
        return replace(state, status="complete")
    if view.state != "running" and (failure := _failure(events, run)):
        return replace(state, status=failure[0], why=failure[1])
    if view.state == "new" or view.state == "imported" or view.state == "averaged":
        return state
    again: dict[str, CellStatus] = {"halted": "interrupted", "refused": "crashed"}
    return replace(state, status=again.get(view.state, cast(CellStatus, view.state)))


def _failure(events: Sequence[StudyEvent], run: Run) -> tuple[CellStatus, str] | None:
    """Return status and reason if another start would end the same way, else None."""
    ends = [e for e in events if e["kind"] == "cell_ended"]
    if not ends:  # in the queue: one for each job, with the code of the last attempt that has one
        launches = (launch_of(attempt.path) for attempt in reversed(run.attempts()))
        launch = next((one for one in launches if one), LaunchRecord())
        if (code := launch.get("code")) is not None:
            count = sum(e["kind"] == "cell_submitted" for e in events)
            ends = [{"kind": "", "code": code, "why": launch.get("how", "")}] * count
    if not ends:
        return None
    last, why = ends[-1], ends[-1].get("why", "")
    crashes = sum(e.get("code") not in (DONE, USER, INTERRUPTED, GAVE_UP) for e in ends)
    if any(read_rows(a.events.path, reason="halted") for a in run.attempts()[-1:]):
        return "diverged", why
    if last.get("code") in (USER, GAVE_UP) or crashes >= MOST_CRASHES:
        return "failed", why
    return None


class Study:
    """A planned study. Raises UserError if the directory holds no plan."""

    def __init__(self, folder: Path):
        self.folder, self._ended = folder, dict[str, CellState]()
        self.forecasts, self._plan = folder / "forecasts", folder / "plan.json"
        if not self._plan.is_file():
            problem = "holds no plan of a study"
            raise UserError(str(folder), problem, "make one: forescale study plan study=NAME")
        self.rows = RowWriter(folder / "events.jsonl")

    @classmethod
    def make(
        cls, folder: Path, job: StudyJob, plan: StudyPlan, facts: Mapping[str, Any]
    ) -> "Study":
        """Write the directory of a new study. facts: further entries of plan.json. Raises UserError
        if a study has been launched there."""
        must_be_free(folder)
        make_folder(folder)
        write_file(folder / "study.yaml", freeze(job).encode())
        write_json(folder / "plan.json", {**dump(plan), **facts})
        study = cls(folder)
        study.event("planned", cap=plan.cap)
        return study

    @cached_property
    def job(self) -> StudyJob:
        """The settings that the study was planned with."""
        return _frozen(self.folder / "study.yaml")

    @cached_property
    def plan(self) -> StudyPlan:
        """The plan as it is now."""
        return load(read_json(self._plan), str(self._plan))

    @contextmanager
    def deciding(self) -> Iterator[None]:
        """Hold the study's lock, which the kernel frees if the process dies. Raises UserError if
        another process holds it."""
        lock = FileLock(self.folder / "launcher.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            problem = "is being launched by another process"
            todo = "see forescale study status, or stop that process first"
            raise UserError(str(self.folder), problem, todo) from None
        try:
            yield
        finally:
            lock.release()

    def event(self, kind: str, **facts: Any) -> None:
        """Append an event, durably."""
        self.rows.add({"kind": kind, "time": time.time(), **facts})
        self.rows.sync()
        self.__dict__.pop("events", None)

    @cached_property
    def events(self) -> list[StudyEvent]:
        """All events since the study was last planned."""
        path = self.rows.path
        return _since_last([typed(StudyEvent, r, str(path)) for r in read_rows(path)], "planned")

    def revise(self, plan: StudyPlan, kind: str, **facts: Any) -> None:
        """Replace the plan, and record the reason as an event."""
        expected = {k: v for k, v in read_json(self._plan).items() if k == "expected"}
        write_json(self._plan, {**dump(plan), **expected})
        self.plan = plan
        self.event(kind, **facts)

    def run(self, name: str) -> Run:
        """Return the run of a cell."""
        return Run(self.folder / "cells" / name)

    def arguments(self, cell: Cell) -> list[str]:
        """Return the arguments of `forescale train` for a cell. Raises UserError if the study's
        files name one that no command line has."""
        keys = {**cell.keys, "run.root": str(self.folder / "cells")}
        if not any(text.startswith("logging.wandb.group=") for text in self.job.plan.shared):
            keys["logging.wandb.group"] = self.folder.name
        forecasts = {f.facts["target"]["run"]: f for f in reversed(read_forecasts(self.forecasts))}
        if cell.name in forecasts:
            keys["forecast"] = str(forecasts[cell.name].path)
        recipes = {r.name: r.arguments for r in self.plan.recipes}
        rates = {"optimizer.learning_rate", *(f"optimizer.{name}" for name in OTHER_RATES)}
        recipe = [t for t in recipes.get(cell.recipe, ()) if t.partition("=")[0] not in rates]
        # Each cell has its sizes, beside which model.depth would be refused.
        shared = [t for t in self.job.plan.shared + recipe if not t.startswith("model.depth=")]
        planned = [f"{k}={_quoted(v)}" for k, v in keys.items() if not is_set_by(recipe, k)]
        for text in (arguments := [*shared, *planned]):
            if not text.isprintable() or text.startswith("-"):
                problem = f"{text!r} is no argument KEY=VALUE of forescale train"
                todo = "restore the files of the study, or plan it again"
                raise UserError(str(self.folder), problem, todo)
        return arguments

    def state(self, cell: Cell) -> CellState:
        """Return the state of a cell. Once it has ended, the state is kept until `retry`."""
        if cell.name not in self._ended:
            events = [e for e in self.events if e.get("cell") == cell.name]
            events = _since_last(events, "cell_retried")
            state = state_of(cell, self.run(cell.name), events, self.plan.common.cost)
            if not state.has_ended:
                return state
            self._ended[cell.name] = state
        return self._ended[cell.name]

    def states(self) -> list[CellState]:
        """Return the states of all cells, in the plan's order."""
        return [self.state(c) for c in self.plan.cells]

    def unfinished(self) -> list[Cell]:
        """Return the cells to start or resume, in the plan's order, trunks before their branches.
        Cells of draft stages are left out. Cells that seem to run are included: the launcher knows
        which really do, and a recently written file may belong to a run that was killed since."""
        exact = {s.number for s in self.plan.stages if s.exact}
        todo = ("ready", "running", "interrupted", "crashed")
        cells = [s.cell for s in self.states() if s.status in todo and s.cell.stage in exact]
        return sorted(cells, key=lambda c: (c.stage, c.trunk is not None))

    @property
    def spent(self) -> float:
        """FLOPs of all cells so far; the target does not count against the cap."""
        return sum(s.spent for s in self.states() if s.cell.role != "target")

    def losses(self) -> dict[str, float]:
        """Return the losses of all cells that ended, by name; nan for those without a loss."""
        losses = {s.cell.name: s.loss for s in self.states() if s.has_ended}
        return {name: math.nan if loss is None else loss for name, loss in losses.items()}

    def excluded(self) -> set[str]:
        """Return the names of the cells that are excluded."""
        return {s.cell.name for s in self.states() if s.status == "excluded"}

    def retry(self, name: str) -> None:
        """Let a cell that ended without a loss start again."""
        self.event("cell_retried", cell=name)
        self._ended.pop(name, None)

    def table(self) -> pd.DataFrame:
        """Return the record of each complete cell, with columns of the plan; in a study of recipes
        also a row of each cell that diverged, with an infinite loss.

        stage, role, budget, batch; cell_of: the grid cell that it repeats or varies; fitted: True
        for the runs that a law is fitted to, the best learning rate of each size of a budget.
        """
        cells = {s.cell.name: s.cell for s in self.states() if s.status == "complete"}
        table, _ = of_runs([self.run(name) for name in cells])
        if table.empty:
            return table
        planned = [cells[name] for name in table["name"]]
        columns = {c: c for c in PLANNED[:3]} | {"batch": "global_batch"}
        if self.plan.recipes:
            columns |= {c: c for c in ("recipe", "budget", "edges")}
        table = table.assign(**{c: [getattr(x, of) for x in planned] for c, of in columns.items()})
        if self.plan.recipes:  # those that diverged bracket the learning rates below them
            columns |= {c: c for c in ("name", "learning_rate", "tokens")}
            diverged = [s.cell for s in self.states() if s.status == "diverged"]
            rows = [
                {**{c: getattr(x, of) for c, of in columns.items()}, "loss": math.inf,
                 **{f"flops_{convention}": flops for convention, flops in x.flops.items()}}
                for x in diverged
            ]  # fmt: skip
            table = pd.concat((table, pd.DataFrame(rows)), ignore_index=True)
        if self.plan.grid is not None:
            table["budget"] = [c.budget or c.cost for c in planned]
        swept = table[table["role"].isin(("grid", "rate")) & (table["stage"] > PILOT)]
        best = swept.groupby("cell_of")["loss"].idxmin()
        return table.assign(fitted=table.index.isin(best))


def must_be_free(folder: Path) -> None:
    """Raise UserError if a study has been launched in this directory."""
    if any((folder / "cells").glob("*/config.yaml")):
        problem = "has been launched, so its plan can't be replaced"
        raise UserError(str(folder), problem, "choose another study=NAME")


def _since_last(rows: list[StudyEvent], kind: str) -> list[StudyEvent]:
    """Return the last event of this kind and those after it; all events if there is none."""
    starts = [i for i, row in enumerate(rows) if row["kind"] == kind]
    return rows[starts[-1] :] if starts else rows


def _quoted(value: Any) -> str:
    """The value as Hydra's grammar reads it."""
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_quoted(x)}" for name, x in value.items()) + "}"
    if isinstance(value, str) and not _UNQUOTED.fullmatch(value):
        return "'" + value.replace("'", "\\'") + "'"
    return json.dumps(value) if isinstance(value, list) else str(value)


def _frozen(path: Path) -> StudyJob:
    """Return the settings of a file that this version or an earlier one wrote."""
    text = read_text(path)
    known, gone = _GONE.sub("", text), [match[0].strip() for match in _GONE.finditer(text)]
    for line in gone:
        if line not in _DEFAULTS:
            note = f"Note: {path} has {shortened(line, 80)!r}, which fits no longer read."
            print(note, file=sys.stderr)
    return thaw(StudyJob, path if known == text else known)


def settings(job: StudyJob, overrides: Sequence[str]) -> StudyJob:
    """Return the settings that the study was planned with, except for what `overrides` set. job:
    composed of `overrides`; it is returned itself if no study was planned."""
    frozen = job.folder / "study.yaml"
    if not frozen.is_file():
        return job
    tree, typed_tree = plain(_frozen(frozen)), plain(job)
    for name in _OF_COMMAND:
        tree[name] = typed_tree[name]
    for override in (*overrides, "study=", "studies=", "input="):
        *path, name = override.partition("=")[0].split(".")
        into, source = tree, typed_tree
        for part in path:
            into, source = into[part], source[part]
        into[name] = source[name]
    return build(StudyJob, tree)[0]
