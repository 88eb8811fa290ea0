"""What rows and records call the numbers of an ability, how such a name is read, and the line that
shows the shares of right answers.

Invariant: nobody else writes or reads these names. Imports no torch and no numpy.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

# share: of right answers; nats: mean loss of an answer; of each its standard error.
KINDS = ("share", "stderr", "nats", "nats_stderr")
_SHARE = KINDS[0]  # its column has no suffix
_COLUMN = re.compile(rf"ability/([^/]+)/(0|[1-9]\d*)(?:_({'|'.join(KINDS[1:])}))?")


class Column(NamedTuple):
    """A number of an ability. shots: solved examples before a question; kind: one of KINDS."""

    task: str
    shots: int
    kind: str = _SHARE

    @property
    def name(self) -> str:
        """Its name in rows and records, such as `ability/copy/4_nats`."""
        end = "" if self.kind == _SHARE else f"_{self.kind}"
        return f"ability/{self.task}/{self.shots}{end}"


def parsed(name: str) -> Column | None:
    """Return the column that has this name; None for the name of something else."""
    if (found := _COLUMN.fullmatch(name)) is None:
        return None
    task, shots, kind = found.groups(_SHARE)
    return Column(task, int(shots), kind)


def in_words(row: Mapping[str, Any]) -> str:
    """Return the shares of right answers that a row has, in a line; empty if it has none."""
    columns = ((parsed(name), share) for name, share in row.items())
    found = {(c.task, c.shots): x for c, x in columns if c is not None and c.kind == _SHARE}
    every = [*dict.fromkeys(shots for _, shots in found)]
    tasks = (
        f"{task} {', '.join(_percent(found.get((task, shots))) for shots in every)}"
        for task in dict.fromkeys(task for task, _ in found)
    )
    after = ", ".join(map(str, every))
    return f"right answers after {after} examples: {'; '.join(tasks)}" if found else ""


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"  # not measured: it does not fit
