"""`forescale study status`: the table of a study, one line per cell, and what it has spent."""

import time
from collections import Counter
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from forescale.config.job import Action
from forescale.ground.console import open_console, table
from forescale.ground.document import is_json, tell, tell_line
from forescale.ground.errors import DONE
from forescale.scaling.actions.shared import STUDY
from forescale.scaling.config import StudyJob
from forescale.scaling.study.directory import CellState, Study

# The document of `study status` and `study sync`. later: number of cells of draft stages.
BOARD = {"path": str, "cells": list[dict], "spent": float, "cap": float, "later": int}
ACTION = Action(
    "Show the state, loss and cost of every run of a study.",
    (*STUDY, "live"),
    ("study status study=mine --live",),
    BOARD,
    "with --live, every two seconds",
)
_REDRAW = 2.0  # seconds between two drawings of the live table
_COLOURS = {
    "running": "green", "complete": "cyan", "interrupted": "yellow", "crashed": "red",
    "diverged": "red", "failed": "red", "excluded": "yellow",
}  # fmt: skip
_COLUMNS = (
    "cell", "role", "N", "tokens", "batch", "rate", "state", "done", "loss", "spent", "time",
)  # fmt: skip


def main(job: StudyJob) -> int:
    """Print the board of the study; with `live`, redraw it until Ctrl-C."""
    console = open_console()
    while is_json():
        (tell_line if job.live else tell)(_facts(Study(job.folder)))
        if not job.live:
            return DONE
        time.sleep(_REDRAW)
    if not job.live:
        console.print(_board(Study(job.folder)))
        return DONE
    with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
        while True:
            live.update(_board(Study(job.folder)), refresh=True)
            time.sleep(_REDRAW)


def _exact(study: Study) -> list[CellState]:
    """Return the states of all cells but those of draft stages."""
    exact = {stage.number for stage in study.plan.stages if stage.exact}
    return [s for s in study.states() if s.cell.stage in exact]


def _facts(study: Study) -> dict[str, Any]:
    """Return the board for programs."""
    cells = [
        vars(s) | {"cell": s.cell.name, "role": s.cell.role, "tokens": s.cell.tokens}
        for s in _exact(study)
    ]
    facts = {"path": study.folder, "cells": cells, "later": len(study.plan.cells) - len(cells)}
    return {**facts, "spent": study.spent, "cap": study.plan.cap}


def _board(study: Study) -> Group:
    """Return the table of all cells but those of draft stages."""
    states = _exact(study)
    counts = Counter(s.status for s in states)
    summary = ", ".join(f"{n} {status}" for status, n in counts.most_common())
    drafts = len(study.plan.cells) - len(states)
    later = f"; {drafts} more in later stages, which depend on these" if drafts else ""
    spent, cap = study.spent, study.plan.cap
    paid = f"Spent {spent:.3g} of {cap:.3g} FLOPs ({spent / cap:.1%})."
    rows = table(*_COLUMNS, left=("cell", "role", "state"))
    for s in states:
        c, colour = s.cell, _COLOURS.get(s.status)
        rows.add_row(
            escape(c.name), c.role, f"{c.shape.parameters:,}", f"{c.tokens:,}", f"{c.global_batch}",
            "pending" if c.waits_for else f"{c.learning_rate:.2g}",
            f"[{colour}]{s.status}[/]" if colour else s.status, f"{s.done:.0%}",
            f"{s.loss:.4f}" if s.loss is not None else "-",
            f"{s.spent:.2e}" if s.spent else "-", f"{s.seconds:.0f} s" if s.seconds else "-",
        )  # fmt: skip
    whys = [f"{s.cell.name} {s.status}: {s.why}" for s in states if s.why]
    head = f"{study.folder}: {summary}{later}. {paid}"
    return Group(Text(head), rows, *map(Text, whys))
