"""All that can be said against a checkpoint or a run, from its files alone.

Invariant: a run without a fault has a readable config, one train row for every step since its
origin with no gap in steps, samples or tokens, and checkpoints that are whole, cover every element
of every state exactly once, and agree with the rows. Changes nothing; imports no torch.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.config import TrainJob
from trainer.durable import check_table, read_json, read_table
from trainer.errors import UserError
from trainer.frozen import thaw
from trainer.run import Run, read_rows
from trainer.stored import Checkpoint, Position, coverage_faults

Tick = Callable[[int], None]


@dataclass
class Findings:
    """`verified`: what was looked at, a line each; `notes`: what is odd but harmless."""

    verified: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def size_of(directory: Path) -> int:
    """Bytes that a published directory's table lists; 0 where the table can't be read."""
    try:
        return sum(entry.size for entry in read_table(directory).values())
    except UserError:
        return 0


def check_checkpoint(path: Path, tick: Tick = lambda n: None) -> Findings:
    """Every byte against the table of files, then state.json, then what the fragments cover."""
    found = Findings(faults=check_table(path, tick))
    try:
        checkpoint = Checkpoint(path)
        shapes, fragments = len(checkpoint.shapes), checkpoint.state["fragments"]
        found.faults += [f"{path}: {fault}" for fault in coverage_faults(checkpoint.state)]
        listed = read_table(path)
        found.faults += [f"{path}: {f} is not in the table" for f in fragments if f not in listed]
        position = checkpoint.position
    except UserError as e:
        found.faults += [str(e)] if str(e) not in found.faults else []
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        found.faults.append(f"{path}: state.json is not what a checkpoint holds ({e!r})")
    if not found.faults:
        found.verified.append(
            f"checkpoint {path.name}: step {position.step:,}, {shapes} parameters in "
            f"{len(fragments)} file{'s' * (len(fragments) != 1)}, each element once"
        )
    return found


def check_run(run: Run, tick: Tick = lambda n: None) -> Findings:
    """Config and identity, every checkpoint, the rows, and how they fit each other."""
    found = Findings()
    job = _read(found, run.config, lambda path: thaw("train", path, trust=True))
    identity = _read(found, run.identity, read_json)
    if identity is not None and not isinstance(identity.get("dataset"), dict):
        found.faults.append(f"{run.identity}: says nothing of the dataset")
    if not run.tokenizer.is_file():
        found.faults.append(f"{run.tokenizer}: missing")
    eligible: list[Position] = []
    for step in run.checkpoint_steps():
        path = run.checkpoint_path(step)
        more = check_checkpoint(path, tick)
        found.verified += more.verified
        found.faults += more.faults
        if more.faults:
            continue
        checkpoint = Checkpoint(path)
        if checkpoint.position.step != step:
            found.faults.append(f"{path}: holds step {checkpoint.position.step:,}")
        elif run.is_eligible(checkpoint.attempt, step):
            eligible.append(checkpoint.position)
        else:
            found.notes.append(f"{path}: doesn't count, a later attempt went on from before it")
    for stage in sorted(run.checkpoints.glob(".*")) if run.checkpoints.is_dir() else []:
        found.notes.append(f"{stage}: left by a save that was cut off; may be removed")
    _check_rows(found, run, job, eligible)
    return found


def _read(found: Findings, path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        value = read(path)
    except UserError as e:
        found.faults.append(str(e))
        return None
    found.verified.append(f"{path.name}: readable")
    return value


def _check_rows(found: Findings, run: Run, job: TrainJob | None, eligible: list[Position]) -> None:
    try:
        rows = [row for row in read_rows(run.metrics) if row["kind"] == "train"]
        faults = list(row_faults(rows, _origin(run, job), job))
        faults += _disagreements(rows, eligible)
        steps = f"steps {rows[0]['step']:,} to {rows[-1]['step']:,}" if rows else "none"
    except json.JSONDecodeError as e:
        found.faults.append(f"{run.metrics}: a line is not JSON ({e.msg})")
    except (AttributeError, KeyError, TypeError) as e:
        found.faults.append(f"{run.metrics}: a row lacks what every row has ({e!r})")
    except UserError as e:
        found.faults.append(str(e))
    else:
        found.faults += [f"{run.metrics}: {fault}" for fault in faults]
        found.verified.append(f"{run.metrics.name}: {len(rows):,} train rows, {steps}")


def _origin(run: Run, job: TrainJob | None) -> Position:
    """Where the first step began: at nothing, or at the checkpoint of a run branched off from."""
    if job is None or job.run.origin.run is None or job.run.origin.what == "weights":
        return Position()
    parent = next((a.parent for a in run.attempts() if a.parent), None)
    if parent is None or parent.checkpoint is None:
        return Position()
    path = Path(parent.checkpoint)
    return Checkpoint(path).position if path.is_dir() else Position(parent.step, -1, -1)


def row_faults(
    rows: list[dict[str, Any]], origin: Position, job: TrainJob | None = None
) -> Iterator[str]:
    """Where train rows don't follow on each other, the first of each kind of fault. Numbers below
    zero in `origin` are unknown."""
    said: set[str] = set()
    step, g, tokens = origin.step, origin.g, origin.tokens
    for row in rows:
        here = f"step {row['step']:,}"
        checks = {
            "steps": (row["step"] == step + 1, f"{here} follows step {step:,}"),
            "samples": (g in (-1, row["g0"]), f"{here} begins at sample {row['g0']:,}, not {g:,}"),
            "tokens": (row["tokens"] > tokens, f"{here} has {row['tokens']:,} tokens in all"),
            "batch": (
                job is None or row["g1"] - row["g0"] == job.train.global_batch,
                f"{here} is of {row['g1'] - row['g0']:,} windows, not train.global_batch",
            ),
        }
        for kind, (holds, fault) in checks.items():
            if not holds and kind not in said:
                said.add(kind)
                yield fault
        step, g, tokens = row["step"], row["g1"], row["tokens"]


def _disagreements(rows: list[dict[str, Any]], eligible: list[Position]) -> Iterator[str]:
    """Checkpoints that count, but don't stand where the rows were at their step."""
    at = {row["step"]: Position(row["step"], row["g1"], row["tokens"]) for row in rows}
    for position in eligible:
        row = at.get(position.step)
        if row is None:
            yield f"has no row of step {position.step:,}, of which there is a checkpoint"
        elif row != position:
            yield f"has {row}, where the checkpoint has {position}"
