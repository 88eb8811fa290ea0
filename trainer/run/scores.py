"""Whether a step of a run has been evaluated.

A step is saved before it is evaluated, so a run can be killed in between: it isn't complete then,
and the next attempt evaluates first. Invariant: derived from rows and events, never stored.
"""

from forescale.run.directory import Run
from forescale.run.rows import RowReader, select


def is_evaluated(run: Run, step: int) -> bool:
    """Return True if the rows of the run hold the loss of `step` over all held-out text, or its
    events say that there is none."""
    rows = RowReader(run.metrics, kind="validation").read()
    if select(rows, step=step, dataset="validation"):
        return True
    empty = run.read_events(kind="nothing_to_validate", step=step)
    return any(event.get("dataset", "validation") == "validation" for event in empty)
