"""The table of `study status`: one line per cell, and what the study has spent.

Invariant: everything is derived from the study's files; nothing is stored or decided here.
"""

from collections import Counter

from rich.console import Group
from rich.markup import escape
from rich.text import Text

from forescale.console import table
from forescale.scaling.study.directory import Study
from forescale.scaling.study.states import CellState

_COLOURS = {
    "running": "green", "complete": "cyan", "interrupted": "yellow", "crashed": "red",
    "diverged": "red", "failed": "red", "excluded": "yellow",
}  # fmt: skip
_COLUMNS = (
    "cell", "role", "N", "tokens", "batch", "rate", "state", "done", "loss", "spent", "time",
)  # fmt: skip


def board(study: Study) -> Group:
    """Return the table of all cells but those of draft stages."""
    exact = {stage.number for stage in study.plan.stages if stage.exact}
    states = [s for s in study.states() if s.cell.stage in exact]
    counts = Counter(s.status for s in states)
    summary = ", ".join(f"{n} {status}" for status, n in counts.most_common())
    drafts = len(study.plan.cells) - len(states)
    later = f"; {drafts} more in later stages, which depend on these" if drafts else ""
    spent, cap = study.spent, study.plan.cap
    paid = f"Spent {spent:.3g} of {cap:.3g} FLOPs ({spent / cap:.1%})."
    rows = table(*_COLUMNS, left=("cell", "role", "state"))
    for s in states:
        rows.add_row(*_row(s))
    whys = [f"{s.cell.name} {s.status}: {s.why}" for s in states if s.why]
    head = f"{study.folder}: {summary}{later}. {paid}"
    return Group(Text(head), rows, *map(Text, whys))


def _row(s: CellState) -> list[str]:
    c, colour = s.cell, _COLOURS.get(s.status)
    return [
        escape(c.name),
        c.role,
        f"{c.shape.parameters:,}",
        f"{c.tokens:,}",
        f"{c.global_batch}",
        "pending" if c.waits_for else f"{c.learning_rate:.2g}",
        f"[{colour}]{s.status}[/]" if colour else s.status,
        f"{s.done:.0%}",
        f"{s.loss:.4f}" if s.loss is not None else "-",
        f"{s.spent:.2e}" if s.spent else "-",
        f"{s.seconds:.0f} s" if s.seconds else "-",
    ]
