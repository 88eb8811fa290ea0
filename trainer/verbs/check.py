"""`forescale check`: verify a dataset, a checkpoint or a run, byte for byte.

Exit codes: 0 complete; 2 with faults, which are printed one per line (like any bad input).
"""

import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import ClassVar

from forescale.checkpoint.reader import STATE
from forescale.config.compose import parse
from forescale.config.job import RunJob
from forescale.ground.console import progress_display
from forescale.ground.document import tell
from forescale.ground.errors import DONE, USER, UserError
from forescale.ground.storage import TABLE, read_table
from forescale.monitor.audit import Findings, check_checkpoint, check_run, size_of
from forescale.run.directory import Run

_MANIFEST = "manifest.json"


@dataclass
class CheckJob(RunJob):
    VERB: ClassVar[str] = "check"
    PRINTS: ClassVar = {"kind": str, "path": str, "faults": list[str], "notes": list[str]}

    target: str | None = None  # a dataset, a checkpoint or a run
    trust: bool = False  # allow running the objective (_target_) that a run's config names


JOB = CheckJob
EXAMPLES = ("check first", "check /data/books")


def main(words: list[str]) -> int:
    job = parse(CheckJob, words)
    kind, path = _kind_and_path(job)
    run = Run(path)
    directories = map(run.checkpoint_path, run.checkpoint_steps()) if kind == "run" else [path]
    total, done, began = sum(map(size_of, directories)), 0, time.monotonic()
    tokens = 0
    lock = Lock()
    with progress_display() as progress:

        def tick(count: int) -> None:  # files are hashed by several threads
            nonlocal done
            with lock:
                done += count
                progress("read", done, total, "bytes")

        def replayed(count: int) -> None:
            nonlocal tokens
            tokens += count
            progress("compare tokens", tokens, None, "tokens")

        findings = _check(kind, path, tick, replayed, job.trust)
    for line in findings.verified:
        print(f"  {line}")
    for line in findings.notes:
        print(f"Note: {line}.")
    for line in findings.faults:
        print(f"Fault: {line.rstrip('.')}.", file=sys.stderr)
    tell({"kind": kind, "path": path, **vars(findings), "bytes": done, "tokens": tokens})
    seconds = time.monotonic() - began
    verdict = f"{len(findings.faults)} fault{'s' * (len(findings.faults) != 1)}"
    print(
        f"{kind.capitalize()} {path}: {verdict if findings.faults else 'complete'} "
        f"({done:,} bytes read{f', {tokens:,} tokens compared' * bool(tokens)} "
        f"in {seconds:.1f} s)."
    )
    return USER if findings.faults else DONE


def _kind_and_path(job: CheckJob) -> tuple[str, Path]:
    """Return "dataset", "checkpoint" or "run", and its path. A missing file may be the fault to
    find, so a file listed in the table is enough."""
    path = Path(job.target or "").expanduser()
    if not (path / "config.yaml").is_file():
        listed: set[str] = set()
        with suppress(UserError):
            listed = {*read_table(path)}
        for kind, mark in (("dataset", _MANIFEST), ("checkpoint", STATE)):
            if (path / mark).is_file() or mark in listed:
                return kind, path
        if path.is_dir() and (path / TABLE).exists():
            raise UserError(str(path / TABLE), "is damaged", "restore it from a copy")
    return "run", Run.existing(path, job.run.root).path


def _check(kind: str, path: Path, tick, replayed, trust: bool) -> Findings:
    if kind == "run":
        return check_run(Run(path), tick, replayed, trust)
    if kind == "checkpoint":
        return check_checkpoint(path, tick)
    from forescale.data.check import check

    findings = Findings(faults=check(path, tick))
    if not findings.faults:
        from forescale.data.curate.earlier import chain_faults
        from forescale.data.dataset import Dataset

        dataset = Dataset(path)
        for sentence, is_other in chain_faults(dataset):
            (findings.faults if is_other else findings.notes).append(sentence)
        for name in dataset.manifest["splits"]:
            split = dataset.split(name)
            findings.verified.append(
                f"{name}: {split.num_documents:,} documents, {split.num_tokens:,} tokens, "
                f"{len(split.shard_tokens)} shard{'s' * (len(split.shard_tokens) != 1)}; "
                f"tars, indexes, token ids and document ends agree"
            )
        findings.verified.append(f"corpus hash {dataset.corpus_hash[:16]}")
    return findings
