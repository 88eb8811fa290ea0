"""The tables of the page: the progress of the runs, where their time went, their events, and where
they come from: configs and how they differ, versions, commits, machines.

Invariant: every number of a table is there in full (<data value=>); moments are in UTC. A table has
what the run's files say, with the secrets of addresses masked; nothing but rehearsals, which are in
the cache of the user, is taken from the machine that draws the page.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from forescale.config.schema import display, flatten, plain
from forescale.ground.console import span
from forescale.ground.errors import UserError, masked
from forescale.monitor.goodput import BUCKETS
from forescale.monitor.report.events import LOOKS, Event
from forescale.monitor.run_text import rank_shares, ranks_of, size_cells
from forescale.monitor.status import Status
from forescale.pages.document import Cell, Section, code, number, percent, whole
from forescale.resilience.outcome import launch_of
from forescale.run.certificate import nearest
from forescale.run.rows import select

# The colours of the buckets of time, in their order; what is not in it is grey.
_SHADES = {
    "compute": "#0b5cad", "data": "#2a8fbd", "evaluation": "#00805c", "checkpoint": "#8a6d00",
    "outer": "#4f5bd5", "logging": "#7a4b2a", "startup": "#a0478a", "recovery": "#c2410c",
    "lost": "#b3261e", "waiting": "#8b949e", "queue": "#c3c9d0",
}  # fmt: skip
_MOST_ROWS = 300  # of the events
_MOST_TEXTS = 12  # of a run, the newest
_MISSING: Cell = "-"
_ACCURACY = "held-out accuracy"  # of preferences
_COLUMNS = 4  # so many runs are columns of the summary; more are its rows


@dataclass(frozen=True)
class ReportedRun:
    """One run of the page: its label, status and events."""

    label: str
    status: Status
    events: Sequence[Event]


def summary(runs: Sequence[ReportedRun]) -> Section:
    """Return the progress of the runs: a column for each if they are few, else a row for each."""
    facts = [_reached(run.status) for run in runs]
    if all(of[_ACCURACY] == _MISSING for of in facts):
        facts = [{k: v for k, v in of.items() if k != _ACCURACY} for of in facts]
    if len(runs) == 1:
        return Section("summary", "State", rows=[[k, v] for k, v in facts[0].items()])
    names = [run.label for run in runs]
    if len(runs) > _COLUMNS:
        rows = [
            ["run", *facts[0]],
            *([n, *of.values()] for n, of in zip(names, facts, strict=True)),
        ]
    else:
        rows = [["", *names], *([name, *(of[name] for of in facts)] for name in facts[0])]
    return Section("summary", "State", rows=rows, head=True)


def _reached(s: Status) -> dict[str, Cell]:
    last, scored, goodput = s.last, s.validation, s.goodput
    held: Cell = _MISSING
    if scored:
        error = scored.get("loss_stderr")
        held = number(scored["loss"]) + (f" ± {error:.2g}" if error else "")
    mfu, rate = last.get("mfu"), s.tokens_per_second
    # Preferences have an accuracy in place of bits per byte.
    bits, accuracy = ((scored or {}).get(k) for k in ("bits_per_byte", "rewards/accuracies"))
    return {
        "state": s.state,
        "step": Markup("{} of {}").format(whole(s.step), whole(s.job.total_steps)),
        "tokens": whole(s.tokens),
        "training loss": number(last["loss"]) if last else _MISSING,
        "held-out loss": held,
        "bits per byte": number(bits) if bits is not None else _MISSING,
        _ACCURACY: percent(accuracy, 1) if accuracy is not None else _MISSING,
        "tokens/s": whole(round(rate)) if rate else _MISSING,
        "MFU": percent(mfu, 1) if mfu else _MISSING,
        "ETTR": number(goodput.ettr, 3) if goodput.wall else _MISSING,
        "wall clock": span(goodput.wall) if goodput.wall else _MISSING,
        "last seen (UTC)": moment(s.last_seen),
    }


def moment(seconds: float | None) -> str:
    """Return a moment, in seconds since the epoch, in UTC; "-" for None."""
    if seconds is None:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


def time_use(runs: Sequence[ReportedRun]) -> Section:
    """Return where the wall clock of each run went."""
    started = [run for run in runs if run.status.goodput.wall]
    section = Section("time", "Where the time went", head=True, columns="last")
    if not started:
        section.absent = "No run has spent any time yet."
        return section
    buckets = [run.status.goodput.buckets for run in started]
    names = [name for name in dict.fromkeys([*BUCKETS, *(n for of in buckets for n in of)])
             if any(name in of for of in buckets)]  # fmt: skip
    section.key = [(name, _SHADES.get(name, "#59636e")) for name in names]
    for run in started:
        goodput, parts = run.status.goodput, Markup("")
        for name, seconds in goodput.buckets.items():
            width, title = 100 * seconds / goodput.wall, f"{name}: {span(seconds)}"
            part = '<i style="width: {:.3f}%; background: {}" title="{}"></i>'
            parts += Markup(part).format(width, _SHADES.get(name, "#59636e"), title)
        bar = Markup('<h3>{}</h3><div class="bar drawn">{}</div>')
        title = f"{run.label}: {span(goodput.wall)}"
        section.pictures.append((run.label, bar.format(title, parts), ""))
    section.rows = [["seconds", *(run.label for run in started), "what it is"]]
    for name in names:
        cells = []
        for run, of in zip(started, buckets, strict=True):
            spent, wall = of.get(name, 0.0), run.status.goodput.wall
            cells.append(Markup("{} ({})").format(number(spent, 4), percent(spent / wall, 1)))
        section.rows.append([name, *cells, BUCKETS.get(name, "a phase of this run")])
    for run in started:
        goodput, lost = run.status.goodput, run.status.lost()
        fails = f"{goodput.failures} failure{'' if goodput.failures == 1 else 's'}"
        section.after.append(
            f"{run.label}: ETTR {goodput.ettr:.3f} (compute of kept steps / wall clock), {fails}, "
            f"{lost.steps:,} steps discarded by rollbacks and restarts."
        )
        section.after += [f"{run.label}: {line}." for line in rank_shares(goodput)]
    return section


def sizes(runs: Sequence[ReportedRun]) -> list[Section]:
    """Return the history of the sizes of runs that changed theirs; nothing without any."""
    section = Section("sizes", "Ranks and nodes", head=True, columns="last")
    section.rows = [["run", "steps", "ranks", "nodes", "tokens/s", "tokens/s a rank", "why"]]
    for run in runs:
        history = run.status.sizes()
        section.rows += [[run.label, *size_cells(size)] for size in history if history[1:]]
    return [section] if section.rows[1:] else []


def events(runs: Sequence[ReportedRun]) -> Section:
    """Return all events, the oldest first."""
    section = Section("events", "What happened", head=True, columns="last")
    rows = [(run.label, e) for run in runs for e in run.events]
    if not rows:
        section.absent = "Nothing but steps, evaluations and saves."
        return section
    rows.sort(key=lambda pair: pair[1].time or 0.0)
    several = len(runs) > 1
    section.rows = [[*["run"] * several, "step", "when (UTC)", "what"]]
    for label, e in rows[:_MOST_ROWS]:
        sign, colour, _ = LOOKS[e.sort]
        text = Markup('<b class="drawn" style="color: {}">{}</b> {}').format(colour, sign, e.text)
        step = whole(e.step) if e.step is not None else "-"
        section.rows.append([*[label] * several, step, moment(e.time), text])
    if len(rows) > _MOST_ROWS:
        section.after = [f"And {len(rows) - _MOST_ROWS:,} more, in the runs' events.jsonl."]
    return section


def texts(runs: Sequence[ReportedRun]) -> list[Section]:
    """Return the newest texts that the runs have written at evaluations, in a section if any
    has."""
    several = len(runs) > 1
    rows: list[list[Cell]] = []
    for run in runs:
        attempts = [a for launch in run.status.goodput.launches for a in launch.attempts]
        every = [row for a in attempts for row in run.status.rows_of_events(a)]
        newest = {(-r["step"], r["number"]): r for r in select(every, kind="text_written")}
        for (less_step, _), row in sorted(newest.items())[:_MOST_TEXTS]:
            step = -less_step
            text = Markup("<pre><b>{}</b>{}</pre>").format(row["prompt"], row["text"])
            rows.append([*[run.label] * several, whole(step), text])
    if not rows:
        return []
    section = Section("texts", "What it writes", head=True, columns="last")
    section.rows = [[*["run"] * several, "step", "the prompt, and what follows"], *rows]
    return [section]


def checkpoints(runs: Sequence[ReportedRun]) -> Section:
    """Return the checkpoints that can be read."""
    section = Section("checkpoints", "Checkpoints", head=True)
    several = len(runs) > 1
    head = ["step", "tokens", "MiB", "ranks", "attempt", "eligible", "pinned", "saved (UTC)"]
    section.rows = [[*["run"] * several, *head]]
    for run in runs:
        s = run.status
        for c in s.checkpoints:
            answers = ["yes" if yes else "no" for yes in (s.is_eligible(c), s.is_pinned(c))]
            cells = [whole(c.position.step), whole(c.position.tokens), number(c.size / 2**20, 4),
                     ranks_of(c.state), str(c.attempt), *answers,
                     moment(c.path.stat().st_mtime)]  # fmt: skip
            section.rows.append([*[run.label] * several, *cells])
        unreadable = len(s.run.checkpoint_steps()) - len(s.checkpoints)
        if unreadable:
            section.after.append(
                f"{run.label}: {unreadable} more can't be read: forescale check {s.run.path}"
            )
    if len(section.rows) == 1:
        section.rows, section.absent = [], "No checkpoint was saved yet, or none is left."
    return section


def rehearsals(runs: Sequence[ReportedRun]) -> list[Section]:
    """Return what the last rehearsal of each run showed, a column each; nothing without any."""
    columns: dict[str, dict[str, Cell]] = {}
    for run in runs:
        last, changes, _ = nearest(run.status.job, None, code=False)
        if last is not None:
            columns[run.label] = {
                "on": f"{last.gpus['plan.gpus']:,} {last.gpus['machine.name']}",
                "ranks": _few([*map(str, last.ranks)]),
                "peak, GiB": number(last.peak_bytes / 2**30, 3),
                "planned peak, GiB": number(last.planned_bytes / 2**30, 3),
                "collectives": "as planned" if last.equal_collectives else "not as planned",
                "waits of the host in a step": whole(last.waits),
                "launches in a step": whole(last.launches),
                "kernels assembled": whole(last.kernels) if last.kernels else _MISSING,
                "rehearsed (UTC)": moment(last.time),
                "stale": "; ".join(changes) or "no",
            }
    if not columns:
        return []
    section = Section("rehearsal", "Rehearsal", head=True, columns="words")
    names = next(iter(columns.values()))
    section.rows = [["", *columns], *([n, *(of[n] for of in columns.values())] for n in names)]
    section.after = ["Of rehearsals that this user has made: forescale help rehearsal"]
    return [section]


def key_of_events(runs: Sequence[ReportedRun]) -> list[tuple[Cell, str]]:
    """Return the signs that the charts use, with their colours."""
    sorts = {e.sort for run in runs for e in run.events if e.step is not None}
    return [
        (Markup("{} {}").format(escape(sign), text), colour)
        for sort, (sign, colour, text) in LOOKS.items()
        if sort in sorts
    ]


def differences(runs: Sequence[ReportedRun]) -> Section:
    """Return the keys of the configs that are not the same in all runs, a column each run."""
    section = Section("config", "Config", head=True, columns="words")
    if len(runs) == 1:
        section.absent = "There is one run; name several, and their differences stand here."
        return section
    flat = [dict(flatten(plain(run.status.job), "")) for run in runs]
    names = dict.fromkeys(name for of in flat for name in of)
    rows: list[list[Cell]] = []
    for name in names:
        values = [masked(display(of.get(name))) for of in flat]
        if len(set(values)) > 1:
            rows.append([name, *values])
    if not rows:
        section.absent = "The configs are the same, key by key."
        return section
    section.title = "Config: the keys that differ"
    section.rows = [["key", *(run.label for run in runs)], *rows]
    return section


def environment(runs: Sequence[ReportedRun]) -> Section:
    """Return versions, commits, data and machines of each run."""
    section = Section("environment", "Environment", head=True, columns="words")
    facts = [_environment(run) for run in runs]
    names = dict.fromkeys(name for of in facts for name in of)
    section.rows = [["", *(run.label for run in runs)]]
    section.rows += [[name, *(of.get(name, "-") for of in facts)] for name in names]
    return section


def _environment(run: ReportedRun) -> dict[str, Cell]:
    s = run.status
    facts: dict[str, Cell] = {"directory": str(s.run.path)}
    try:
        stored = s.run.read_identity()
    except UserError as e:
        return {**facts, "run.json": str(e)}
    if stored.get("parameters"):
        facts["parameters"] = f"{stored['parameters']:,}"
    facts |= {"device": str(stored.get("device", "-"))}
    starts = [launch_of(a.path) for a in s.attempts]
    starts = [start for start in starts if start]
    if starts:
        hosts = dict.fromkeys(str(start.get("host", "-")) for start in starts)
        ranks = dict.fromkeys(str(start.get("processes", "-")) for start in starts)
        facts["host"] = _few(list(hosts))
        facts["ranks"] = _few(list(ranks))
        jobs = [start["slurm"] for start in starts if isinstance(start.get("slurm"), dict)]
        if jobs:
            nodes = dict.fromkeys(str(node) for job in jobs for node in job.get("nodes", ()))
            facts["SLURM"] = f"jobs {_few([str(job.get('job')) for job in jobs])}"
            facts["nodes"] = _few(list(nodes))
        facts["first start (UTC)"] = moment(starts[0].get("begun"))
    for name, version in stored.get("versions", {}).items():
        facts[name] = str(version)
    git = stored.get("git") or {}
    if "commit" in git:
        changed = ", with changed files" if git.get("changed") == "yes" else ""
        facts["commit of forescale"] = code(git["commit"]) + changed
    if "directory" in git:
        facts["commit of the working directory"] = code(git["directory"])
    data = stored.get("dataset") or {}
    facts["data"] = masked(str(data.get("path", "-")))
    facts["corpus hash"] = str(data.get("corpus_hash", "-"))[:16]
    return facts


def _few(values: Sequence[str]) -> str:
    rest = f" and {len(values) - 4} more" if len(values) > 4 else ""
    return ", ".join(values[:4]) + rest
