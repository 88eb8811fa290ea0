"""The checkpoint that a branch begins with, at the run that it comes from.

Invariant: it is pinned there, so that retention there doesn't delete what the branch resumes from
until it has a checkpoint of its own. Imports no torch.
"""

from typing import Any

from forescale.checkpoint.reader import open_readable
from forescale.checkpoint.retention import pin
from forescale.errors import UserError
from forescale.run.directory import Run


def newest_step(run: Run) -> int:
    """Return the step of the newest eligible checkpoint of a run, not yet verified byte by byte: a
    rank does that when it loads it. Raises UserError if there is none."""
    for step in reversed(run.checkpoint_steps()):
        checkpoint = open_readable(run.checkpoint_path(step))
        if checkpoint is not None and run.is_eligible(checkpoint.attempt, step):
            return step
    todo = f"train it: forescale train {run.path}"
    raise UserError(str(run.path), "this run has no checkpoint yet", todo)


def hold(branch: Run, origin: Any, root: str, ahead: bool = False) -> list[str]:
    """Pin the checkpoint that a branch begins with, unless it has one of its own. Return a sentence
    if it can't be pinned, such as in the run of somebody else.

    origin: `run.from` of its job, with the step; root: where runs are looked for; ahead: the branch
    waits for a job that may have yet to make it. Raises UserError if there is no such checkpoint.
    """
    if origin.run is None or origin.step is None or branch.checkpoint_steps():
        return []
    run = Run.existing(origin.run, root)
    try:
        pin(run, origin.step, ahead=ahead)
    except OSError as e:
        where = run.checkpoint_path(origin.step)
        return [f"{where} can't be pinned ({e.strerror}); it may be deleted there."]
    return []
