"""`forescale status`: a table of all runs, or everything about one."""

import time
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trainer.cli import overrides_of
from trainer.compose import compose
from trainer.duration import Duration
from trainer.ending import launch_of
from trainer.errors import DONE, INTERRUPTED, USER, UserError
from trainer.goodput import Launch
from trainer.jobs import StatusJob
from trainer.run import Attempt, Run
from trainer.status import Status, ago, runs_under
from trainer.stragglers import ALONE

_COLOURS = {"running": "green", "complete": "cyan", "interrupted": "yellow", "crashed": "red"}
_TELLS_NOTHING = 0.5  # expected waste above which an assumed rate of failures is no news
_WIDEST = 120  # where there is no terminal


def main(words: list[str]) -> int:
    job: StatusJob = compose("status", overrides_of("status", words))
    root = Path(job.run.root).expanduser()
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDEST)
    if job.target:
        _show_run(Status(Run.existing(Path(job.target).expanduser(), root)), console)
    elif runs := runs_under(root):
        _show_runs([Status(run) for run in runs], console)
    else:
        console.print(f"No runs under {escape(str(root))} yet; begin one with: forescale train")
    return DONE


def _show_runs(runs: list[Status], console: Console) -> None:
    names = ("run", "state", "step", "done", "tokens", "loss", "bits/byte", "last seen")
    table = _table(*names, left=("run", "state"))
    faults = []
    for status in sorted(runs, key=lambda s: s.age):
        try:
            table.add_row(escape(status.run.name), *_progress(status))
        except UserError as e:  # one damaged run must not hide the others
            table.add_row(escape(status.run.name), "[red]unreadable[/]", *["-"] * 6)
            faults.append(str(e))
    console.print(table)
    for fault in faults:
        console.print(escape(fault))


def _progress(s: Status) -> list[str]:
    total, last = s.job.total_steps, s.validation
    return [
        _coloured(s.state),
        f"{s.step:,}/{total:,}",
        f"{s.step / total:.1%}",
        f"{s.tokens:,}",
        f"{s.train[-1]['loss']:.4f}" if s.train else "-",
        f"{last['bits_per_byte']:.4f}" if last else "-",
        f"{ago(s.age)} ago",
    ]


def _coloured(state: str) -> str:
    return f"[{_COLOURS[state]}]{state}[/]" if state in _COLOURS else state


def _show_run(s: Status, console: Console) -> None:
    total = s.job.total_steps
    loss = f", loss {s.train[-1]['loss']:.4f}" if s.train else ""
    console.print(
        f"[bold]{escape(str(s.run.path))}[/]: {_coloured(s.state)}, step {s.step:,} of {total:,} "
        f"({s.step / total:.1%}), {s.tokens:,} tokens{loss}; last seen {ago(s.age)} ago"
    )
    if last := s.validation:
        console.print(
            f"Validation at step {last['step']:,}: {last['bits_per_byte']:.4f} bits per byte, loss "
            f"{last['loss']:.4f} ± {last['loss_stderr']:.4f} over {last['windows']:,} windows"
        )
    _show_checkpoints(s, console)
    _show_attempts(s, console)
    _show_ranks(s, console)
    _show_time(s, console)
    _show_interval(s, console)
    if events := s.events():
        console.print(
            "Events: " + ", ".join(f"{n} {kind}" for kind, n in events.most_common()),
            soft_wrap=True,
        )


def _show_checkpoints(s: Status, console: Console) -> None:
    names = ("checkpoint", "tokens", "MiB", "ranks", "stage", "attempt", "counts", "pinned", "age")
    table = _table(*names)
    for c in s.checkpoints:
        table.add_row(
            f"{c.position.step:,}",
            f"{c.position.tokens:,}",
            f"{c.size / 2**20:,.1f}",
            str(c.state["world_size"]),
            str((c.state.get("numerics") or {}).get("stage", "-")),
            str(c.attempt),
            "yes" if s.is_eligible(c) else "no",
            "yes" if s.is_pinned(c) else "no",
            ago(s.now - c.path.stat().st_mtime),
        )
    _print(table, console)
    unreadable = len(s.run.checkpoint_steps()) - len(s.checkpoints)
    if unreadable:
        console.print(f"{unreadable} more can't be read: forescale check {s.run.path}")


def _show_attempts(s: Status, console: Console) -> None:
    table = _table("attempt", "went on from", "begun", "end", left=("went on from", "end"))
    ends = {a.number: _end(launch, a, s) for launch in s.goodput.launches for a in launch.attempts}
    for attempt in s.attempts:
        parent = attempt.parent
        if parent is None:
            came = "never got as far as training"
        elif parent.checkpoint is None:
            came = "the beginning"
        else:
            came = f"step {parent.step:,}{_elsewhere(s.run, parent.checkpoint)}"
        # The directory's own time changes with every new file in it; parent.json is written once.
        marks = [attempt.path / "parent.json", attempt.path]
        begun = next(p for p in marks if p.exists()).stat().st_mtime
        begun = launch_of(attempt.path).get("begun", begun)
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(begun))
        table.add_row(str(attempt.number), escape(came), moment, ends.get(attempt.number, "-"))
    _print(table, console)
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


def _end(launch: Launch, attempt: Attempt, s: Status) -> str:
    """How an attempt ended, in a word."""
    if attempt is not launch.attempts[-1]:
        return "rolled back"
    if s.state == "running" and launch is s.goodput.launches[-1]:
        return "running"
    if attempt.number in s.hangs():
        return "hang"
    words = {DONE: "done", INTERRUPTED: "interrupted", USER: "stopped", None: "not seen"}
    return words.get(launch.code, "crash")


def _show_ranks(s: Status, console: Console) -> None:
    """While it runs: where the ranks are, and which is behind."""
    if not (ranks := s.ranks()):
        return
    last = min(ranks, key=lambda r: (r.beat.step, -r.beat.here))
    own = {r.beat.rank: sum(r.beat.pace.get(at, 0.0) for at in ALONE) for r in ranks}
    slowest = max(own, key=lambda rank: own[rank])
    places = Counter(r.beat.at for r in ranks).most_common(4)
    where = ", ".join(f"{n} in {at}" for at, n in places)
    line = f"Ranks {len(ranks)}: {where}; the last is rank {last.beat.rank} on {last.beat.host} "
    line += f"(step {last.beat.step:,}, {last.beat.at} for {last.beat.here:.1f} s)"
    if own[slowest]:
        line += f"; the slowest rank {slowest} ({own[slowest] * 1e3:.1f} ms a step of its own)"
    console.print(escape(line), soft_wrap=True)


def _elsewhere(run: Run, checkpoint: str) -> str:
    path = Path(checkpoint)
    return "" if path.parent.parent.name == run.name else f" of {path.parent.parent}"


def _show_time(s: Status, console: Console) -> None:
    """Where the wall clock went, over all attempts."""
    goodput, wall = s.goodput, s.goodput.wall
    if not wall:
        return
    rows = sorted(goodput.buckets.items(), key=lambda item: -item[1])
    shares = [f"{bucket} {v:,.1f} s ({v / wall:.1%})" for bucket, v in rows if v / wall >= 5e-4]
    steps = s.lost().steps
    gone = f"; lost {steps:,} step{'s' if steps > 1 else ''}" if steps else ""
    console.print(f"Time {wall:,.1f} s: {', '.join(shares)}{gone}", soft_wrap=True)
    between = f", {_span(goodput.mtbf)} between them" if goodput.mtbf else ""
    fails = f"{goodput.failures} failure{'' if goodput.failures == 1 else 's'}{between}"
    console.print(
        f"ETTR {goodput.ettr:.3f} (compute of steps that count, over the wall clock); {fails}"
    )


def _show_interval(s: Status, console: Console) -> None:
    """The interval between checkpoints that the run's own numbers ask for."""
    if (found := s.goodput.interval()) is None:
        return
    if found.assumed and found.waste > _TELLS_NOTHING:
        console.print("No failure was seen, in too short a time to propose checkpoint.every from.")
        return
    often = f"a failure every {_span(found.mtbf)}"
    if found.assumed:
        often = f"{often} (none was seen; three in the time so far are assumed)"
    console.print(
        f"Saving stalls {found.stall:.2f} s, a restart takes {_span(found.restart)}, {often}: "
        f"checkpoint.every='{Duration(found.steps)}' (about {_span(found.seconds)}; Daly 2006) "
        f"loses least, {found.waste:.1%}; it is {s.job.checkpoint.every}",
        soft_wrap=True,
    )


def _span(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f} s" if seconds < 60 else ago(seconds)


def _table(*names: str, left: Collection[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    return table


def _print(table: Table, console: Console) -> None:
    if table.row_count:
        console.print(table)
