"""Prints the table of all runs, with the columns that fit.

Invariant: a run that can't be read is reported and doesn't hide the others. What is not shown is
not read: most columns need only the last rows of a run.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from forescale.ground.console import span, table, visible
from forescale.ground.errors import UserError
from forescale.monitor.run_text import runs_now, state_of
from forescale.monitor.status import Status

if TYPE_CHECKING:
    from forescale.slurm.queue import Job
    from forescale.slurm.queue_cache import EarlyEnd

_COLUMNS = (
    "run", "state", "attempt", "step", "done", "loss", "bits/byte", "tokens/s", "MFU", "ETTR",
    "ETA", "saved", "seen", "last event",
)  # fmt: skip
_BETWEEN = 2  # spaces between two columns of console.table
_LEAST_FIRST = ("last event", "attempt", "ETTR", "MFU", "seen", "done", "saved", "loss", "ETA")


def show_runs(
    runs: Sequence[Status],
    console: Console,
    jobs: Mapping[str, "Job"],
    ends: Mapping[str, "EarlyEnd"],
) -> None:
    """Print a table of all runs, with the columns that fit. jobs: those in the queue, by the run's
    name; ends: those of which no rank began."""
    rows, faults = [], []
    for status in sorted(runs, key=lambda s: s.age):
        name = status.run.name
        status.job_runs = runs_now(jobs.get(name))
        cells = {"run": escape(name)}
        try:
            cells |= _cells(status, jobs.get(name), ends.get(name))
            if status.reason and name not in jobs:
                faults.append(f"{name}: {status.reason}")
            if name in ends and status.state != "complete":
                faults.append(f"{name}: {ends[name].sentence} See forescale logs {name}")
        except UserError as e:  # one damaged run must not hide the others
            cells["state"] = "[red]unreadable[/]"
            faults.append(str(e))
        rows.append((status, cells))
    names = _columns([cells for _, cells in rows], console.width)
    for status, cells in rows if "ETTR" in names else []:  # for it all rows are read
        if "ETTR" in cells:
            cells["ETTR"] = "-"
            try:
                if status.goodput.wall:
                    cells["ETTR"] = f"{status.goodput.ettr:.2f}"
            except UserError as e:
                faults.append(str(e))
    grid = table(*names, left=("run", "state", "last event"))
    for _, cells in rows:
        grid.add_row(*(cells.get(name, "-") for name in names))
    console.print(grid)
    for fault in faults:
        console.print(escape(fault), soft_wrap=True)


def _columns(rows: Sequence[Mapping[str, str]], width: int) -> list[str]:
    """Return the names of the columns that fit, the most wanted ones."""
    names, wide = list(_COLUMNS), {}
    for name in names:  # control characters as they are shown
        cells = (Text.from_markup(visible(of.get(name, "-"))).cell_len for of in rows)
        wide[name] = max(len(name), *cells)
    for column in _LEAST_FIRST:
        if sum(wide[name] + _BETWEEN for name in names) - _BETWEEN <= width:
            break
        names.remove(column)
    return names


def _cells(s: Status, job: "Job | None", end: "EarlyEnd | None") -> dict[str, str]:
    total, last = s.job.total_steps, s.validation
    steps = {"step": f"{s.step:,}/{total:,}", "done": f"{s.step / total:.1%}"}
    cells = {
        "state": state_of(s, job, end),
        "attempt": str(s.attempts[-1].number) if s.attempts else "-",
        **({} if s.run.weights_alone else steps),
        "bits/byte": f"{last['bits_per_byte']:.4f}" if last and "bits_per_byte" in last else "-",
        "ETTR": "0.00",  # as wide as the number, which is added if there is room for it
        "saved": f"{span(max(0.0, s.now - s.saved))} ago" if s.saved else "-",
        "seen": f"{span(s.age)} ago",
        "last event": escape((s.last_event or "-").replace("_", " ")),
    }
    if s.last:
        mfu, rate, left = s.last.get("mfu"), s.tokens_per_second, s.seconds_left
        cells |= {
            "loss": f"{s.last.get('loss', math.nan):.4f}",
            "tokens/s": f"{rate:,.0f}" if rate else "-",
            "MFU": f"{mfu:.1%}" if mfu else "-",
            "ETA": span(left) if left else "-",
        }
    return cells
