"""The state of a cell, as its run and the study's events of it have it.

Invariant: a state is derived, never stored.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from forescale.errors import DONE, GAVE_UP, INTERRUPTED, USER
from forescale.monitor.status import Status
from forescale.resilience.outcome import launch_of
from forescale.run.directory import Run
from forescale.run.rows import read_rows
from forescale.scaling.design.cells import Cell

CellStatus = Literal[
    "waiting", "ready", "running", "interrupted", "crashed", "complete", "diverged", "failed",
    "excluded",
]  # fmt: skip
ENDED = ("complete", "diverged", "failed", "excluded")  # such a cell is not started again
MOST_CRASHES = 3  # a cell that crashed this often has failed


@dataclass(frozen=True)
class CellState:
    """The state of a cell.

    loss: validation loss of its last step, nan if it diverged; spent: FLOPs so far, including lost
    steps (a branch: since its trunk); done: share of its steps; seconds: wall clock; why: the
    reason if it ended without a loss.
    """

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


def state_of(cell: Cell, run: Run, events: Sequence[Mapping[str, Any]], cost: str) -> CellState:
    """Return the state of a cell. events: the study's of it, since it was last let start again;
    cost: the convention of FLOPs that the study counts by."""
    excluded = next((e for e in events if e["kind"] == "cell_excluded"), None)
    status: CellStatus
    if not run.config.is_file():
        status, why = "waiting" if cell.waits_for else "ready", ""
        if excluded:
            status, why = "excluded", excluded["why"]
        elif status == "ready":  # it may have ended before its run directory was made
            status, why = _given_up(events, run) or (status, why)
        return CellState(cell, status, why=why)
    seen = Status(run)
    total, per = seen.job.total_steps, cell.flops[cost] / cell.tokens
    first, last = cell.trunk_step or 0, seen.step + seen.lost().steps
    windows = seen.job.batch_ramp.samples(last) - seen.job.batch_ramp.samples(first)
    known = {
        "spent": max(0, windows) * seen.job.tokens_per_window * per,
        "done": seen.step / total,
        "seconds": seen.goodput.wall,
    }
    scored = seen.validation
    loss = scored["loss"] if scored and scored["step"] == total else None
    state, why = seen.state, ""
    status = "ready" if state == "new" or state == "imported" or state == "averaged" else state
    if status == "complete":
        status, loss, why = _judged(loss, seen)
    elif status != "running":
        status, why = _given_up(events, run) or (status, "")
    if excluded:
        status, why = "excluded", excluded["why"]
    return CellState(cell, status, loss, why=why, **known)


def _judged(loss: float | None, seen: Status) -> tuple[CellStatus, float | None, str]:
    """Status, loss and reason of a run that has made all its steps."""
    chance = math.log(getattr(seen.job.model, "vocab_size", None) or math.inf)
    if loss is None:
        return "failed", None, "its last step was not evaluated"
    if not loss < chance:
        return (
            "diverged",
            math.nan,
            f"its loss is {loss:.4g}; uniform guessing has {chance:.4g}",
        )
    return "complete", loss, ""


def _given_up(events: Sequence[Mapping[str, Any]], run: Run) -> tuple[CellStatus, str] | None:
    """Status and reason if another start would end the same way, else None."""
    ends = [e for e in events if e["kind"] == "cell_ended"] or _ends_in_queue(events, run)
    if not ends:
        return None
    last = ends[-1]
    crashes = sum(e["code"] not in (DONE, USER, INTERRUPTED, GAVE_UP) for e in ends)
    if any(read_rows(a.events.path, reason="halted") for a in run.attempts()[-1:]):
        return "diverged", last["why"]
    if last["code"] in (USER, GAVE_UP) or crashes >= MOST_CRASHES:
        return "failed", last["why"]
    return None


def _ends_in_queue(events: Sequence[Mapping[str, Any]], run: Run) -> list[dict[str, Any]]:
    """One end for each submitted job, all with the code of the last attempt that has one."""
    times = sum(e["kind"] == "cell_submitted" for e in events)
    launch = next((t for a in reversed(run.attempts()) if (t := launch_of(a.path))), {})
    code = launch.get("code")
    return [] if code is None else [{"code": code, "why": launch.get("how", "")}] * times
