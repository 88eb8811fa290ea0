"""Checks of the small files of a run by their checksums, and of its rows against checkpoints.

Invariant: a file without a fault is, byte for byte, as the run wrote it. Files that are written
once have their own checksum. Files that grow have one in each row, and each checkpoint records
their size and sha256 at its time. Changes nothing; imports no torch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from forescale.checkpoint.reader import Checkpoint
from forescale.config import frozen
from forescale.config.train import TrainJob
from forescale.ground.errors import UserError
from forescale.ground.storage import FileEntry, has_checksum, hash_file, read_typed
from forescale.resilience.outcome import LAUNCH, LaunchRecord
from forescale.run.directory import Attempt, Parent, Run
from forescale.run.rows import each_row


@dataclass
class Findings:
    """verified: checks that passed, a line each; notes: unusual but harmless facts."""

    verified: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_identity(findings: Findings, run: Run) -> tuple[TrainJob | None, dict[str, Any] | None]:
    """Check config.yaml, run.json and tokenizer.json; return the job and the content of run.json,
    each None if it is damaged."""
    thaw = lambda path: frozen.thaw(TrainJob, path, trust=True)  # noqa: E731
    job = _read(findings, run.config, thaw, frozen.has_checksum)
    identity = _read(findings, run.identity, lambda path: run.read_identity(), has_checksum)
    for path, kind in run.small_files.items():
        if path.exists():
            _read(findings, path, partial(read_typed, kind), has_checksum)
    needs_reference = job is not None and job.objective.are_preferences and run.checkpoint_steps()
    if needs_reference and not run.references.is_file():
        findings.faults.append(f"{run.references}: missing")
    if not run.tokenizer.is_file():
        findings.faults.append(f"{run.tokenizer}: missing")
    elif identity is not None:
        _read(findings, run.tokenizer, lambda path: run.verified_tokenizer())
    return job, identity


def _read(
    findings: Findings,
    path: Path,
    read: Callable[[Path], Any],
    checked: Callable[[Path], bool] = lambda path: True,
) -> Any:
    try:
        value, whole = read(path), checked(path)
    except UserError as e:
        findings.faults.append(str(e))
        return None
    if whole:
        findings.verified.append(f"{path.name}: as it was written")
    else:
        findings.notes.append(f"{path}: readable, but without a checksum: of an earlier version")
    return value


def check_attempts(findings: Findings, run: Run) -> None:
    """Check the files of each attempt; their rows only one by one (see `check_logged`)."""
    attempts, history, rows = run.attempts(), run.begun(), 0
    before = len(findings.faults)
    last = attempts[-1].number if attempts else 0
    for number in sorted(set(range(1, last)) - {a.number for a in attempts}):
        findings.faults.append(f"{run.path / 'attempts' / f'{number:04d}'}: missing")
    for attempt in attempts:
        of_attempt = Findings()
        for name, kind in ((attempt.parent_path, Parent), (attempt.path / LAUNCH, LaunchRecord)):
            if name.exists():
                _read(of_attempt, name, partial(read_typed, kind), has_checksum)
        findings.faults += of_attempt.faults
        findings.notes += of_attempt.notes
        try:
            rows += sum(1 for _ in each_row(attempt.events.path))
            if attempt != history:  # whose rows are compared with the shards
                rows += sum(1 for _ in _train_rows(attempt))
        except UserError as e:
            findings.faults.append(str(e))
        except (KeyError, TypeError) as e:
            findings.faults.append(f"{attempt.metrics.path}: a row lacks a field ({e!r})")
    if attempts and len(findings.faults) == before:
        count = f"{len(attempts)} attempt{'s' * (len(attempts) != 1)}"
        findings.verified.append(f"{count}: parents, launches and {rows:,} other rows, as written")
        findings.notes += [line.rstrip(".") for line in promises(run)]


def _train_rows(attempt: Attempt) -> Iterator[int]:
    """Yield the steps of an attempt's rows. Raises UserError if they don't follow each other, or if
    it made steps and has no parent.json."""
    before: int | None = None
    for row, _ in each_row(attempt.metrics.path):
        if row.get("kind") != "train":
            continue
        if before is not None and row["step"] != before + 1:
            problem = f"step {row['step']:,} follows step {before:,}"
            raise UserError(str(attempt.metrics.path), problem, "restore the file from a copy")
        before = row["step"]
        yield row["step"]
    if before is not None and not attempt.has_begun:
        raise UserError(str(attempt.parent_path), "missing", "restore the file from a copy")


def check_logged(findings: Findings, run: Run, checkpoint: Checkpoint) -> None:
    """Compare the files of rows with a checkpoint: their beginning is as it was at the save."""
    folder = run.path / "attempts" / f"{checkpoint.attempt:04d}"
    for name, stored in checkpoint.state.get("logged", {}).items():
        entry = FileEntry(**stored)
        path = folder / name
        if not path.exists():
            findings.faults.append(f"{path}: missing")
        elif hash_file(path, size=entry.size) != entry:
            since = f"were changed since {checkpoint.path.name} was saved"
            findings.faults.append(f"{path}: its first {entry.size:,} bytes {since}")


def promises(run: Run) -> list[str]:
    """Return the promise of the newest attempt about bits, and where the run was not bit-exact, a
    sentence each; empty for a run that has not begun, or of an earlier version."""
    notes = [str(row.get("what", "")) for row in run.read_events(kind="exactness")][-1:]
    for row in run.read_events(kind="numerics_changed"):
        where = f"from step {row['step']:,}" if row.get("step") else "from a resumption"
        key, old, new = (row.get(name) for name in ("key", "old", "new"))
        notes.append(f"Not bit-exact {where}: {key} was {old}, then {new}.")
    return notes


def strangers(run: Run) -> list[str]:
    """Return a sentence for each file or folder among the checkpoints that is no checkpoint."""
    known = {run.checkpoint_path(step).name for step in run.checkpoint_steps()}
    known |= {f"{name}.pin" for name in known}
    sentences = []
    for path in sorted(run.checkpoints.iterdir()) if run.checkpoints.is_dir() else []:
        if path.name.startswith("."):
            sentences.append(f"{path}: left by an interrupted save; forescale prune removes it")
        elif path.name not in known:
            sentences.append(f"{path}: not the name of a checkpoint, so nothing uses it")
    return sentences
