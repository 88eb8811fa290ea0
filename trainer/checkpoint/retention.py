"""Which checkpoints of a run stay, and the deleting of the others; pins.

    checkpoints/step-00001000/       a checkpoint
    checkpoints/step-00001000.pin    an empty file: somebody wants it kept

Invariant: nothing is deleted that a later one has not been read back to replace: the newest ones
that count, which training would go on from, are verified on the storage itself before the older
ones go. An attempt that was left behind deletes nothing. What can't be read stays, for `check` to
name. Imports no torch.
"""

import json
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forescale.checkpoint.reader import readable, shared_faults
from forescale.engine.ranks import ALONE, Ranks
from forescale.errors import UserError
from forescale.run.directory import Run
from forescale.storage import fsync_path, write_file

_LEFTOVER = re.compile(r"\.step-\d+\.(attempt-(\d+)\.stage|replaced|deleted)")


@dataclass(frozen=True)
class Keep:
    """newest: so many of those that count; every: multiples of so many steps; best: the one of the
    lowest validation loss; at: steps."""

    newest: int = 2
    every: int | None = None
    best: bool = False
    at: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Facts:
    """What retention asks of a checkpoint. counts: it lies on the trajectory that goes on, and is
    not known to be damaged; loss: on the held-out text at its step, None where it isn't known."""

    step: int
    attempt: int
    counts: bool
    pinned: bool = False
    loss: float | None = None


def reasons(found: Sequence[Facts], keep: Keep) -> dict[int, str]:
    """Why each checkpoint that stays does, by step; the others may go. Pure."""
    good = sorted((f for f in found if f.counts), key=lambda f: f.step)
    scored = [f for f in good if f.loss is not None]
    newest = max(((f.attempt, f.step) for f in good), default=(0, 0))
    stay: dict[int, str] = {}
    for f in good[-keep.newest :]:
        stay[f.step] = f"one of the newest {keep.newest}"
    for f in good if keep.every else []:
        if f.step % keep.every == 0:  # type: ignore[operator]
            stay.setdefault(f.step, f"a multiple of {keep.every:,} steps")
    for f in good:
        if f.step in keep.at:
            stay.setdefault(f.step, "named in checkpoint.at")
    if keep.best and scored:
        best = min(scored, key=lambda f: (f.loss, f.step))
        stay.setdefault(best.step, "the lowest validation loss")
    for f in found:
        if f.pinned:
            stay[f.step] = "pinned"
        elif not f.counts and (f.attempt, f.step) > newest:
            # It can't be loaded, but nothing that can has been saved since: a human may want it.
            stay[f.step] = "nothing saved since counts"
    return stay


def relied_on(found: Sequence[Facts], keep: Keep) -> list[int]:
    """The steps that must be whole before anything goes, newest first. Pure."""
    return sorted((f.step for f in found if f.counts), reverse=True)[: keep.newest]


def survey(
    run: Run,
    losses: dict[int, float],
    damaged: Collection[int] = (),
    known: dict[int, int] | None = None,
) -> list[Facts]:
    """The checkpoints that say what they are, oldest first. losses: by step; damaged: steps; known:
    by step the attempt that wrote it, added to: what a checkpoint says of itself can be long."""
    found, known = [], {} if known is None else known
    for step in run.checkpoint_steps():
        if step not in known and (checkpoint := readable(run.checkpoint_path(step))):
            known[step] = checkpoint.attempt
        if (attempt := known.get(step)) is not None:
            counts = step not in damaged and run.is_eligible(attempt, step)
            found.append(Facts(step, attempt, counts, is_pinned(run, step), losses.get(step)))
    return found


class Losses:
    """Validation losses by step from a file of rows; each call reads on where the last ended."""

    def __init__(self, rows: Path):
        self._rows, self._read = rows, 0
        self._found: dict[int, float] = {}

    def __call__(self) -> dict[int, float]:
        if self._rows.exists():
            with open(self._rows, "rb") as f:
                f.seek(self._read)
                for line in f:
                    if not line.endswith(b"\n"):
                        break  # of a row that is being written
                    self._read += len(line)
                    if b'"validation"' in line:
                        self._take(json.loads(line))
        return self._found

    def _take(self, row: dict[str, Any]) -> None:
        if row["kind"] == "validation" and row["dataset"] == "validation":
            self._found[row["step"]] = row["loss"]


class Retention:
    """Retention while one attempt trains; remembers what it has read back. `tell(kind, **facts)` is
    told, on rank 0, of what goes and of damage."""

    def __init__(self, run: Run, attempt: int, keep: Keep, rows: Path, tell: Callable[..., None]):
        self.run, self.attempt, self.keep, self._tell = run, attempt, keep, tell
        self._losses = Losses(rows)
        self._verified: set[int] = set()
        self._damaged: set[int] = set()
        self._attempts: dict[int, int] = {}  # by step, who wrote it

    def __call__(self, ranks: Ranks) -> None:
        """Delete what need not stay; every rank calls it. Raises UserError, on all ranks, where the
        storage refuses."""
        where = self.run.checkpoints
        while True:
            doomed, unread = ranks.from_main(self._plan, where)
            if not doomed:
                return
            if not unread:
                break
            faults = shared_faults(self.run.checkpoint_path(unread[0]), ranks, afresh=True)
            (self._damaged if faults else self._verified).add(unread[0])
            if faults and ranks.is_main:
                self._tell("checkpoint_damaged", step=unread[0], faults=faults)
        ranks.from_main(lambda: self._delete(doomed), where)

    def saved(self, step: int) -> None:
        """There is a new checkpoint at `step`: what was known of an older one there is void."""
        self._verified.discard(step)
        self._damaged.discard(step)
        self._attempts[step] = self.attempt

    def _plan(self) -> tuple[list[int], list[int]]:
        """Steps that may go, and steps that must be read back first."""
        if self.run.attempts()[-1].number != self.attempt:
            return [], []
        losses = self._losses() if self.keep.best else {}
        found = survey(self.run, losses, self._damaged, self._attempts)
        stay = reasons(found, self.keep)
        unread = [s for s in relied_on(found, self.keep) if s not in self._verified]
        return [f.step for f in found if f.step not in stay], unread

    def _delete(self, steps: list[int]) -> None:
        for step in steps:
            if self.run.attempts()[-1].number == self.attempt and delete(self.run, step):
                self._tell("checkpoint_deleted", step=step)


def delete(run: Run, step: int) -> bool:
    """Delete a checkpoint, unless it has been pinned meanwhile; whether it is gone."""
    if is_pinned(run, step):
        return False
    path = run.checkpoint_path(step)
    doomed = path.with_name(f".{path.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)  # first the name, so that a kill here leaves nothing half-deleted
    fsync_path(run.checkpoints)
    shutil.rmtree(doomed)
    return True


def leftovers(run: Run, attempt: int | None = None) -> list[Path]:
    """What saves and deletions left that were cut off; of those before `attempt`, if one is given:
    nothing, unless it is the newest, for what a newer one does is not left over."""
    if attempt is not None and run.attempts()[-1].number != attempt:
        return []
    found = []
    for path in sorted(run.checkpoints.glob(".step-*")) if run.checkpoints.is_dir() else []:
        match = _LEFTOVER.fullmatch(path.name)
        if match and (attempt is None or int(match[2] or 0) < attempt):
            found.append(path)
    return found


def _pin_path(run: Run, step: int) -> Path:
    return run.checkpoint_path(step).with_suffix(".pin")


def is_pinned(run: Run, step: int) -> bool:
    """Whether the checkpoint at `step` stays until it is unpinned."""
    return _pin_path(run, step).exists()


def pin(run: Run, step: int, off: bool = False) -> bool:
    """Keep the checkpoint at `step` until it is pinned `off` again; whether that changed anything.

    Raises UserError where there is no such checkpoint.
    """
    if step not in (known := run.checkpoint_steps()):
        steps = ", ".join(map(str, known)) or "none"
        todo = f"choose one of these steps: {steps}"
        raise UserError(str(run.checkpoint_path(step)), "no such checkpoint", todo)
    if is_pinned(run, step) != off:
        return False
    if off:
        _pin_path(run, step).unlink()
        fsync_path(run.checkpoints)
    else:
        write_file(_pin_path(run, step), b"")
    return True


def verify(run: Run, steps: Sequence[int]) -> list[str]:
    """Faults of these checkpoints, read back from the storage."""
    paths = map(run.checkpoint_path, steps)
    return [fault for path in paths for fault in shared_faults(path, ALONE, afresh=True)]
