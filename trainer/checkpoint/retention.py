"""Which checkpoints of a run are kept, deleting the others, and pins.

    checkpoints/step-00001000/       a checkpoint
    checkpoints/step-00001000.pin    an empty file: keep this checkpoint

Invariant: a checkpoint is deleted only after the newest `keep` eligible ones were re-read from the
storage and verified. An attempt that a newer one has replaced deletes nothing. A checkpoint that
can't be read stays, so that `check` can report it. Imports no torch.
"""

import math
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forescale.checkpoint.choice import find_faults, open_readable
from forescale.config.sections.batch import Cadence
from forescale.config.train import TrainJob
from forescale.engine.ranks import ALONE, Ranks
from forescale.ground.errors import UserError
from forescale.ground.storage import fsync_path, write_file
from forescale.run.directory import Run
from forescale.run.rows import RowReader, select

_LEFTOVER = re.compile(r"\.step-\d+\.(attempt-(\d+)\.(stage|replaced)|replaced|deleted)")


@dataclass(frozen=True)
class Keep:
    """The rule of what to keep. newest: number of newest eligible checkpoints; every: all at the
    steps of this cadence; best: the one with the lowest validation loss; at: these steps; decay:
    the newest one up to this step, where the decay begins, because a longer run can only continue
    from there."""

    newest: int = 2
    every: Cadence | None = None
    best: bool = False
    at: frozenset[int] = frozenset()
    decay: int | None = None


@dataclass(frozen=True)
class CheckpointFacts:
    """The properties of a checkpoint that retention reads. eligible: on the current trajectory and
    not known to be damaged; loss: the validation loss at its step, None if unknown."""

    step: int
    attempt: int
    eligible: bool
    pinned: bool = False
    loss: float | None = None


def keep_of(job: TrainJob, newest: int | None = None) -> Keep:
    """Return the rule of a job's config; newest: another number of newest ones."""
    rules = job.checkpoint
    return Keep(
        newest=rules.keep if newest is None else newest,
        every=job.cadence(rules.keep_every) if rules.keep_every else None,
        best=rules.keep_best,
        at=frozenset(rules.at),
        decay=job.decay_begins if job.has_decay else None,
    )


def reasons(checkpoints: Sequence[CheckpointFacts], keep: Keep) -> dict[int, str]:
    """Return the steps of the checkpoints to keep, each with the reason. Pure."""
    good = sorted((f for f in checkpoints if f.eligible), key=lambda f: f.step)
    scored = [f for f in good if f.loss is not None]
    newest = max(((f.attempt, f.step) for f in good), default=(0, 0))
    stay: dict[int, str] = {}
    for f in good[-keep.newest :]:
        stay[f.step] = f"one of the newest {keep.newest}"
    for f in good if keep.every else []:
        if f.step in keep.every:  # type: ignore[operator]
            stay.setdefault(f.step, f"a multiple of {keep.every}")
    for f in good:
        if f.step in keep.at:
            stay.setdefault(f.step, "named in checkpoint.at")
    if early := [f.step for f in good if keep.decay is not None and f.step <= keep.decay]:
        stay.setdefault(early[-1], "the last before the decay, from which a longer run can go on")
    if keep.best and scored:
        best = min(scored, key=lambda f: (f.loss, f.step))
        stay.setdefault(best.step, "the lowest validation loss")
    for f in checkpoints:
        if f.pinned:
            stay[f.step] = "pinned"
        elif not f.eligible and (f.attempt, f.step) > newest:
            # It can't be loaded, but no eligible one was saved later: a human may want it.
            stay[f.step] = "no eligible checkpoint was saved later"
    return stay


def steps_to_verify(checkpoints: Sequence[CheckpointFacts], keep: Keep) -> list[int]:
    """Return the steps that must be verified before anything is deleted, newest first. Pure."""
    return sorted((f.step for f in checkpoints if f.eligible), reverse=True)[: keep.newest]


def survey(
    run: Run,
    losses: dict[int, float],
    damaged: Collection[int] = (),
    known: dict[int, int] | None = None,
) -> list[CheckpointFacts]:
    """Return the readable checkpoints, oldest first.

    losses: by step; damaged: steps known to be damaged; known: the attempt that wrote each step.
    `known` is added to, because a state.json can be long and slow to read.
    """
    checkpoints, known = [], {} if known is None else known
    for step in run.checkpoint_steps():
        if step not in known and (checkpoint := open_readable(run.checkpoint_path(step))):
            known[step] = checkpoint.attempt
        if (attempt := known.get(step)) is not None:
            eligible = step not in damaged and run.is_eligible(attempt, step)
            checkpoints.append(
                CheckpointFacts(step, attempt, eligible, is_pinned(run, step), losses.get(step))
            )
    return checkpoints


class ValidationLosses:
    """Validation losses by step from a metrics file; each call reads only the new rows."""

    def __init__(self, rows: Path):
        self._rows = RowReader(rows, kind="validation")
        self._found: dict[int, float] = {}

    def __call__(self) -> dict[int, float]:
        """Return the loss over all sources by step, of all rows so far whose loss is a number."""
        new = select(self._rows.read(), dataset="validation")
        self._found |= {row["step"]: row["loss"] for row in new if math.isfinite(row["loss"])}
        return self._found


class Retention:
    """Retention while one attempt trains; remembers what it has verified. report(kind, **facts):
    receives, on rank 0, events of deleted and damaged checkpoints."""

    def __init__(self, run: Run, attempt: int, keep: Keep, rows: Path, report: Callable[..., None]):
        self.run, self.attempt, self.keep, self._report = run, attempt, keep, report
        self._losses = ValidationLosses(rows)
        self._verified: set[int] = set()
        self._damaged: set[int] = set()
        self._attempts: dict[int, int] = {}  # by step: the attempt that wrote it

    def __call__(self, ranks: Ranks) -> None:
        """Delete what need not be kept; every rank calls it. Raises UserError on all ranks if the
        storage fails."""
        where = self.run.checkpoints
        while True:
            doomed, unread = ranks.from_main(self._plan, where)
            if not doomed:
                return
            if not unread:
                break
            faults = find_faults(self.run.checkpoint_path(unread[0]), ranks, afresh=True)
            (self._damaged if faults else self._verified).add(unread[0])
            if faults and ranks.is_main:
                self._report("checkpoint_damaged", step=unread[0], faults=faults)

        def delete_doomed() -> None:
            for step in doomed:
                if self._is_newest() and delete(self.run, step, self._is_newest):
                    self._report("checkpoint_deleted", step=step)

        ranks.from_main(delete_doomed, where)

    def saved(self, step: int) -> None:
        """Forget what was known of an older checkpoint at `step`: there is a new one."""
        self._verified.discard(step)
        self._damaged.discard(step)
        self._attempts[step] = self.attempt

    def _plan(self) -> tuple[list[int], list[int]]:
        """Return the steps to delete, and the steps that must be verified first."""
        if not self._is_newest():
            return [], []
        losses = self._losses() if self.keep.best else {}
        checkpoints = survey(self.run, losses, self._damaged, self._attempts)
        stay = reasons(checkpoints, self.keep)
        unread = [s for s in steps_to_verify(checkpoints, self.keep) if s not in self._verified]
        return [f.step for f in checkpoints if f.step not in stay], unread

    def _is_newest(self) -> bool:
        return self.run.attempts()[-1].number == self.attempt


def delete(run: Run, step: int, may: Callable[[], bool] = lambda: True) -> bool:
    """Delete a checkpoint unless it was pinned meanwhile. Returns True if it was deleted.

    may: called when no other attempt can reach the checkpoint any more. If False (this attempt was
    suspended and overtaken), it goes back.
    """
    if is_pinned(run, step):
        return False
    path = run.checkpoint_path(step)
    doomed = path.with_name(f".{path.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)  # the name first: a kill here leaves no partial checkpoint
    if not may():
        if not path.exists():
            doomed.rename(path)
        return False
    fsync_path(run.checkpoints)
    shutil.rmtree(doomed)
    return True


def leftovers(run: Run, attempt: int | None = None) -> list[Path]:
    """Return unfinished saves and deletions; with `attempt`, only of earlier attempts, and nothing
    unless it is the newest: a newer one may still be writing."""
    if attempt is not None and run.attempts()[-1].number != attempt:
        return []
    paths = []
    for path in sorted(run.checkpoints.glob(".step-*")) if run.checkpoints.is_dir() else []:
        match = _LEFTOVER.fullmatch(path.name)
        if match and (attempt is None or int(match[2] or 0) < attempt):
            paths.append(path)
    return paths


def _pin_path(run: Run, step: int) -> Path:
    return run.checkpoint_path(step).with_suffix(".pin")


def is_pinned(run: Run, step: int) -> bool:
    """Return True if the checkpoint at `step` is pinned."""
    return _pin_path(run, step).exists()


def pin(run: Run, step: int, off: bool = False, ahead: bool = False) -> bool:
    """Pin the checkpoint at `step`, or unpin it if `off`. Returns True if that changed anything.

    ahead: also one that the run has yet to make. Raises UserError if there is no such checkpoint.
    """
    known = run.checkpoint_steps()
    is_to_come = ahead and step > max(known, default=0)
    is_left = off and is_pinned(run, step)  # of a checkpoint that was never made
    if step not in known and not is_to_come and not is_left:
        steps = ", ".join(map(str, known)) or "none"
        todo = f"choose one of these steps: {steps}"
        raise UserError(str(run.checkpoint_path(step)), "no such checkpoint", todo)
    if is_pinned(run, step) != off:
        return False
    if off:
        _pin_path(run, step).unlink()
        fsync_path(run.checkpoints)
    else:
        run.checkpoints.mkdir(exist_ok=True)
        write_file(_pin_path(run, step), b"")
    return True


def hold(branch: Run, origin: Any, root: str, ahead: bool = False) -> list[str]:
    """Pin the checkpoint that a branch begins with, unless the branch has one of its own. So
    retention there deletes nothing that the branch needs. Return a sentence if it can't be pinned,
    as in a run of somebody else.

    origin: `run.from` of its job, with the step; root: where runs are looked for; ahead: the
    checkpoint may not be made yet. Raises UserError if there is no such checkpoint.
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


def verify(run: Run, steps: Sequence[int]) -> list[str]:
    """Return the faults of these checkpoints, re-read from the storage."""
    paths = map(run.checkpoint_path, steps)
    return [fault for path in paths for fault in find_faults(path, ALONE, afresh=True)]
