"""Brings a run back from its mirror, where its directory is missing: on another cluster, or after
scratch was purged.

Invariant: the directory gets its name once everything is in it and a whole checkpoint was verified
byte by byte against its table; a kill before leaves none. Imports no torch.
"""

import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from forescale.checkpoint.mirror import folder_of
from forescale.checkpoint.reader import open_readable
from forescale.config.train import TrainJob
from forescale.data.remote.folder import Folder
from forescale.errors import UserError
from forescale.progress import Meter, shown
from forescale.run.directory import Run
from forescale.storage import TABLE, check_table, staged, write_file


def restore(job: TrainJob, report: Callable[[str], object]) -> None:
    """Bring back the run of a job, if its directory is missing and its mirror has it. Reports what
    it did in a line.

    Raises UserError if the mirror can't be read, holds no whole checkpoint, or `run.resume=never`.
    """
    folder, run = folder_of(job), Run(job.run.directory)
    if folder is None or run.config.exists() or (run.path.exists() and any(run.path.iterdir())):
        return
    names = folder.list()
    if run.config.name not in names:
        return
    if job.run.resume == "never":
        todo = "choose another run.name, or run.resume=auto to restore and resume it"
        raise UserError(folder.where, "holds a run of this name already", todo)
    with staged(run.path.resolve(), tag="restored") as stage:
        stage.chmod(job.run.mode)
        made = Run(stage)
        for name in names:
            if not _is_of_checkpoint(name):
                _bring(folder, name, stage)
        step = _bring_checkpoint(folder, names, made)
        made.link()
    report(f"Restored {run.path} from {folder.where}: step {step:,}.")


def _bring_checkpoint(folder: Folder, names: dict[str, int], made: Run) -> int:
    """Bring the newest whole checkpoint on the run's trajectory; return its step."""
    reasons = []
    tables = [n for n in names if _is_of_checkpoint(n) and n.endswith(f"/{TABLE}")]
    steps = {int(n.split("/")[1].removeprefix("step-")): n.rpartition("/")[0] for n in tables}
    for step in sorted(steps, reverse=True):
        path = made.checkpoint_path(step)
        inside = [n for n in names if n.startswith(f"{steps[step]}/")]
        with shown() as progress:
            size = sum(names[n] for n in inside)
            meter = Meter(progress, f"step {step:,} from the mirror", size, "bytes")
            for name in inside:
                _bring(folder, name, made.path, lambda n: meter(n, 0))  # noqa: B023
            meter.end()
        found, faults = open_readable(path), check_table(path)
        if found and not faults and made.is_eligible(found.attempt, step):
            return step
        reasons += faults[:1]
        shutil.rmtree(path)
    why = f" ({reasons[0]})" if reasons else ""
    todo = "restore the mirror from a copy, or choose another run.name"
    raise UserError(folder.where, f"holds no whole checkpoint of the run{why}", todo)


def _is_of_checkpoint(name: str) -> bool:
    parts = name.split("/")
    return parts[0] == "checkpoints" and len(parts) > 2 and parts[1].startswith("step-")


def _bring(folder: Folder, name: str, to: Path, tick: Callable[[int], object] = id) -> None:
    parts = PurePosixPath(name).parts
    if ".." in parts or PurePosixPath(name).is_absolute():
        raise UserError(folder.where, f"has a file {name!r}", "it is no mirror: check the address")
    path = to.joinpath(*parts)
    path.parent.mkdir(parents=True, exist_ok=True)

    def counted():
        for piece in folder.get(name):
            tick(len(piece))
            yield piece

    write_file(path, counted())
