"""Chooses the checkpoint of a run that is read: the newest eligible one, verified byte by byte.

Invariant: ranks that call together get the same answer; a damaged checkpoint is passed over, and
reported, and never taken for none. Imports no torch.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from forescale.checkpoint.reader import STATE, Checkpoint
from forescale.engine.ranks import ALONE, Ranks, first, joined
from forescale.ground.errors import UserError
from forescale.ground.storage import FileEntry, check_files, check_table, shares_of
from forescale.run.directory import Run

Report = Callable[..., None]
Tick = Callable[[int], None]
Memory = Mapping[int, Callable[[], bool]]  # by step: publishes a snapshot, False if it can't


def newest_complete(
    run: Run, report: Report, ranks: Ranks = ALONE, memory: Memory | None = None
) -> Checkpoint | None:
    """Return the newest eligible checkpoint whose every byte is verified; None if the run has none.

    Every rank calls it and reads its share of the files; all get the same answer.
    report(kind, **facts): receives an event for each checkpoint that is passed over. memory: of
    peer.PeerMemory.snapshots.
    Raises UserError if there are checkpoints but none can be used: never back to step 0.
    """
    steps = _steps(run, ranks)
    checkpoint = _first_complete(run, reversed(steps), report, ranks, memory or {})
    if checkpoint is None and steps:
        raise UserError(
            str(run.checkpoints),
            f"none of its {len(steps)} checkpoints can be used",
            f"see `forescale check {run.path}`; restore one, or choose another run.name",
        )
    return checkpoint


def newest_before(
    run: Run, newest: int, strictly: bool, report: Report, ranks: Ranks = ALONE
) -> Checkpoint:
    """Return the newest complete eligible checkpoint at step `newest` or before; if there is none
    and `strictly` is false, the oldest after it. Called as `newest_complete`.

    Raises UserError if there is none.
    """
    steps = _steps(run, ranks)
    early = [s for s in reversed(steps) if s <= newest]
    later = [] if strictly else [s for s in steps if s > newest]
    if checkpoint := _first_complete(run, early + later, report, ranks, {}):
        return checkpoint
    problem = f"has no complete checkpoint of step {newest:,} or before to roll back to"
    raise UserError(
        str(run.path), problem, "keep more with checkpoint.keep or checkpoint.keep_every"
    )


def _steps(run: Run, ranks: Ranks) -> list[int]:
    return ranks.from_main(run.checkpoint_steps, run.checkpoints)


def _first_complete(
    run: Run, steps: Iterable[int], report: Report, ranks: Ranks, memory: Memory
) -> Checkpoint | None:
    opened: list[Checkpoint] = []
    for step in sorted({*steps, *memory}, reverse=True) if memory else steps:
        if step in memory and not memory[step]():
            continue
        path = run.checkpoint_path(step)
        # Its state.json is small, and may make it unnecessary to read the rest.
        faults, counts = ranks.from_main(partial(_first_look, run, step), path)
        if not faults and not counts:
            reason = "a later attempt started before this step"
            report("checkpoint_passed_over", step=step, reason=reason)
        elif faults := faults or find_faults(path, ranks):
            report("checkpoint_damaged", step=step, faults=faults)
        else:
            # Its state.json grows with the number of ranks that wrote it, so each rank reads it
            # instead of receiving it.
            ranks.together(partial(lambda p: opened.append(Checkpoint(p)), path), path, first)
            return opened[0]
    return None


def _first_look(run: Run, step: int) -> tuple[list[str], bool]:
    """Return the faults of a checkpoint's state.json, and whether the checkpoint is eligible."""
    path = run.checkpoint_path(step)
    if faults := check_table(path, only=STATE):
        return faults, False
    checkpoint = Checkpoint(path)
    if (stored_step := checkpoint.position.step) != step:
        return [f"{path}: holds step {stored_step:,}"], False
    return [], run.is_eligible(checkpoint.attempt, step)


def find_faults(
    path: Path, ranks: Ranks, afresh: bool = False, tick: Tick = lambda n: None
) -> list[str]:
    """Check every byte of a published directory against its table, each rank a share of the files;
    return the faults of all ranks on every rank. afresh, tick: as in storage.hash_file."""
    mine = partial(check_table, path, tick, part=(ranks.rank, ranks.size), afresh=afresh)
    if ranks.tree:  # a table with the files of so many isn't read by each of them
        shares: list[Any] = []

        def deal() -> list[str]:
            try:
                shares.extend(shares_of(path, ranks.size))
            except UserError as e:
                return [str(e)]
            return []

        if faults := ranks.from_main(deal, path):
            return faults
        entries = [(name, FileEntry(**entry)) for name, entry in ranks.tree.dealt(shares)]
        mine = partial(check_files, path, entries, tick, afresh)
    return ranks.together(mine, path, lambda parts: [*dict.fromkeys(joined(parts))])


def at_step(run: Run, step: int | None, ranks: Ranks = ALONE) -> Checkpoint:
    """Return the checkpoint of `step`, or the newest complete one, verified. Called as
    `newest_complete`. Raises UserError if there is none, or it is damaged."""
    if step is None:
        checkpoint = newest_complete(run, lambda kind, **facts: None, ranks)
        if checkpoint is None:
            todo = f"train it: forescale train run.name={run.name}"
            raise UserError(str(run.path), "this run has no checkpoint yet", todo)
        return checkpoint
    path = run.checkpoint_path(step)
    known = _steps(run, ranks)
    if step not in known:
        steps = ", ".join(map(str, known)) or "none"
        raise UserError(str(path), "no such checkpoint", f"choose one of these steps: {steps}")
    return verified(path, ranks)


def open_readable(path: Path) -> Checkpoint | None:
    """Return the checkpoint at a path, or None if its state.json is missing or damaged."""
    try:
        return Checkpoint(path)
    except UserError:
        return None


def newest_step(run: Run) -> int:
    """Return the step of the newest eligible checkpoint of a run, not yet verified byte by byte: a
    rank does that when it loads it. Raises UserError if there is none."""
    for step in reversed(run.checkpoint_steps()):
        checkpoint = open_readable(run.checkpoint_path(step))
        if checkpoint is not None and run.is_eligible(checkpoint.attempt, step):
            return step
    todo = f"train it: forescale train {run.path}"
    raise UserError(str(run.path), "this run has no checkpoint yet", todo)


def verified(path: Path | str, ranks: Ranks = ALONE, tick: Tick = lambda n: None) -> Checkpoint:
    """Return the checkpoint at a path, every byte verified. Called as `newest_complete`. tick: as
    in storage.hash_file, from several threads. Raises UserError if it is damaged."""
    if faults := find_faults(Path(path), ranks, tick=tick):
        raise UserError(str(path), f"damaged ({faults[0]})", "choose another step")
    return Checkpoint(path)
