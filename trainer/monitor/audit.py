"""All that can be said against a checkpoint or a run, from its files alone.

Invariant: a run without a fault has a readable config, one train row for every step since its
origin with no gap in steps, samples or tokens, and checkpoints that are whole, cover every element
of every state exactly once, and agree with the rows. Changes nothing; imports no torch.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forescale.checkpoint.reader import Checkpoint, Position, coverage_faults
from forescale.config.frozen import thaw
from forescale.config.train import TrainJob
from forescale.data.mixture import Interval, without
from forescale.errors import UserError
from forescale.monitor.replay import feed_of_run, replay_faults
from forescale.run.directory import Run, read_rows
from forescale.storage import check_table, read_json, read_table

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


def check_run(run: Run, tick: Tick = lambda n: None, replayed: Tick = lambda n: None) -> Findings:
    """Config and identity, every checkpoint, the rows, how they fit each other and the data.

    tick hears of bytes of checkpoints read back, replayed of tokens compared with the shards.
    """
    found = Findings()
    job = _read(found, run.config, lambda path: thaw(TrainJob, path, trust=True))
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
    rows = _check_rows(found, run, job, eligible)
    if job and identity and rows and not found.faults:
        _replay(found, job, identity, rows, _skipped(run), replayed)
    return found


def _replay(found: Findings, job: TrainJob, identity: dict, rows: list, skipped, tick) -> None:
    """Compare what the rows say with the tokens that the shards hold."""
    try:
        feed = feed_of_run(job, identity, skipped)
    except UserError as e:
        found.notes.append(f"the tokens themselves were not compared: {str(e).rstrip('.')}")
        return
    try:
        faults = list(replay_faults(rows, feed, tick))
    except UserError as e:
        faults = [str(e)]
    found.faults += faults
    if not faults:
        first, last = rows[0]["g0"], rows[-1]["g1"]
        passed = sum(min(b, last) - max(a, first) for a, b in skipped if a < last and b > first)
        note = f", {passed:,} of them skipped" if passed else ""
        found.verified.append(
            f"samples {first:,} to {last:,}{note}: each step's tokens are those of the shards"
        )


def _skipped(run: Run) -> list[tuple[int, int]]:
    """Intervals that the run passed over, sorted, as its newest checkpoint that counts has them."""
    for step in reversed(run.checkpoint_steps()):
        checkpoint = Checkpoint(run.checkpoint_path(step))
        if run.is_eligible(checkpoint.attempt, step):
            return sorted(checkpoint.position.skipped)
    return []


def _read(found: Findings, path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        value = read(path)
    except UserError as e:
        found.faults.append(str(e))
        return None
    found.verified.append(f"{path.name}: readable")
    return value


def _check_rows(
    found: Findings, run: Run, job: TrainJob | None, eligible: list[Position]
) -> list[dict[str, Any]]:
    """The train rows; none where they can't be read."""
    rows: list[dict[str, Any]] = []
    try:
        rows = [row for row in read_rows(run.metrics) if row["kind"] == "train"]
        faults = list(row_faults(rows, _origin(run, job), job, _skipped(run)))
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
    return rows


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
    rows: list[dict[str, Any]],
    origin: Position,
    job: TrainJob | None = None,
    skipped: Sequence[Interval] = (),
) -> Iterator[str]:
    """Where train rows don't follow on each other, the first of each kind of fault. Numbers below
    zero in `origin` are unknown; skipped: samples that no row may have."""
    said: set[str] = set()
    step, g, tokens = origin.step, origin.g, origin.tokens
    for row in rows:
        here = f"step {row['step']:,}"
        targets = sum(row["shares"].values())
        expected = g if g < 0 else without(skipped, g, 1)[0][0]
        size = job.train.global_batch if job else row["g1"] - row["g0"]
        end = without(skipped, row["g0"], size)[-1][1]
        checks = {
            "steps": (row["step"] == step + 1, f"{here} follows step {step:,}"),
            "samples": (
                expected in (-1, row["g0"]),
                f"{here} begins at sample {row['g0']:,}, not {expected:,}",
            ),
            "tokens": (
                tokens < 0 or row["tokens"] == tokens + targets,
                f"{here} counts {row['tokens']:,} tokens in all, {targets:,} more than "
                f"{row['tokens'] - targets:,} and not than {tokens:,}",
            ),
            "batch": (
                row["g1"] == end,
                f"{here} ends at sample {row['g1']:,}; train.global_batch makes it {end:,}",
            ),
        }
        for kind, (holds, fault) in checks.items():
            if not holds and kind not in said:
                said.add(kind)
                yield fault
        step, g, tokens = row["step"], row["g1"], row["tokens"]


def _disagreements(rows: list[dict[str, Any]], eligible: list[Position]) -> Iterator[str]:
    """Checkpoints that count, but don't stand where the rows were at their step."""
    at = {row["step"]: (row["step"], row["g1"], row["tokens"]) for row in rows}
    for position in eligible:
        row = at.get(position.step)
        if row is None:
            yield f"has no row of step {position.step:,}, of which there is a checkpoint"
        elif row != position.counts:
            names = "step {:,}, sample {:,}, {:,} tokens"
            yield (
                f"stands at {names.format(*row)}, the checkpoint at "
                f"{names.format(*position.counts)}"
            )
