"""The table of all runs: what their files and the queue say of each, in a line.

Invariant: derived, never stored; a run that can't be read is named, and hides no other.
"""

from collections.abc import Collection, Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from forescale.errors import UserError
from forescale.monitor.status import Status, ago
from forescale.run.directory import read_rows
from forescale.slurm.queue import Job

_COLOURS = {
    "running": "green",
    "complete": "cyan",
    "interrupted": "yellow",
    "queued": "yellow",
    "crashed": "red",
}
_RECENT = 20  # steps that a speed is taken over
_COLUMNS = (
    "run", "state", "attempt", "step", "done", "loss", "bits/byte", "tokens/s", "MFU", "ETTR",
    "ETA", "saved", "seen", "last event",
)  # fmt: skip
_NARROW = ("run", "state", "step", "done", "loss", "tokens/s", "ETA", "saved")
_WIDE = 120  # columns of a terminal from which all are shown


def show_runs(runs: Sequence[Status], console: Console, jobs: Mapping[str, Job]) -> None:
    """jobs: those that the queue holds, by the run's name."""
    names = _COLUMNS if console.width >= _WIDE else _NARROW
    made = table(*names, left=("run", "state", "last event"))
    faults = []
    for status in sorted(runs, key=lambda s: s.age):
        name = escape(status.run.name)
        try:
            cells = {"run": name, **_cells(status, jobs.get(status.run.name))}
        except UserError as e:  # one damaged run must not hide the others
            cells = {"run": name, "state": "[red]unreadable[/]"}
            faults.append(str(e))
        made.add_row(*(cells.get(column, "-") for column in names))
    console.print(made)
    for fault in faults:
        console.print(escape(fault), soft_wrap=True)


def _cells(s: Status, job: Job | None) -> dict[str, str]:
    total, last, recent = s.job.total_steps, s.validation, s.train[-_RECENT:]
    found = {
        "state": state_of(s, job),
        "attempt": str(s.attempts[-1].number) if s.attempts else "-",
        "step": f"{s.step:,}/{total:,}",
        "done": f"{s.step / total:.1%}",
        "bits/byte": f"{last['bits_per_byte']:.4f}" if last else "-",
        "ETTR": f"{s.goodput.ettr:.2f}" if s.goodput.wall else "-",
        "saved": f"{ago(s.now - s.saved)} ago" if s.saved else "-",
        "seen": f"{ago(s.age)} ago",
        "last event": _last_event(s),
    }
    if recent:
        seconds = sum(sum(row["seconds"].values()) for row in recent) / len(recent)
        mfu = recent[-1].get("mfu")
        found |= {
            "loss": f"{recent[-1]['loss']:.4f}",
            "tokens/s": f"{s.job.tokens_per_step / seconds:,.0f}" if seconds else "-",
            "MFU": f"{mfu:.1%}" if mfu else "-",
            "ETA": ago(seconds * (total - s.step)) if s.step < total else "-",
        }
    return found


def _last_event(s: Status) -> str:
    """Of those that tell of something, not of every save."""
    rows = [row for a in s.attempts[-2:] for row in read_rows(a.events.path)]
    kinds = [row["kind"] for row in rows if row["kind"] != "checkpoint_saved"]
    return kinds[-1].replace("_", " ") if kinds else "-"


def state_of(s: Status, job: Job | None) -> str:
    """By the queue where it holds the run, else as the run's files tell."""
    if job is None or s.state == "complete":
        return _coloured(s.state)
    if job.is_waiting:
        return f"{_coloured('queued')} ({escape(job.reason)})"
    word = "running" if job.state == "RUNNING" else job.state.lower()
    return _coloured(word)


def _coloured(state: str) -> str:
    return f"[{_COLOURS[state]}]{state}[/]" if state in _COLOURS else state


def table(*names: str, left: Collection[str] = ()) -> Table:
    """One without lines, numbers to the right."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in names:
        made.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    return made
