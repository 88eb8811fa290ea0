"""`study status`: every cell of a study in a line, and what the whole has spent.

Invariant: derived, never stored; nothing is decided here.
"""

from collections import Counter

from rich.console import Group
from rich.markup import escape
from rich.text import Text

from forescale.console import table
from forescale.scaling.study.directory import State, Study

_COLOURS = {
    "running": "green", "complete": "cyan", "interrupted": "yellow", "crashed": "red",
    "diverged": "red", "failed": "red", "excluded": "yellow",
}  # fmt: skip
_COLUMNS = ("cell", "for", "N", "tokens", "batch", "rate", "state", "done", "loss", "spent", "time")


def board(study: Study) -> Group:
    """What is there of it now."""
    states = [s for s in study.states() if _is_exact(study, s)]
    counts = Counter(s.word for s in states)
    words = ", ".join(f"{n} {word}" for word, n in counts.most_common())
    drafts = len(study.plan.cells) - len(states)
    later = f"; {drafts} more in stages that await these" if drafts else ""
    spent, cap = study.spent, study.plan.cap
    paid = f"Spent {spent:.3g} of {cap:.3g} FLOPs ({spent / cap:.1%})."
    made = table(*_COLUMNS, left=("cell", "for", "state"))
    for s in states:
        made.add_row(*_row(s))
    whys = [f"{s.cell.name} {s.word}: {s.why}" for s in states if s.why]
    head = f"{study.folder}: {words}{later}. {paid}"
    return Group(Text(head), made, *map(Text, whys))


def _is_exact(study: Study, s: State) -> bool:
    return next(t for t in study.plan.stages if t.number == s.cell.stage).exact


def _row(s: State) -> list[str]:
    c, colour = s.cell, _COLOURS.get(s.word)
    return [
        escape(c.name),
        c.role,
        f"{c.shape.parameters:,}",
        f"{c.tokens:,}",
        f"{c.global_batch}",
        "awaits" if c.awaits else f"{c.learning_rate:.2g}",
        f"[{colour}]{s.word}[/]" if colour else s.word,
        f"{s.done:.0%}",
        f"{s.loss:.4f}" if s.loss is not None else "-",
        f"{s.spent:.2e}" if s.spent else "-",
        f"{s.seconds:.0f} s" if s.seconds else "-",
    ]
