"""Brings a run back from its mirror, where its directory is missing: on another cluster, or after
scratch was purged.

Invariant: the directory gets its name once everything is in it and a whole checkpoint was verified
byte by byte against its table; a kill before leaves none. Only names that a mirror has are brought,
and of a checkpoint only what its table lists. Imports no torch.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from forescale.checkpoint.choice import open_readable
from forescale.checkpoint.copies import LAUNCH, PARENT, ROWS
from forescale.checkpoint.mirror import folder_of, steps_in
from forescale.checkpoint.reader import STATE
from forescale.config.train import TrainJob
from forescale.ground.console import Meter, progress_display
from forescale.ground.errors import UserError
from forescale.ground.storage import TABLE, check_table, read_json, read_table, write_file
from forescale.remote.buckets import Folder
from forescale.run.directory import Run, new_run

_FILE = r"[^/.][^/]*\.(json|jsonl|yaml)"
_OF_RUN = re.compile(
    rf"({_FILE}|attempts/[0-9]{{4,9}}/{_FILE}|checkpoints/step-[0-9]{{8,18}}\.pin)"
)
_SUBMISSION = re.compile(r"[0-9]{4,9}")


def restore(job: TrainJob, report: Callable[[str], object]) -> bool:
    """Bring back the run of a job, if its directory is missing and its mirror has it, and report
    that in a line. Returns True if it did: the typed keys are then laid over the run's own config.

    Raises UserError if the mirror can't be read, holds no whole checkpoint, or `run.resume=never`;
    and if the directory has files but no config.yaml.
    """
    folder, run = folder_of(job), Run(job.run.directory)
    if folder is None or run.config.exists():
        return False
    names = folder.list()
    if run.config.name not in names:
        return False
    if job.run.resume == "never":
        todo = "choose another run.name, or run.resume=auto to restore and resume it"
        raise UserError(folder.where, "holds a run of this name already", todo)
    if file := next(_files(run.path), None):
        problem = f"has no config.yaml, but other files, such as {file.relative_to(run.path)}"
        todo = f"move it away and give the command again to restore the run from {folder.where}"
        raise UserError(str(run.path), problem, todo)
    for name in names:
        if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
            todo = "it is no mirror: check the address"
            raise UserError(folder.where, f"has a file {name!r}", todo)
    with new_run(run, job.run.mode, tag="restored") as new:
        for name in filter(_OF_RUN.fullmatch, names):
            attempt, _, last = name.rpartition("/")
            # A kill may have kept back parent.json, which is sent last: such rows don't count.
            if last != ROWS or f"{attempt}/{PARENT}" in names:
                _bring(folder, name, new.path)
        step = _bring_checkpoint(folder, names, new)
        new.link()
        _reserve(new)
        if next(_files(run.path), None) is None:  # a purge of old files leaves directories
            for path in sorted(run.path.resolve().rglob("*"), reverse=True):
                path.rmdir()
    report(f"Restored {run.path} from {folder.where}: step {step:,}.")
    return True


def _files(directory: Path) -> Iterator[Path]:
    return (p for p in directory.rglob("*") if p.is_symlink() or not p.is_dir())


def _reserve(new: Run) -> None:
    """Reserve the numbers of the run's submissions to SLURM: crashes and faulty nodes are counted
    by submission, and earlier ones don't count any more."""
    names = []
    for attempt in new.attempts():
        with suppress(UserError, KeyError, TypeError):  # begun without SLURM, or damaged
            names.append(str(read_json(attempt.path / LAUNCH)["slurm"]["submission"]))
    if known := [name for name in names if _SUBMISSION.fullmatch(name)]:
        place = new.path / "jobs" / max(known, key=int)
        place.mkdir(parents=True)
        os.utime(place, (0, 0))  # an empty one that is new is a submission that is under way


def _bring_checkpoint(folder: Folder, names: dict[str, int], new: Run) -> int:
    """Bring the newest whole checkpoint on the run's trajectory; return its step."""
    reasons = []
    for step in sorted(steps_in(names), reverse=True):
        path = new.checkpoint_path(step)
        place = path.relative_to(new.path).as_posix()
        if f"{place}/{TABLE}" in names:
            if not (faults := _bring_whole(folder, names, new, step)):
                return step
            reasons += faults[:1]
            shutil.rmtree(path)
    why = f" ({reasons[0]})" if reasons else ""
    todo = "restore the mirror from a copy, or choose another run.name"
    raise UserError(folder.where, f"holds no whole checkpoint of the run{why}", todo)


def _bring_whole(folder: Folder, names: dict[str, int], new: Run, step: int) -> list[str]:
    """Bring a checkpoint, its small files first, which may make the rest unnecessary. Return why it
    can't be used, if it can't."""
    path = new.checkpoint_path(step)
    place = path.relative_to(new.path).as_posix()
    _bring(folder, f"{place}/{TABLE}", new.path)
    try:
        table = read_table(path)
    except UserError as e:
        return [str(e)]
    sizes = {name: names.get(f"{place}/{name}") for name in table}
    if wrong := [name for name in table if sizes[name] != table[name].size]:
        return [f"{place}/{wrong[0]} is not as long as the table says"]
    if STATE in table:
        _bring(folder, f"{place}/{STATE}", new.path)
    if (checkpoint := open_readable(path)) is None:
        return [f"{place}/{STATE} is damaged"]
    if not new.is_eligible(checkpoint.attempt, step):
        return [f"a later attempt started before step {step:,}"]
    with progress_display() as progress:
        size = sum(entry.size for entry in table.values())
        meter = Meter(progress, f"step {step:,} from the mirror", size, "bytes")
        for name in table:
            _bring(folder, f"{place}/{name}", new.path, lambda n: meter(n, 0))
        meter.end()
    return check_table(path)


def _bring(folder: Folder, name: str, to: Path, tick: Callable[[int], Any] = id) -> None:
    path = to.joinpath(*PurePosixPath(name).parts)
    path.parent.mkdir(parents=True, exist_ok=True)

    def counted() -> Iterator[bytes]:
        for piece in folder.get(name):
            tick(len(piece))
            yield piece

    write_file(path, counted())
