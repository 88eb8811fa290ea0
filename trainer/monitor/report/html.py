"""The page of one run or of several: one HTML file that opens anywhere, without a network.

Invariant: the same files of the runs give the same bytes, but for what depends on the moment: a
state, "last seen", and rehearsals. A chart or a table without data says why. Whatever a name, a
note or an error says stands there as text.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from forescale.config.frozen import freeze
from forescale.ground.errors import masked
from forescale.monitor.report import panels, tables
from forescale.monitor.report.curves import X, read_curves
from forescale.monitor.report.events import events_of
from forescale.monitor.report.panels import Panel, RunCurves
from forescale.monitor.report.tables import ReportedRun
from forescale.monitor.status import Status
from forescale.pages.document import Picture, Section, code, render
from forescale.run.directory import Run

AXES = dict(zip(X, ("steps", "tokens", "FLOPs", "time"), strict=True))
_HERE = Path(__file__).parent
_POINTS = 12_000  # of all runs together; each run has at least _FEWEST and at most _MOST
_FEWEST, _MOST = 500, 3000


def labels(runs: Sequence[Run]) -> list[str]:
    """Return a label for each run: its name, or as much of its path as tells runs of one name
    apart."""
    parts = [run.path.resolve().parts for run in runs]

    def label(path: tuple[str, ...]) -> str:
        for count in range(1, len(path)):
            short = path[-count:]
            if sum(other[-count:] == short for other in parts) == 1:
                return "/".join(short)
        return "/".join(path)

    return [label(path) for path in parts]


def points_of(runs: Sequence[Run]) -> int:
    """Return how many points a curve of each of these runs has at most."""
    return min(_MOST, max(_FEWEST, _POINTS // len(runs)))


def page(runs: Sequence[Run], x: str, command: Sequence[str]) -> str:
    """Return the page as HTML. x: of X, what the curves are drawn over at first; command: the
    command line that made it. Raises UserError if a run's files are damaged."""
    points, reported, curves = points_of(runs), list[ReportedRun](), list[RunCurves]()
    for run, label in zip(runs, labels(runs), strict=True):
        status = Status(run)
        reported.append(ReportedRun(label, status, events_of(status)))
        saves = [c.position.step for c in status.checkpoints]
        curves.append(RunCurves(label, read_curves(run, points), reported[-1].events, saves))
    charts = panels.panels(curves)
    return render(
        _HERE / "runs.html.j2",
        title="Report of " + joined([run.label for run in reported]),
        lead=[code(masked(shlex.join(command)))],
        axes=AXES.items(),
        x=x,
        runs=[(run.label, panels.look(i)) for i, run in enumerate(reported)],
        summary=tables.summary(reported),
        sections=[
            *_charts(charts, curves, reported),
            *tables.texts(reported),
            tables.time_use(reported),
            *tables.sizes(reported),
            tables.events(reported),
            tables.checkpoints(reported),
            *tables.rehearsals(reported),
            tables.environment(reported),
            tables.differences(reported),
        ],
        configs=[(run.label, masked(freeze(run.status.job))) for run in reported],
        data=panels.payload(curves, charts, x),
        scripts=[_HERE / "runs.js"],
    )


def joined(names: Sequence[str]) -> str:
    """Return the first names, and how many others there are."""
    few = ", ".join(names[:4])
    return few + (f" and {len(names) - 4} more runs" if len(names) > 4 else "")


def _charts(
    charts: Sequence[Panel], curves: Sequence[RunCurves], runs: Sequence[ReportedRun]
) -> list[Section]:
    """Return the sections with charts: the loss, the held-out losses, abilities if they were
    measured, the others."""
    loss, *rest = charts
    main = Section("loss", loss.title, key=tables.key_of_events(runs))
    main.pictures = [_chart(loss, curves, heading=False)]
    main.after = _notes(curves)
    held = Section("held-out", "Held-out text", pictures=[_chart(p, curves) for p in rest[:2]])
    measured = [_chart(p, curves) for p in rest[2:] if p.held and not p.graded]
    abilities = Section("abilities", "What it can do", pictures=measured)
    others = [_chart(p, curves) for p in rest[2:] if p.graded or not p.held]
    training = Section("training", "How it trained", pictures=others)
    return [main, held, *([abilities] if measured else []), training]


def _chart(panel: Panel, curves: Sequence[RunCurves], heading: bool = True) -> Picture:
    title = Markup("<h3>{}</h3>").format(panel.title) if heading else Markup("")
    if not panels.has_numbers(panel, curves):
        return panel.name, title + Markup('<p class="absent">{}</p>').format(panel.absent), ""
    host = Markup('<div class="chart" data-panel="{}"></div>').format(panel.name)
    if len(panel.lines) > 1:  # the key of several lines of one run
        names = [name.partition(".")[2] for name in panel.lines]
        strokes = ("solid", "dashed", "dotted", "dash and dot")
        text = "; ".join(f"{strokes[i % 4]}: {name}" for i, name in enumerate(names))
        host += Markup('<p class="rests">{}</p>').format(text)
    return panel.name, title + host, ""


def _notes(curves: Sequence[RunCurves]) -> list[Markup | str]:
    notes: list[Markup | str] = [
        "Pale: each step, if at most four runs are drawn; strong: the running median of so many "
        "points. Drag over a chart to zoom, double-click for the whole range. Small ticks on the "
        "axis: checkpoints. Dotted: steps that a rollback or restart discarded. The first steps "
        "may lie above the axis."
    ]
    for run in curves:
        if (per_point := run.curves.per_point) > 1:
            mean = f"each point is the mean of {per_point:,} steps"
            notes.append(f"{run.label}: {mean}, the pale band their lowest and highest.")
        if broken := len(run.curves.broken):
            notes.append(f"{run.label}: the loss of {broken:,} kept steps was not finite.")
    return notes


def distinct(runs: Sequence[Run]) -> list[Run]:
    """Return the runs, each once, whatever path named it."""
    return [*{run.path.resolve(): run for run in runs}.values()]
