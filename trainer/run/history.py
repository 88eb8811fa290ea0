"""The rows that an attempt begins with: those of its checkpoint's run up to its step, verified.

Invariant: what a run has logged is never lost in silence. A checkpoint records size and sha256 of
the rows of its attempt when it was saved; resuming copies exactly these bytes, from whichever
attempt still has them, or refuses.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from forescale.ground.errors import UserError
from forescale.ground.storage import FileEntry, hash_file
from forescale.run.directory import Attempt, Run
from forescale.run.rows import Prefix, each_row

# Kinds of the rows that say which step the run is at. An attempt that begins at a later step than
# the one before was at, as a member that other clusters left behind, writes the second.
_AT_STEP = ("train", "rejoined")
_TAIL = 1 << 16  # bytes in which the last train row is looked for


@dataclass(frozen=True)
class Saved:
    """What a checkpoint records of its history: its step, its attempt, and the attempt's
    metrics.jsonl at that time (None: written by a version that didn't record it)."""

    step: int
    attempt: int
    rows: FileEntry | None = None


def history_of(run: Run, saved: Saved) -> Prefix:
    """Return the rows of the run up to a checkpoint, from the attempt that saved it, or from
    another one that began with a copy of them. Raises UserError if no attempt has them whole."""
    attempts, origin = run.attempts(), step_before(run)
    savers = [a for a in attempts if a.number == saved.attempt]
    others = [a for a in reversed(attempts) if a.number != saved.attempt and a.has_begun]
    reasons = []
    for attempt in (*savers, *others):
        path = attempt.metrics.path
        try:
            return _history_in(path, saved, origin)
        except _Incomplete as e:
            reasons.append(str(e))
        except UserError as e:  # a damaged row
            reasons.append(f"{e.where.removeprefix(f'{path}, ')}: {e.problem}")
    where = run.path / "attempts" / f"{saved.attempt:04d}" / "metrics.jsonl"
    why = f" ({reasons[0]})" if savers else ""
    problem = f"the rows up to step {saved.step:,}, to resume after, are damaged or missing{why}"
    branch = f"run.from.run={run.name} run.from.step={saved.step} run.name=NEW"
    todo = f"restore the file from a copy, or go on under another name: {branch}"
    raise UserError(str(where), problem, todo)


def step_before(run: Run) -> int:
    """Return the step before the first one of the run: not 0 in a branch."""
    return next((a.parent.step for a in run.attempts() if a.parent), 0)


class _Incomplete(Exception):
    """Rows that don't reach from the origin to the step."""


def _history_in(path: Path, saved: Saved, origin: int) -> Prefix:
    if not path.exists():
        raise _Incomplete("the file is missing")
    if saved.rows is None:
        return _contiguous(path, saved.step, origin)
    size = saved.rows.size
    if path.stat().st_size < size or hash_file(path, size=size) != saved.rows:
        _contiguous(path, saved.step, origin)  # has a better reason if it raises
        raise _Incomplete("they were changed since the checkpoint was saved")
    last = _last_step(path, size)
    if saved.step != (origin if last is None else last):
        raise _Incomplete(f"they end at step {last or origin:,}")
    for row, end in each_row(path, size):  # the evaluation of the saved step comes later
        if row.get("step", 0) > saved.step:
            break
        size = end
    return Prefix(path, size)


def _contiguous(path: Path, step: int, origin: int) -> Prefix:
    """Return the rows up to a step, read one by one. Raises _Incomplete if steps are missing."""
    end, jumps = 0, set[int]()

    def steps() -> Iterator[int]:
        nonlocal end, jumps
        yield origin
        for row, end_of_row in each_row(path):
            if row.get("step", 0) > step:
                return
            end = end_of_row
            if row.get("kind") in _AT_STEP:
                jumps |= {row["step"]} if row["kind"] != "train" else set()
                yield row["step"]

    last = origin
    for before, last in pairwise(steps()):
        if last != before + 1 and last not in jumps:
            raise _Incomplete(f"step {last:,} follows step {before:,}")
    if last != step:
        raise _Incomplete(f"they end at step {last:,}")
    return Prefix(path, end)


def _last_step(path: Path, size: int) -> int | None:
    """Return the step of the last train row in the first `size` bytes; None without one."""
    last = None
    begin = max(0, size - _TAIL)
    for row, _ in each_row(path, begin, size):
        if row.get("kind") in _AT_STEP:
            last = row["step"]
    if last is None and begin:  # rows that long are possible
        last = next((row["step"] for row, _ in each_row(path, 0, size) if "loss" in row), None)
    return last


def expect_whole(run: Run, attempt: Attempt, saved: Saved | None) -> None:
    """Raise UserError if attempts or rows of a run are missing, so that it isn't known where it
    continues; a new run may have none. attempt: the one that is starting; saved: of the checkpoint
    that it resumes from, if any."""
    run.expect_newest(attempt)
    numbers = [a.number for a in run.attempts()]
    restore = "restore it from a copy, or choose another run.name"
    if missing := sorted(set(range(1, attempt.number)) - set(numbers)):
        where = run.path / "attempts" / f"{missing[0]:04d}"
        problem = "is missing, so it isn't known which checkpoints and samples count"
        raise UserError(str(where), problem, restore)
    begun = [a for a in run.attempts() if a.has_begun]
    if saved is not None:
        if saved.attempt not in [a.number for a in begun]:
            where = run.path / "attempts" / f"{saved.attempt:04d}"
            problem = f"is missing or empty, but it has saved the checkpoint of step {saved.step:,}"
            raise UserError(str(where), problem, restore)
        return
    if not begun and run.has_links:
        problem = "is empty, but the run has trained"
        raise UserError(str(run.path / "attempts"), problem, restore)
    if steps := [e["step"] for e in run.read_events(kind="checkpoint_saved")]:
        problem = f"is empty or missing, but step {max(steps):,} of the run was saved"
        raise UserError(str(run.checkpoints), problem, restore)
