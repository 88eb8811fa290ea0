"""Audits a checkpoint or a run from its files, and a run against the tokens of its shards.

Invariant: a run without a fault has a readable config, one train row for every step since its
origin without a gap in steps, samples or tokens, and checkpoints that are complete, cover every
element of every state exactly once, and agree with the rows. It has consumed exactly the samples of
its rows, and the tokens_hash of each row is that of the tokens in the shards today. Changes
nothing; imports no torch.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from forescale.checkpoint.reader import Checkpoint, Position, coverage_faults
from forescale.config.sections.objective import OwnObjectiveConfig
from forescale.config.train import TrainJob
from forescale.data.dataset import Sources
from forescale.data.feed import Feed, LostMember
from forescale.data.mixture import Interval, unskipped
from forescale.engine.portable.strips import rank_file
from forescale.ground.errors import UserError
from forescale.ground.storage import check_table, read_table
from forescale.monitor.files import (
    Findings,
    check_attempts,
    check_identity,
    check_logged,
    strangers,
)
from forescale.run.directory import Run
from forescale.run.feed import feed_of, left_out
from forescale.run.rows import Row, read_rows
from forescale.run.start import open_dataset

Tick = Callable[[int], None]
_AT_ONCE = 64  # rows that threads compare at the same time


def size_of(directory: Path) -> int:
    """Return the bytes that a published directory's table lists; 0 if the table can't be read."""
    try:
        return sum(entry.size for entry in read_table(directory).values())
    except UserError:
        return 0


def check_checkpoint(path: Path, tick: Tick = lambda n: None) -> Findings:
    """Check every byte against the table of files, then state.json and the fragments' coverage."""
    findings = Findings(faults=check_table(path, tick))
    try:
        checkpoint = Checkpoint(path)
        checkpoint.expect_bytes(checkpoint.shapes)
        shapes, listed = checkpoint.shapes, read_table(path)
        faults = coverage_faults(shapes, checkpoint.fragments)
        files: dict[str, None] = {}
        for rank in (rank for series in checkpoint.fragments for rank in series.ranks):
            files[file := rank_file(rank)] = None
            if file not in listed:
                faults.append(f"{file} is not in the table")
                break
        findings.faults += [f"{path}: {fault}" for fault in faults]
        position = checkpoint.position
    except UserError as e:
        findings.faults += [str(e)] if str(e) not in findings.faults else []
    if not findings.faults:
        findings.verified.append(
            f"checkpoint {path.name}: step {position.step:,}, {len(shapes)} parameters in "
            f"{len(files)} file{'s' * (len(files) != 1)}, each element once"
        )
    return findings


def check_run(
    run: Run,
    tick: Tick = lambda n: None,
    replayed: Tick = lambda n: None,
    trust: bool = False,
) -> Findings:
    """Check a run's config, identity, checkpoints and rows, against each other and the data. tick:
    called with bytes of checkpoints as they are read; replayed: with tokens as they are compared
    with the shards. trust: allow running an objective of the user's own that the config names."""
    findings = Findings()
    job, identity = check_identity(findings, run)
    check_attempts(findings, run)
    eligible: list[Position] = []
    for step in run.checkpoint_steps():
        path = run.checkpoint_path(step)
        of_checkpoint = check_checkpoint(path, tick)
        findings.verified += of_checkpoint.verified
        findings.faults += of_checkpoint.faults
        if of_checkpoint.faults:
            continue
        checkpoint = Checkpoint(path)
        check_logged(findings, run, checkpoint)
        if checkpoint.position.step != step:
            findings.faults.append(f"{path}: holds step {checkpoint.position.step:,}")
        elif run.is_eligible(checkpoint.attempt, step):
            eligible.append(checkpoint.position)
        else:
            findings.notes.append(f"{path}: not eligible, a later attempt started before this step")
    findings.notes += strangers(run)
    rows = _check_rows(findings, run, job, eligible)
    if job and identity and rows and not findings.faults:
        _replay(findings, job, identity, rows, _skipped(run), replayed, trust)
    return findings


def _replay(
    findings: Findings, job: TrainJob, identity: dict, rows: list, skipped, tick: Tick, trust: bool
) -> None:
    """Compare the rows with the tokens in the shards."""
    try:
        feed = feed_of_run(job, identity, skipped, trust)
    except UserError as e:
        findings.notes.append(f"the tokens were not compared: {str(e).rstrip('.')}")
        return
    findings.notes += [f"{name}: {sentence}" for name, sentence in left_out(feed).items()]
    try:
        faults = list(replay_faults(rows, feed, tick))
    except UserError as e:
        faults = [str(e)]
    findings.faults += faults
    if not faults:
        first, last = rows[0]["g0"], rows[-1]["g1"]
        lost = sum(min(b, last) - max(a, first) for a, b in skipped if a < last and b > first)
        note = f", {lost:,} of them skipped" if lost else ""
        findings.verified.append(
            f"samples {first:,} to {last:,}{note}: each step's tokens are those in the shards"
        )


def _skipped(run: Run) -> list[tuple[int, int]]:
    """Return the skipped intervals, sorted, from the newest eligible checkpoint."""
    for step in reversed(run.checkpoint_steps()):
        checkpoint = Checkpoint(run.checkpoint_path(step))
        if run.is_eligible(checkpoint.attempt, step):
            return sorted(checkpoint.position.skipped)
    return []


def _check_rows(
    findings: Findings, run: Run, job: TrainJob | None, eligible: list[Position]
) -> list[dict[str, Any]]:
    """Check the train rows and return them; none if they can't be read."""
    rows: list[dict[str, Any]] = []
    try:
        # Not filtered by read_rows: a row without a kind is a fault.
        every = read_rows(run.metrics)
        rows = [row for row in every if row["kind"] == "train"]
        rejoined = [row for row in every if row["kind"] == "rejoined"]
        faults = list(row_faults(rows, _origin(run, job), job, _skipped(run), rejoined))
        faults += _disagreements([*rows, *rejoined], eligible)
        steps = f"steps {rows[0]['step']:,} to {rows[-1]['step']:,}" if rows else "none"
    except (AttributeError, KeyError, TypeError) as e:
        findings.faults.append(f"{run.metrics}: a row lacks a field ({e!r})")
    except UserError as e:
        findings.faults.append(str(e))
    else:
        findings.faults += [f"{run.metrics}: {fault}" for fault in faults]
        findings.verified.append(f"{run.metrics.name}: {len(rows):,} train rows, {steps}")
    return rows


def _origin(run: Run, job: TrainJob | None) -> Position:
    """Return where the first step began: at 0, or at the checkpoint that the run branched from."""
    if job is None or job.run.origin.run is None or job.run.origin.load == "weights":
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
    rejoined: Sequence[dict[str, Any]] = (),
) -> Iterator[str]:
    """Yield where train rows don't continue each other, the first fault of each kind. origin:
    negative numbers in it are unknown; skipped: samples that no row may have; rejoined: rows of the
    steps at which the run went on after others that it left out."""
    reported, ramp = set[int](), job.batch_ramp if job else None
    step, g, tokens = origin.step, origin.g, origin.tokens
    later = {row["step"]: row for row in rejoined}
    for row in rows:
        here = f"step {row['step']:,}"
        if at := later.get(row["step"] - 1):
            step, g, tokens = at["step"], at["g1"], at["tokens"]
        targets = sum(row["shares"].values())
        expected = g if g < 0 else unskipped(skipped, g, 1)[0][0]
        size = ramp.windows(row["step"] - 1) if ramp else row["g1"] - row["g0"]
        end = unskipped(skipped, row["g0"], size)[-1][1]
        checks = {
            f"follows step {step:,}": row["step"] == step + 1,
            f"begins at sample {row['g0']:,}, not {expected:,}": expected in (-1, row["g0"]),
            f"adds {targets:,} tokens to {tokens:,} but counts {row['tokens']:,} in all": (
                tokens < 0 or row["tokens"] == tokens + targets
            ),
            f"ends at sample {row['g1']:,}; its batch of {size:,} windows makes it {end:,}": (
                row["g1"] == end
            ),
        }
        for kind, (fault, holds) in enumerate(checks.items()):
            if not holds and kind not in reported:
                reported.add(kind)
                yield f"{here} {fault}"
        step, g, tokens = row["step"], row["g1"], row["tokens"]


def _disagreements(rows: list[dict[str, Any]], eligible: list[Position]) -> Iterator[str]:
    """Yield where eligible checkpoints differ from the row of their step."""
    at = {row["step"]: (row["step"], row["g1"], row["tokens"]) for row in rows}
    for position in eligible:
        row = at.get(position.step)
        if row is None and position.step:  # the weights that a run begins with have none
            yield f"has no row for step {position.step:,}, which has a checkpoint"
        elif row is not None and row != position.counts:
            place = "step {:,}, sample {:,}, {:,} tokens"
            yield f"is at {place.format(*row)}, the checkpoint at {place.format(*position.counts)}"


def feed_of_run(
    job: TrainJob, identity: Row, skipped: Sequence[Interval], trust: bool = False
) -> Feed:
    """Return the feed of a run, from the data that its run.json names. Raises UserError if a
    dataset isn't there any more, or is another one now; and for an objective of the user's own
    without `trust`, because making it runs code that a stored file names."""
    if isinstance(job.objective, OwnObjectiveConfig) and not trust:
        problem = f"names code to run, {job.objective.target}"
        raise UserError("objective._target_", problem, "give trust=true if you trust the run")
    if not identity["dataset"]["sources"]:
        raise UserError("run.json", "names no dataset", "restore the file from a copy")
    datasets = {}
    for name, stored in identity["dataset"]["sources"].items():
        path = stored["path"]
        if "://" not in path and not Path(path).exists():
            problem = f"the dataset {name} is not at {path} any more"
            raise UserError("run.json", problem, "restore it there to compare its tokens")
        datasets[name] = open_dataset(path, job.data)
        if datasets[name].identity != stored["identity"]:
            problem = f"is not the dataset any more on which the run was trained as {name}"
            raise UserError(path, problem, "restore that dataset")
    return feed_of(job, Sources(datasets), skipped)


def replay_faults(
    rows: Sequence[Row], feed: Feed, tick: Callable[[int], None] = lambda tokens: None
) -> Iterator[str]:
    """Yield the first disagreement of each kind between rows and shards, a sentence each. tick:
    called with the number of tokens compared. Raises UserError if the data can't be read."""
    reported: set[str] = set()

    def compare(row: Row) -> tuple[str, str] | None:
        samples = samples_of(row, feed)
        lost = frozenset(LostMember(*member) for member in row.get("quarantined", ()))
        windows = feed.read(samples, lost)
        shares = dict(zip(feed.names, feed.targets(samples).tolist(), strict=True))
        where = f"step {row['step']:,}"
        if shares != row["shares"]:
            fault = f"{where} has {row['shares']} targets in its row, {shares} in its samples"
            return "shares", fault
        if windows.hash != row["tokens_hash"]:
            return "hash", f"{where} was trained on other tokens than the shards hold now"
        if unknown := windows.lost:
            return "lost", f"{where} read {sorted(unknown)[0]}, which is damaged now"
        return None

    with ThreadPoolExecutor(4) as pool:
        remaining = iter(rows)
        while some := list(islice(remaining, _AT_ONCE)):
            for fault in pool.map(compare, some):
                if fault and fault[0] not in reported:
                    reported.add(fault[0])
                    yield fault[1]
            tick(sum(sum(row["shares"].values()) for row in some))


def samples_of(row: Row, feed: Feed) -> list[Interval]:
    """Return the samples of a row's step: [g0, g1) without the skipped intervals."""
    width = row["g1"] - row["g0"]
    skipped = sum(max(0, min(b, row["g1"]) - max(a, row["g0"])) for a, b in feed.skipped)
    return feed.step(row["g0"], width - skipped)
