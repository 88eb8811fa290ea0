"""All about one run as text: its state, checkpoints, attempts and where its time went.

Invariant: derived, never stored.
"""

import math
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from forescale.config.duration import Duration
from forescale.ground.console import plus_minus, span, table
from forescale.ground.errors import DONE, INTERRUPTED, USER, UserError
from forescale.ground.storage import read_typed
from forescale.monitor import curve
from forescale.monitor.files import promises
from forescale.monitor.goodput import Goodput, Launch
from forescale.monitor.status import Status
from forescale.resilience.diagnosis import OWN_WORK, stages_text, waiting_places
from forescale.resilience.outcome import launch_of
from forescale.run.abilities import in_words
from forescale.run.band import alarm_text, anew_text
from forescale.run.certificate import about
from forescale.run.directory import Attempt, Run
from forescale.run.forecast import describe, prediction_interval_of
from forescale.run.rows import Row, select
from forescale.run.stored import StoredAverage, StoredMirror

if TYPE_CHECKING:
    from forescale.slurm.queue import Job
    from forescale.slurm.queue_cache import EarlyEnd

_COLOURS = {
    "running": "green",
    "complete": "cyan",
    "imported": "cyan",
    "averaged": "cyan",
    "interrupted": "yellow",
    "queued": "yellow",
    "crashed": "red",
    "halted": "red",
    "refused": "red",
}
_LAST_LINES = 15  # of the log of a job that ended early
_CURVE = 80  # columns of the curve, at most


def state_of(state: str, job: "Job | None", end: "EarlyEnd | None" = None) -> str:
    """Return the state by the queue, if it holds the run, else the one by the run's files. end: of
    its job, if no rank of it began."""
    reason = ""
    if end is not None and state != "complete":
        return f"[red]{(end.state or 'never began').lower().replace('_', ' ')}[/]"
    if job is not None and state != "complete":
        if job.is_waiting:
            state, reason = "queued", f" ({escape(job.reason)})"
        else:
            state = job.state.lower()
    return (f"[{_COLOURS[state]}]{state}[/]" if state in _COLOURS else state) + reason


def runs_now(job: "Job | None") -> bool:
    """Return True if a job has started, by the queue."""
    return job is not None and not job.is_waiting


def show_run(
    s: Status,
    console: Console,
    job: "Job | None",
    end: "EarlyEnd | None" = None,
    in_ascii: bool = False,
) -> None:
    """Print all about one run. job: its job in the queue; end: of its job, if no rank of it began;
    in_ascii: draw its curve with ASCII characters alone."""
    s.job_runs = runs_now(job)
    total, state = s.job.total_steps, state_of(s.state, job, end)
    title = f"[bold]{escape(str(s.run.path))}[/]: {state}"

    def say(line: str) -> None:
        console.print(escape(line), soft_wrap=True, highlight=False)

    if s.run.weights_alone:
        source = ""
        if s.state == "averaged":
            stored = read_typed(StoredAverage, s.run.averaged)
            steps = ", ".join(str(each["step"]) for each in stored["checkpoints"])
            source = escape(f", the mean of {stored['run']} at steps {steps}")
        console.print(f"{title}{source}; runs begin with its weights")
        return _show_checkpoints(s, console)
    loss = f", loss {s.last['loss']:.4f}" if "loss" in s.last else ""
    console.print(
        f"{title}, step {s.step:,} of {total:,} ({s.step / total:.1%}), {s.tokens:,} "
        f"{s.job.objective.counted}{loss}; last seen {span(s.age)} ago"
    )
    if s.reason:
        say(s.reason)
    if last := s.validation:
        console.print(f"Validation at step {last['step']:,}: {_score(last)}")
        if shares := in_words(last):
            say(shares[0].upper() + shares[1:])
    for sentence in _forecast(s):
        say(sentence)
    for row in curve.lines(s.losses, min(console.width, _CURVE), in_ascii):
        say(row)
    if job is not None and job.is_waiting:
        at = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(job.start))
        begins = f", expected to start {at}" if job.start else ""
        remedy = f". To do: {job.remedy}" if job.remedy else ""
        say(f"Job {job.id} waits in the queue ({job.reason}){begins}{remedy}.")
    elif job is not None:
        say(f"Job {job.id} runs on {job.nodes} for {job.elapsed}; {job.left} are left.")
    if end is not None and s.state != "complete":
        log, tail = end.submission.log, end.tail(_LAST_LINES)
        say(f"{end.sentence} " + (f"Its log, {log}, ends:" if tail else f"No log: {log}"))
        for row in tail:
            say(f"  {row}")
    _show_checkpoints(s, console)
    if s.job.checkpoint.mirror and (line := _mirrored(s.run)):
        say(line)
    _show_attempts(s, console)
    _print(_sizes(s), console)
    for sentence in (*promises(s.run), *about(s.job, None, code=False)[0]):
        say(sentence)
    if line := _ranks(s):
        say(line)
    _show_time(s, console)
    if line := _interval(s):
        say(line)
    if events := s.events():
        say("Events: " + ", ".join(f"{n} {kind}" for kind, n in events.most_common()))


def _score(row: Row) -> str:
    """Return the held-out score of a row as a phrase: of a text, or of preferences."""
    mean, error = (row.get(name, math.nan) for name in ("loss", "loss_stderr"))
    loss = f"loss {mean:.4f}{plus_minus(error)} over {row.get('windows', 0):,}"
    if (accuracy := row.get("rewards/accuracies")) is not None:
        return f"accuracy {accuracy:.1%}, {loss} preferences"
    of = f" of {row['scored']}" if "scored" in row else ""
    return f"{row.get('bits_per_byte', math.nan):.4f} bits per byte{of}, {loss} windows"


def _forecast(s: Status) -> list[str]:
    """Return how the final loss compares with the forecast; before the end, what is predicted, how
    the loss keeps to its band, and the end as the run forecasts it anew."""
    rows = s.run.read_events(kind="forecast_scored")
    total, scored = s.job.total_steps, s.validation
    if rows and (rows[-1]["step"] == total or s.job.forecast is None):
        return [describe(rows[-1])]
    try:
        prediction = prediction_interval_of(s.job)
    except UserError as e:  # the run goes on without it
        return [f"The forecast can't be read: {e}"]
    if prediction is None:
        return []
    if scored is not None and scored["step"] == total:
        return [describe(prediction.compare(scored["loss"]))]
    left, lines = s.forecast_left, [prediction.due_message(s.job)]
    if anew := s.forecast_anew:
        lines.append(anew_text(anew, left is not None))
    return [*lines, alarm_text(left)] if left else lines


def _mirrored(run: Run) -> str | None:
    """Return the state of the mirror, and its error if it has one; None without a mirror."""
    try:
        noted = read_typed(StoredMirror, run.mirror)
    except UserError:
        return None
    where, steps, error = noted["where"], noted["steps"], noted["error"]
    newest = f"up to step {max(steps):,}" if steps else "nothing yet"
    return f"Mirrored to {where}: {newest}." + (f" It fails now: {error}" if error else "")


def _show_checkpoints(s: Status, console: Console) -> None:
    names = "checkpoint tokens MiB ranks stage attempt eligible pinned age"
    grid = table(*names.split())
    for c in s.checkpoints:
        grid.add_row(
            f"{c.position.step:,}",
            f"{c.position.tokens:,}",
            f"{c.size / 2**20:,.1f}",
            ranks_of(c.state),
            str((c.state.get("numerics") or {}).get("stage", "-")),
            str(c.attempt),
            "yes" if s.is_eligible(c) else "no",
            "yes" if s.is_pinned(c) else "no",
            span(max(0.0, s.now - c.path.stat().st_mtime)),
        )
    _print(grid, console)
    for step, error in s.damaged.items():
        line = f"Checkpoint {step:,} is damaged, because {error}"
        console.print(escape(line), soft_wrap=True, highlight=False)


def ranks_of(state: Mapping[str, Any]) -> str:
    """Return the number of ranks that saved a checkpoint, and how many of them divided what."""
    numerics = state.get("numerics") or {}
    axes = "tensor", "sequence", "context", "expert"
    sizes = {axis: numerics.get(f"{axis}_parallel", 1) for axis in axes}
    divided = ", ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
    return f"{state['world_size']}" + (f" ({divided})" if divided else "")


def _show_attempts(s: Status, console: Console) -> None:
    lives = {a.number: launch_of(a.path).get("slurm") for a in s.attempts}
    names = ("attempt", "started from", "begun", "end", *(["nodes"] * any(lives.values())))
    grid = table(*names, left=("started from", "end", "nodes"))
    ends = {a.number: _end(launch, a, s) for launch in s.goodput.launches for a in launch.attempts}
    for attempt in s.attempts:
        parent = attempt.parent
        if parent is None:
            came = "did not begin to train"
        else:
            came = f"step {parent.step if parent.checkpoint else 0:,}"
            other = Path(parent.checkpoint).parents[1] if parent.checkpoint else s.run.path
            came += f" of {other}" if other.name != s.run.name else ""
            for used in select(s.rows_of_events(attempt), kind="snapshot_used"):
                came += f", {used.get('what')}"
        # The directory's own time changes with every new file in it; parent.json is written once.
        marks = [attempt.path / "parent.json", attempt.path]
        begun = next(p for p in marks if p.exists()).stat().st_mtime
        begun = launch_of(attempt.path).get("begun", begun)
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(begun))
        row = [str(attempt.number), escape(came), moment, ends.get(attempt.number, "-")]
        if (life := lives[attempt.number]) is not None:
            some = ", ".join(life["nodes"][:3]) + (", ..." if len(life["nodes"]) > 3 else "")
            row.append(escape(f"{some} (job {life['job']})"))
        grid.add_row(*row, *(["-"] * (len(names) - len(row))))
    _print(grid, console)
    for launch in s.goodput.launches:
        numbers = [attempt.number for attempt in launch.attempts]
        if launch.failed and launch.how and not s.hangs().keys() & set(numbers):
            console.print(f"Attempt {numbers[-1]} ended: {escape(launch.how)}.", soft_wrap=True)
    for number, hang in s.hangs().items():
        files = s.run.path / "attempts" / f"{number:04d}" / "hang-*.txt"
        line = f"Attempt {number} hung: {hang.sentence}. Stacks: {files}"
        console.print(escape(line), soft_wrap=True)
    if faults := s.faults():
        console.print(f"Injected faults: {escape(', '.join(faults))}", soft_wrap=True)


def _sizes(s: Status) -> Table:
    """Return the history of sizes; empty if they never changed."""
    grid = table("steps", "ranks", "nodes", "tokens/s", "tokens/s a rank", "why", left=["why"])
    for size in s.sizes() if s.goodput.sizes[1:] else ():
        grid.add_row(*map(escape, size_cells(size)))
    return grid


def size_cells(size: Mapping[str, Any]) -> list[str]:
    """Return a row of the history of sizes."""
    rates = [size[name] for name in ("tokens_per_second", "of_a_rank")]
    cells = [f"{size['first']:,} to {size['last']:,}", f"{size['ranks']:,}", f"{size['nodes']:,}"]
    return [*cells, *(f"{rate:,.0f}" if rate else "-" for rate in rates), size["why"] or "-"]


def _end(launch: Launch, attempt: Attempt, s: Status) -> str:
    """Return how an attempt ended."""
    if attempt is not launch.attempts[-1]:
        return "rolled back"
    open_end = "ended" not in launch_of(launch.attempts[0].path)
    if launch is s.goodput.launches[-1] and open_end and (s.job_runs or s.state == "running"):
        return "running"
    if attempt.number in s.hangs():
        return "hang"
    if s.state == "halted" and attempt.number == s.attempts[-1].number:
        return "halted"
    words = {DONE: "done", INTERRUPTED: "interrupted", USER: "refused", None: "not recorded"}
    return words.get(launch.code, "crash")


def _ranks(s: Status) -> str | None:
    """Return where the ranks are, and which one is behind; None unless it runs."""
    if not (ranks := [status.heartbeat for status in s.ranks()]):
        return None
    last = min(ranks, key=lambda b: (b.step, -b.here))
    # Of a divided model, and at stage 3, the forward is no work of a rank alone.
    mesh = s.job.mesh(1)
    waits = waiting_places(s.job.engine.stage, mesh.exchanges, mesh.pipeline > 1)
    alone = [at for at in OWN_WORK if at not in waits]
    seconds = {b.rank: sum(b.pace.get(at, 0.0) for at in alone) for b in ranks}
    slowest = max(seconds, key=lambda rank: seconds[rank])
    places = Counter(b.at for b in ranks).most_common(4)
    where = ", ".join(f"{n} in {at}" for at, n in places)
    line = f"Ranks {len(ranks)}: {where}; the last is rank {last.rank}"
    line += f"{stages_text([last])} on {last.host} "
    line += f"(step {last.step:,}, {last.at} for {last.here:.1f} s)"
    if seconds[slowest]:
        line += f"; the slowest is rank {slowest} ({seconds[slowest] * 1e3:.1f} ms per step alone)"
    return line


def _interval(s: Status) -> str | None:
    """Return the best interval between checkpoints, by the run's own times and failures."""
    if (best := s.goodput.interval()) is None:
        return None
    return (
        f"Saving stalls {best.stall:.2f} s, a restart takes {span(best.restart)}, a failure came "
        f"every {span(best.mtbf)}: checkpoint.every='{Duration(best.steps)}' (about "
        f"{span(best.seconds)}; Daly 2006) loses least, {best.waste:.1%}; it is "
        f"{s.job.checkpoint.every}"
    )


def _show_time(s: Status, console: Console) -> None:
    """Print where the wall clock went, over all attempts."""
    goodput, wall = s.goodput, s.goodput.wall
    if not wall:
        return
    rows = sorted(goodput.buckets.items(), key=lambda item: -item[1])
    shares = [f"{bucket} {v:,.1f} s ({v / wall:.1%})" for bucket, v in rows if v / wall >= 5e-4]
    for line in rank_shares(goodput):
        console.print(line, soft_wrap=True)
    steps = s.lost().steps
    gone = f"; lost {steps:,} step{'s' if steps > 1 else ''}" if steps else ""
    console.print(f"Time {wall:,.1f} s: {', '.join(shares)}{gone}", soft_wrap=True)
    between = f", {span(goodput.mtbf)} between them" if goodput.mtbf else ""
    fails = f"{goodput.failures} failure{'' if goodput.failures == 1 else 's'}{between}"
    console.print(f"ETTR {goodput.ettr:.3f} (compute of kept steps / wall clock); {fails}")


def rank_shares(goodput: Goodput) -> list[str]:
    """Return where the seconds of ranks went, as a sentence, of a run whose size changed: there the
    shares of the clock are not those of what was paid for."""
    spent = goodput.rank_seconds
    held = sum(spent.values()) if goodput.sizes[1:] else 0.0
    parts = sorted(spent.items(), key=lambda item: -item[1])
    text = ", ".join(f"{bucket} {v / held:.1%}" for bucket, v in parts if held and v / held >= 5e-4)
    return [f"Of {held / 3600:,.2f} rank-hours: {text}"] if held else []


def _print(table: Table, console: Console) -> None:
    if table.row_count:
        console.print(table)
