"""The state of a cell, as its run and the study's events of it have it.

Invariant: a state is derived, never stored.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Required, cast

from typing_extensions import TypedDict

from forescale.ground.errors import DONE, GAVE_UP, INTERRUPTED, USER
from forescale.ground.typed import Count, Whole
from forescale.monitor.status import Status
from forescale.resilience.outcome import LaunchRecord, launch_of
from forescale.run.directory import Run
from forescale.run.rows import read_rows
from forescale.scaling.design.cells import Cell

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
    wall clock; why: the reason if it ended without a loss."""

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
    job, per = view.job, cell.flops[cost] / cell.tokens
    first, last = cell.trunk_step or 0, view.step + view.lost().steps
    windows = job.batch_ramp.samples(last) - job.batch_ramp.samples(first)
    state = CellState(
        cell,
        "ready",
        spent=max(0, windows) * job.tokens_per_window * per,
        done=view.step / job.total_steps,
        seconds=view.goodput.wall,
    )
    last_score = view.validation
    if last_score and last_score["step"] == job.total_steps:
        state = replace(state, loss=last_score["loss"])
    if view.state == "complete":
        loss, chance = state.loss, math.log(getattr(job.model, "vocab_size", None) or math.inf)
        if loss is None:
            return replace(state, status="failed", why="its last step was not evaluated")
        if not loss < chance:
            why = f"its loss is {loss:.4g}; uniform guessing has {chance:.4g}"
            return replace(state, status="diverged", loss=math.nan, why=why)
        return replace(state, status="complete")
    if view.state == "running":
        return replace(state, status="running")
    if failure := _failure(events, run):
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
