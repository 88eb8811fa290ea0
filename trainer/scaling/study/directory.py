"""A study on disk: what is to be run, what was decided on the way, what came of it.

    studies/<name>/
      study.yaml         what `study plan` was told, frozen
      plan.json          all cells, stage by stage; written anew, whole, at each revision
      events.jsonl       revisions, ends of cells, exclusions with their reasons
      cells/<cell>/      a run each
      logs/<cell>.log    what its launcher said
      forecasts/         see forecast.py

Invariant: stored are facts and decisions; states, losses and costs are read from the runs. One
process at a time decides (`deciding`), and each decision is one atomic file: whoever is killed is
gone on from by the same command.
"""

import fcntl
import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from forescale.config.frozen import freeze, thaw
from forescale.config.schema import build, plain
from forescale.errors import DONE, GAVE_UP, INTERRUPTED, USER, UserError
from forescale.monitor.status import Status
from forescale.resilience.outcome import launch_of
from forescale.run.directory import Rows, Run, read_rows
from forescale.run.forecast import Card, cards
from forescale.scaling.config import StudyJob
from forescale.scaling.design import plans
from forescale.scaling.design.cells import Cell
from forescale.scaling.design.plan import Plan
from forescale.scaling.records.records import of_runs
from forescale.storage import read_json, write_file, write_json

Word = Literal[
    "awaits", "ready", "running", "interrupted", "crashed", "complete", "diverged", "failed",
    "excluded",
]  # fmt: skip
ENDED = ("complete", "diverged", "failed", "excluded")  # nothing more comes of such a cell
_PLAIN = re.compile(r"[\w./ %+-]*")
MOST_DEATHS = 3  # of a cell's launcher, by whatever killed it
TARGET = "target"  # the run that all the others are for


@dataclass(frozen=True)
class State:
    """Of a cell. loss: held-out, of its last step, nan where it diverged or failed; spent: FLOPs so
    far, lost steps included, a branch from where it left its trunk; done: share of its steps; why:
    it ended without a loss."""

    cell: Cell
    word: Word
    loss: float | None = None
    spent: float = 0.0
    done: float = 0.0
    seconds: float = 0.0
    why: str = ""

    @property
    def has_ended(self) -> bool:
        return self.word in ENDED


class Study:
    """Raises UserError where the directory holds no plan."""

    def __init__(self, folder: Path):
        self.folder, self._ended = folder, dict[str, State]()
        if not self._plan.is_file():
            what = "holds no plan of a study"
            raise UserError(str(folder), what, "make one: forescale study plan study=NAME")
        self.rows = Rows(folder / "events.jsonl")

    @classmethod
    def make(cls, folder: Path, job: StudyJob, plan: Plan, more: Mapping[str, Any]) -> "Study":
        """Begin a study. Raises UserError where one has been launched there."""
        must_be_free(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "study.yaml", freeze(job).encode())
        write_json(folder / "plan.json", {**plans.dump(plan), **more})
        made = cls(folder)
        made.event("planned", cap=plan.cap)
        return made

    @property
    def _plan(self) -> Path:
        return self.folder / "plan.json"

    @cached_property
    def job(self) -> StudyJob:
        return thaw(StudyJob, self.folder / "study.yaml")

    @property
    def has_target(self) -> bool:
        return any(c.role == "target" for c in self.plan.cells)

    @cached_property
    def plan(self) -> Plan:
        try:
            return plans.load(read_json(self._plan))
        except (KeyError, TypeError, ValueError) as e:
            what = f"is no plan that this version reads ({e})"
            raise UserError(str(self._plan), what, "restore it, or plan a new study") from None

    @property
    def forecasts(self) -> Path:
        return self.folder / "forecasts"

    @contextmanager
    def deciding(self) -> Iterator[None]:
        """Alone. Raises UserError where another process decides for this study; the kernel frees
        it when that dies."""
        with open(self.folder / "launcher.lock", "w") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                what = "is being launched by another process"
                todo = "look with forescale study status, or stop that one first"
                raise UserError(str(self.folder), what, todo) from None
            yield

    def event(self, kind: str, **facts: Any) -> None:
        self.rows.add({"kind": kind, "time": time.time(), **facts})
        self.rows.sync()
        self.__dict__.pop("events", None)

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """Since it was planned the last time."""
        rows = read_rows(self.rows.path)
        plans_made = [i for i, row in enumerate(rows) if row["kind"] == "planned"]
        return rows[plans_made[-1] :] if plans_made else rows

    def revise(self, plan: Plan, kind: str, **facts: Any) -> None:
        """The plan from now on, and why."""
        kept = {k: v for k, v in read_json(self._plan).items() if k == "expected"}
        write_json(self._plan, {**plans.dump(plan), **kept})
        self.plan = plan
        self.event(kind, **facts)

    # What came of it

    def run(self, name: str) -> Run:
        return Run(self.folder / "cells" / name)

    def words(self, cell: Cell) -> list[str]:
        """The command line of its run, after `train`."""
        own = {**cell.keys, "run.root": str(self.folder / "cells")}
        if card := self._card_of(cell.name):
            own["forecast"] = str(card.path)
        typed = [f"{key}={_word(value)}" for key, value in own.items()]
        return [*self.job.plan.shared, *typed]

    def _card_of(self, name: str) -> Card | None:
        return next((c for c in cards(self.forecasts) if c.facts["target"]["run"] == name), None)

    def state(self, cell: Cell) -> State:
        """What has ended stays as it was, until `retry`."""
        if cell.name not in self._ended:
            found = self._state(cell)
            if not found.has_ended:
                return found
            self._ended[cell.name] = found
        return self._ended[cell.name]

    def states(self) -> list[State]:
        return [self.state(c) for c in self.plan.cells]

    def wanted(self) -> list[Cell]:
        """What is to begin or to go on, in the plan's order, trunks before what branches off them;
        nothing of a stage that is a draft. What seems to run is among it: the one who decides knows
        what does, and files that grew a moment ago may be those of a run that was killed since."""
        exact = {s.number for s in self.plan.stages if s.exact}
        todo = ("ready", "running", "interrupted", "crashed")
        found = [s.cell for s in self.states() if s.word in todo and s.cell.stage in exact]
        return sorted(found, key=lambda c: (c.stage, c.trunk is not None))

    @property
    def spent(self) -> float:
        """FLOPs of all cells so far; the target is paid for beside the cap."""
        return sum(s.spent for s in self.states() if s.cell.role != "target")

    def losses(self) -> dict[str, float]:
        """Of all cells that ended: nan for those that came to nothing."""
        found = {s.cell.name: s.loss for s in self.states() if s.has_ended}
        return {name: math.nan if loss is None else loss for name, loss in found.items()}

    def _state(self, cell: Cell) -> State:
        run = self.run(cell.name)
        excluded = self._told("excluded", cell.name)
        if not run.config.is_file():
            word: Word = "excluded" if excluded else "awaits" if cell.awaits else "ready"
            why = excluded["why"] if excluded else ""
            if word == "ready":  # it may have ended before it came to be a run
                word, why = self._given_up(cell.name, run) or (word, why)
            return State(cell, word, why=why)
        status = Status(run)
        total, per = status.job.total_steps, cell.flops[self.plan.common.cost] / cell.tokens
        steps = status.step - (cell.trunk_step or 0) + status.lost().steps
        known = {
            "spent": max(0, steps) * status.job.tokens_per_step * per,
            "done": status.step / total,
            "seconds": status.goodput.wall,
        }
        scored = status.validation
        loss = scored["loss"] if scored and scored["step"] == total else None
        word = status.state if status.state != "new" else "ready"
        why = ""
        if word == "complete":
            word, loss, why = self._judged(loss, status)
        elif word != "running":
            word, why = self._given_up(cell.name, run) or (word, "")
        if excluded:
            word, why = "excluded", excluded["why"]
        return State(cell, word, loss, why=why, **known)

    @staticmethod
    def _judged(loss: float | None, status: Status) -> tuple[Word, float | None, str]:
        """Of a run that has made all its steps."""
        chance = math.log(getattr(status.job.model, "vocab_size", None) or math.inf)
        if loss is None:
            return "failed", None, "its last step was not evaluated"
        if not loss < chance:
            return "diverged", math.nan, f"its loss is {loss:.4g}, that of guessing {chance:.4g}"
        return "complete", loss, ""

    def _given_up(self, name: str, run: Run) -> tuple[Word, str] | None:
        """Whether its ends so far tell that another start would end no better."""
        own = self._since_retry(name)
        ends = [e for e in own if e["kind"] == "ended"] or self._ends_in_queue(own, run)
        if not ends:
            return None
        last = ends[-1]
        deaths = sum(e["code"] not in (DONE, USER, INTERRUPTED, GAVE_UP) for e in ends)
        if any(row.get("reason") == "halted" for a in run.attempts()[-1:] for row in _events(a)):
            return "diverged", last["why"]
        if last["code"] in (USER, GAVE_UP) or deaths >= MOST_DEATHS:
            return "failed", last["why"]
        return None

    @staticmethod
    def _ends_in_queue(own: Sequence[Mapping[str, Any]], run: Run) -> list[dict[str, Any]]:
        """Of its jobs: one end for each that was submitted, as its last attempt tells."""
        times = sum(e["kind"] == "submitted" for e in own)
        told = next((t for a in reversed(run.attempts()) if (t := launch_of(a.path))), {})
        code = told.get("code")
        return [] if code is None else [{"code": code, "why": told.get("how", "")}] * times

    def _since_retry(self, name: str) -> list[dict[str, Any]]:
        own = [e for e in self.events if e.get("cell") == name]
        retries = [i for i, e in enumerate(own) if e["kind"] == "retry"]
        return own[retries[-1] :] if retries else own

    def _told(self, kind: str, name: str) -> dict[str, Any] | None:
        return next((e for e in self._since_retry(name) if e["kind"] == kind), None)

    def retry(self, name: str) -> None:
        """Count nothing of what a cell came to so far."""
        self.event("retry", cell=name)
        self._ended.pop(name, None)

    def table(self) -> pd.DataFrame:
        """A record of each complete cell, with what the plan says of it: stage, role, budget, the
        cell that it repeats or tunes (`cell_of`), and whether a law is fitted to it (`fitted`): the
        best learning rate of each size of a budget. Seeds and batches measure noise and gap."""
        cells = {s.cell.name: s.cell for s in self.states() if s.word == "complete"}
        table, _ = of_runs([self.run(name) for name in cells])
        if table.empty:
            return table
        own = [cells[name] for name in table["name"]]
        table = table.assign(
            stage=[c.stage for c in own],
            role=[c.role for c in own],
            cell_of=[c.of for c in own],
            batch=[c.global_batch for c in own],
        )
        if self.plan.grid is not None:
            table["budget"] = [c.budget or c.cost for c in own]
        best = table[table["role"].isin(("grid", "rate"))].groupby("cell_of")["loss"].idxmin()
        return table.assign(fitted=table.index.isin(best))


def must_be_free(folder: Path) -> None:
    """Raises UserError where a study has been launched."""
    if any((folder / "cells").glob("*/config.yaml")):
        what = "has been launched: what was spent belongs to the plan that it was spent on"
        raise UserError(str(folder), what, "choose another study=NAME")


def _events(attempt: Any) -> list[dict[str, Any]]:
    return read_rows(attempt.events.path)


def _word(value: Any) -> str:
    """As Hydra's grammar reads it back."""
    if value is None:
        return "null"
    if isinstance(value, str) and not _PLAIN.fullmatch(value):
        return "'" + value.replace("'", "\\'") + "'"
    return json.dumps(value) if isinstance(value, list) else str(value)


def settings(job: StudyJob, words: Sequence[str]) -> StudyJob:
    """What a study was planned with, under what is typed now (`words`, composed to `job`); `job`
    itself where nothing was planned."""
    frozen = job.folder / "study.yaml"
    if not frozen.is_file():
        return job
    tree, typed = plain(thaw(StudyJob, frozen)), plain(job)
    for word in (*words, "study=", "studies=", "input="):
        *path, name = word.partition("=")[0].split(".")
        into, said = tree, typed
        for part in path:
            into, said = into[part], said[part]
        into[name] = said[name]
    return build(StudyJob, tree)[0]
