"""`forescale status`: a table of all runs, or everything about one."""

import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trainer.cli import overrides_of
from trainer.compose import compose
from trainer.errors import DONE, UserError
from trainer.jobs import StatusJob
from trainer.run import Run
from trainer.status import Status, ago, runs_under

_COLOURS = {"running": "green", "complete": "cyan", "interrupted": "yellow", "crashed": "red"}
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
    _show_time(s, console)
    if events := s.events():
        console.print(
            "Events: " + ", ".join(f"{n} {kind}" for kind, n in events.most_common()),
            soft_wrap=True,
        )


def _show_checkpoints(s: Status, console: Console) -> None:
    table = _table("checkpoint", "tokens", "MiB", "ranks", "stage", "attempt", "counts", "age")
    for c in s.checkpoints:
        table.add_row(
            f"{c.position.step:,}",
            f"{c.position.tokens:,}",
            f"{c.size / 2**20:,.1f}",
            str(c.state["world_size"]),
            str((c.state.get("numerics") or {}).get("stage", "-")),
            str(c.attempt),
            "yes" if s.is_eligible(c) else "no",
            ago(s.now - c.path.stat().st_mtime),
        )
    _print(table, console)
    unreadable = len(s.run.checkpoint_steps()) - len(s.checkpoints)
    if unreadable:
        console.print(f"{unreadable} more can't be read: forescale check {s.run.path}")


def _show_attempts(s: Status, console: Console) -> None:
    table = _table("attempt", "went on from", "begun", left=("went on from",))
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
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(begun))
        table.add_row(str(attempt.number), escape(came), moment)
    _print(table, console)


def _elsewhere(run: Run, checkpoint: str) -> str:
    path = Path(checkpoint)
    return "" if path.parent.parent.name == run.name else f" of {path.parent.parent}"


def _show_time(s: Status, console: Console) -> None:
    spent: dict[str, Any] = s.seconds()
    if not spent:
        return
    whole = sum(spent.values())
    rows = sorted(spent.items(), key=lambda item: -item[1])
    shares = [f"{bucket} {v:,.1f} s ({v / whole:.1%})" for bucket, v in rows if v / whole >= 5e-4]
    lost = s.lost()
    gone = f"; lost {lost.steps:,} steps, {lost.seconds:,.1f} s" if lost.steps else ""
    console.print(f"Time {whole:,.1f} s: {', '.join(shares)}{gone}", soft_wrap=True)


def _table(*names: str, left: Collection[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    return table


def _print(table: Table, console: Console) -> None:
    if table.row_count:
        console.print(table)
