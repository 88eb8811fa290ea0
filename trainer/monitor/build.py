"""The build of a dataset as its files show it: for `forescale status DATASET`.

Invariant: derived, never stored. A process counts as alive by its last sign of life, where its
machine can't be asked.
"""

import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape

from forescale.data.prepare.share import Builder, read_builders, work_path
from forescale.ground.console import amount, span, table
from forescale.run.directory import Run

_UNITS = 50  # finished ones, of which the dropped documents are counted
_COLOURS = {"building": "green", "complete": "cyan", "waiting": "blue", "interrupted": "yellow"}
State = Literal["complete", "building", "interrupted", "waiting"]


class Build:
    """The dataset `output`, and what there is of its build."""

    def __init__(self, output: Path):
        self.output, self.work, self.now = output, work_path(output), time.time()
        self.jobs = Run(output.with_name(f".{output.name}.jobs"))  # what was submitted to SLURM

    @property
    def exists(self) -> bool:
        """True if there is a dataset, or anything of its build."""
        return self.is_complete or self.work.is_dir() or self.jobs.path.is_dir()

    @property
    def is_complete(self) -> bool:
        return (self.output / "manifest.json").is_file()

    @cached_property
    def builders(self) -> list[tuple[Builder, str]]:
        """The processes of the build since it was last begun, and the state of each."""
        return [(builder, builder.state(self.now)) for builder in read_builders(self.work)]

    @property
    def state(self) -> State:
        if self.is_complete:
            return "complete"
        if any(state == "lives" for _, state in self.builders):
            return "building"
        return "interrupted" if self.work.is_dir() else "waiting"

    @property
    def ended(self) -> str:
        """How an interrupted build ended: what its last process said, or that it was killed."""
        if not self.builders:
            return "nothing of it has begun"
        builder, state = max(self.builders, key=lambda pair: pair[0].last_sign)
        how = builder.facts["ended"] if state == "ended" else "killed, or its machine was lost"
        return f"{builder.label}, {span(max(0.0, self.now - builder.last_sign))} ago: {how}"

    @cached_property
    def phase(self) -> dict[str, Any]:
        """The phase of the process that is farthest on: name, unit, done, total, tasks; rate of all
        that are in it, seconds left of it. Empty before the first one."""
        lives = [b.facts for b, state in self.builders if state == "lives"]
        facts = lives or [b.facts for b, _ in self.builders]
        turn = max((f.get("turn", 0) for f in facts), default=0)
        if not turn:
            return {}
        here = [f for f in facts if f.get("turn") == turn]
        first = max(here, key=lambda f: f.get("done", 0))
        rate = sum(f.get("rate", 0.0) for f in here) if lives else 0.0
        left = (first["total"] or 0) - first["done"]
        names = ("phase", "unit", "done", "total", "tasks")
        seconds = left / rate if rate and left > 0 else None
        return {**{n: first[n] for n in names}, "rate": rate, "seconds_left": seconds}

    @cached_property
    def dropped(self) -> dict[str, int] | None:
        """What the steps of a curation have dropped, of some finished units; None without one."""
        paths = sorted(p for p in (self.work / "curated").glob("[0-9]*"))
        if not paths:
            return None
        from forescale.data.prepare.columns import facts  # with numpy

        some = paths[:: -(-len(paths) // _UNITS)]
        sums = dict.fromkeys(("documents", "of_documents", "bytes", "of_bytes"), 0)
        for path in some:
            tally = facts(path)["tally"]
            sums["of_documents"] += sum(tally["lengths"][0])
            for place, step in enumerate(tally["steps"].values()):
                sums["of_bytes"] += step["read"][1] * (place == 0)
                for documents, size in step["dropped"].values():
                    sums["documents"] += documents
                    sums["bytes"] += size
        return {**sums, "units": len(some), "of_units": len(paths)} if sums["of_bytes"] else None

    def facts(self, queued: Sequence[dict[str, str]] = ()) -> dict[str, Any]:
        """Return everything for programs. queued: its jobs in SLURM's queue."""
        names = ("host", "pid", "job", "rank", "phase", "tasks", "rate", "new", "waits", "ended")
        builders = [
            {**{n: b.facts.get(n) for n in names}, "state": state, "last_sign": b.last_sign}
            for b, state in self.builders
        ]
        how = self.ended if self.state == "interrupted" else None
        return {
            **{"dataset": str(self.output), "state": self.state, "ended": how},
            **{"progress": self.phase or None, "dropped": self.dropped, "processes": builders},
            "jobs": [*queued],
        }

    @property
    def progress(self) -> str:
        """The phase and how far it is, in one line; empty before the first one."""
        if not (p := self.phase):
            return ""
        done, every = p["tasks"]
        parts = [f"{amount(p['done'], p['total'], p['unit'])}, {done:,} of {every:,} tasks"]
        if p["rate"]:
            is_bytes = p["unit"] == "bytes"
            rate = f"{p['rate'] / 1e6:,.1f} MB" if is_bytes else f"{p['rate']:,.0f} {p['unit']}"
            parts.append(f"{rate}/s")
        if p["seconds_left"]:
            parts.append(f"{span(p['seconds_left'])} left in this phase")
        return f"{p['phase']}: {', '.join(parts)}"

    def show(self, console: Console, about_jobs: Sequence[str], again: str) -> None:
        """Print all about the build. about_jobs: sentences on its jobs; again: the command that
        goes on with it, if it is known."""
        state = self.state
        if state == "waiting" and not about_jobs:
            about_jobs = ["No process has begun it, and no job of it is in the queue."]
        facts = [self.progress]
        if state == "interrupted":
            facts = [f"ended: {self.ended}", f"was at {self.progress}" if self.progress else ""]
        lines = [f"Dataset {escape(str(self.output))}: [{_COLOURS[state]}]{state}[/]"]
        lines += [f"  {escape(text)}" for text in facts if text and state != "complete"]
        if (d := self.dropped) and state != "complete":
            lines.append(
                f"  dropped by steps: {d['documents']:,} of {d['of_documents']:,} documents "
                f"({d['documents'] / d['of_documents']:.0%}), {d['bytes'] / d['of_bytes']:.0%} of "
                f"the bytes (of {d['units']:,} of {d['of_units']:,} finished units)"
            )
        lines += [f"  {escape(sentence)}" for sentence in about_jobs]
        console.print("\n".join(lines), soft_wrap=True)
        if self.builders and state != "complete":
            console.print(self._processes())
        console.print(f"Next: {escape(self._next(again, bool(about_jobs)))}", soft_wrap=True)

    def _next(self, again: str, is_queued: bool) -> str:
        if self.state == "complete":
            return f"forescale train mine data=dataset data.path={self.output}"
        if self.state == "building" or is_queued:
            return f"forescale logs {self.output}" if self.jobs.jobs() else "wait for its end"
        return f"{again or 'give the same command again'}; it continues with what is finished"

    def _processes(self) -> Any:
        rows = table("process", "state", "seen", "phase", "pace", "tasks done here",
                     left=("process", "state", "phase"))  # fmt: skip
        for builder, state in self.builders:
            f = builder.facts
            word = {"lives": "waits" if f.get("waits") else "works", "dead": "killed or lost"}
            rate, unit = f.get("rate", 0.0), f.get("unit", "")
            pace = f"{rate / 1e6:,.1f} MB/s" if unit == "bytes" else f"{rate:,.0f} {unit}/s"
            rows.add_row(
                escape(builder.label),
                escape(word.get(state, f.get("ended", "")[:60])),
                f"{span(max(0.0, self.now - builder.last_sign))} ago",
                escape(f.get("phase", "")),
                pace if state == "lives" and rate else "-",
                f"{f.get('new', 0):,}",
            )
        return rows


def find_build(target: str, root: str) -> Build | None:
    """Return the build of a dataset at a path or under `root`; None for a run or nothing."""
    places = [Path(target).expanduser(), Path(root).expanduser() / target]
    if any((place / "config.yaml").is_file() for place in places):
        return None
    builds = (Build(place.resolve()) for place in places)
    return next((build for build in builds if build.exists), None)


def builds_under(root: Path) -> list[Build]:
    """Return the builds in a directory that are not finished, sorted by name."""
    names = {p.name[1:].rpartition(".")[0] for p in root.glob(".*.building")}
    return [Build(root / name) for name in sorted(names)]
