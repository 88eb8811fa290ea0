"""`forescale prune`: delete unneeded checkpoints of a run, only with yes=true.

Exit codes: 0 deleted, or listed; 2 if a checkpoint that stays is damaged, or the run is training.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from forescale.checkpoint.retention import (
    ValidationLosses,
    delete,
    keep_of,
    leftovers,
    reasons,
    steps_to_verify,
    survey,
    verify,
)
from forescale.config.compose import parse
from forescale.config.job import RunJob
from forescale.config.schema import key
from forescale.ground.document import tell
from forescale.ground.errors import DONE, UserError
from forescale.monitor.audit import size_of
from forescale.monitor.status import Status
from forescale.run.directory import Run
from forescale.slurm.submission import waiting_or_running
from forescale.verbs.stop import launcher_of


@dataclass
class PruneJob(RunJob):
    VERB: ClassVar[str] = "prune"
    PRINTS: ClassVar = {"path": str, "keep": dict, "delete": list, "bytes": int, "deleted": bool}

    keep: int = key(2, ge=2)  # newest checkpoints kept, besides those kept by config and pins
    yes: bool = False  # delete; false: only list what would be deleted


JOB = PruneJob
EXAMPLES = ("prune first keep=2", "prune first keep=2 yes=true")


def main(words: list[str]) -> int:
    job = parse(PruneJob, words)
    run = Run.existing(job.target or "", job.run.root)
    status = Status(run)
    keep = keep_of(status.job, job.keep)
    checkpoints = survey(run, ValidationLosses(run.metrics)())
    stay = reasons(checkpoints, keep)
    doomed, left = [f.step for f in checkpoints if f.step not in stay], leftovers(run)
    for step in run.checkpoint_steps():
        path = run.checkpoint_path(step)
        why = f"delete ({_megabytes(size_of(path))})" if step in doomed else "keep"
        reason = stay.get(step, "" if step in doomed else "can't be read, see forescale check")
        print(f"  {path.name}: {why}{f': {reason}' if reason else ''}")
    for path in left:
        print(f"  {path.name}: delete ({_megabytes(_bytes_in(path))}): left by an interrupted save")
    freed = sum(size_of(run.checkpoint_path(s)) for s in doomed) + sum(map(_bytes_in, left))
    paths = [*map(run.checkpoint_path, doomed), *left]
    keep_of_path = {str(run.checkpoint_path(step)): why for step, why in stay.items()}
    facts = {"path": run.path, "keep": keep_of_path, "delete": paths, "bytes": freed}
    tell(facts | {"deleted": False})
    if not doomed and not left:
        print("Nothing to delete.")
        return DONE
    if not job.yes:
        print(f"Would free {_megabytes(freed)}; nothing is deleted without yes=true.")
        return DONE
    queued = waiting_or_running(run)  # by the times of its files alone it may seem dead
    if status.state == "running" or launcher_of(run) or (queued and not queued[1].is_waiting):
        problem = "the run is training; it deletes checkpoints itself, by checkpoint.keep"
        raise UserError(str(run.path), problem, "stop it first, or set checkpoint.keep")
    if faults := verify(run, steps_to_verify(checkpoints, keep)) if doomed else []:
        problem = f"nothing is deleted, because a checkpoint that stays is damaged ({faults[0]})"
        raise UserError(str(run.path), problem, f"see forescale check {run.path}")
    pinned = [step for step in doomed if not delete(run, step)]
    for path in left:
        shutil.rmtree(path)
    tell({"delete": [p for p in paths if not p.exists()], "deleted": True})
    for step in pinned:
        print(f"Kept {run.checkpoint_path(step)}: it was pinned meanwhile.")
    print(f"Deleted {len(doomed) - len(pinned)} checkpoints, {_megabytes(freed)} in all.")
    return DONE


def _bytes_in(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def _megabytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
