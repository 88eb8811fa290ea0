"""The page of one run or of several: one HTML file that opens anywhere, without a network.

Invariant: the same files of the runs give the same bytes, but for what depends on the moment: a
state, and "last seen". A chart or a table without data says why. Whatever a name, a note or an
error says stands there as text.
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from forescale.errors import UserError, masked
from forescale.monitor.report import origins, panels, tables
from forescale.monitor.report.curves import X, read_curves
from forescale.monitor.report.events import events_of
from forescale.monitor.report.panels import Drawn, Panel
from forescale.monitor.report.picture import laid_out, png, svg
from forescale.monitor.report.rendering import render
from forescale.monitor.report.sections import Section
from forescale.monitor.report.tables import Shown
from forescale.monitor.status import Status
from forescale.run.directory import Run

AXES = dict(zip(X, ("steps", "tokens", "FLOPs", "time"), strict=True))
_HERE = Path(__file__).parent
_POINTS = 12_000  # of all runs together; each has at least _LEAST
_LEAST, _MOST = 500, 3000


def labels(runs: Sequence[Run]) -> list[str]:
    """Return what each run is called: its name, or as much of its path as tells runs of one name
    apart."""
    parts = [run.path.resolve().parts for run in runs]

    def label(own: tuple[str, ...]) -> str:
        for count in range(1, len(own)):
            short = own[-count:]
            if sum(other[-count:] == short for other in parts) == 1:
                return "/".join(short)
        return "/".join(own)

    return [label(own) for own in parts]


def page(runs: Sequence[Run], x: str, command: Sequence[str]) -> str:
    """Return the page as HTML. x: of X, what the curves are drawn over at first; command: the
    command line that made it. Raises UserError if a run's files are damaged."""
    most = min(_MOST, max(_LEAST, _POINTS // len(runs)))
    shown = [_shown(run, label) for run, label in zip(runs, labels(runs), strict=True)]
    drawn = [
        Drawn(
            run.label,
            read_curves(run.status.run, most),
            run.events,
            [c.position.step for c in run.status.checkpoints],
        )
        for run in shown
    ]
    charts = panels.panels(drawn)
    looks = [(run.label, panels.look(i)) for i, run in enumerate(shown)]
    data = panels.payload(drawn, charts, x)
    return render(
        _HERE / "page.html.j2",
        title="Report of " + _joined([run.label for run in shown]),
        lead=[Markup("<code>{}</code>").format(masked(shlex.join(command)))],
        axes=AXES.items(),
        x=x,
        runs=looks,
        summary=tables.summary(shown),
        sections=[
            *_charts(charts, drawn, shown),
            tables.time_use(shown),
            tables.happened(shown),
            tables.checkpoints(shown),
            origins.environment(shown),
            origins.differences(shown),
        ],
        configs=origins.configs(shown),
        data=Markup(_json(data)),
        script=Markup((_HERE / "page.js").read_text()),
    )


def _shown(run: Run, label: str) -> Shown:
    status = Status(run)
    return Shown(label, status, events_of(status))


def _joined(names: Sequence[str]) -> str:
    few = ", ".join(names[:4])
    return few + (f" and {len(names) - 4} more runs" if len(names) > 4 else "")


def _json(data: object) -> str:
    """Return data as JSON that may stand inside of a script element."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _charts(
    charts: Sequence[Panel], drawn: Sequence[Drawn], shown: Sequence[Shown]
) -> list[Section]:
    """The sections with charts: the loss, the held-out losses, abilities if they were measured, the
    others."""
    loss, *rest = charts
    main = Section("loss", loss.title, key=tables.key_of_events(shown))
    main.pictures = [_chart(loss, drawn, heading=False)]
    main.after = _notes(drawn)
    held = Section("held-out", "Held-out text", pictures=[_chart(p, drawn) for p in rest[:2]])
    known = [p for p in rest[2:] if p.held]
    able = Section("abilities", "What it can do", pictures=[_chart(p, drawn) for p in known])
    others = [_chart(p, drawn) for p in rest[2:] if not p.held]
    more = Section("training", "How it trained", pictures=others)
    return [main, held, *([able] if known else []), more]


def _chart(panel: Panel, drawn: Sequence[Drawn], heading: bool = True) -> tuple[str, Markup, str]:
    title = Markup("<h3>{}</h3>").format(panel.title) if heading else Markup("")
    if not panels.has_numbers(panel, drawn):
        return panel.name, title + Markup('<p class="absent">{}</p>').format(panel.absent), ""
    host = Markup('<div class="chart" data-panel="{}"></div>').format(panel.name)
    return panel.name, title + host + _strokes(panel), ""


def _strokes(panel: Panel) -> Markup:
    """Which of several lines of one run is which."""
    if len(panel.lines) < 2:
        return Markup("")
    names = [name.partition(".")[2] for name in panel.lines]
    strokes = ("solid", "dashed", "dotted", "dash and dot")
    said = "; ".join(f"{strokes[i % 4]}: {name}" for i, name in enumerate(names))
    return Markup('<p class="rests">{}</p>').format(said)


def _notes(drawn: Sequence[Drawn]) -> list[Markup | str]:
    found: list[Markup | str] = [
        "Pale: each step, where no more than four runs are shown; strong: the running median of "
        "so many points. Drag over a chart to zoom, double-click for the whole range. Small ticks "
        "on the axis: checkpoints. Dotted: steps that were made but not kept. The first steps may "
        "lie above the axis."
    ]
    for run in drawn:
        if run.curves.per_point > 1:
            found.append(
                f"{run.label}: each point is the mean of {run.curves.per_point:,} steps, the pale "
                "band their lowest and highest."
            )
        if broken := len(run.curves.broken):
            found.append(f"{run.label}: the loss of {broken:,} kept steps was not finite.")
    return found


def picture(runs: Sequence[Run], x: str, form: str) -> bytes:
    """Return the losses of runs over x as a picture. form: ".svg" or ".png". Raises UserError if a
    run's files are damaged, if no run has made a step, or for PNG without matplotlib."""
    most = min(_MOST, max(_LEAST, _POINTS // len(runs)))
    drawn = [
        Drawn(label, read_curves(run, most), events_of(Status(run)), ())
        for run, label in zip(runs, labels(runs), strict=True)
    ]
    if not any(run.curves.lines for run in drawn):
        problem = "has made no step yet, so there is no loss to draw"
        raise UserError(_joined([run.label for run in drawn]), problem, "look again later")
    made = laid_out(drawn, x)
    if form == ".svg":
        return svg(made)
    try:
        return png(made)
    except ModuleNotFoundError as e:
        problem = f"a PNG is drawn by {e.name}, which isn't installed"
        todo = "give a name that ends with .svg, or pip install 'forescale[study]'"
        raise UserError("output", problem, todo) from None


def distinct(runs: Sequence[Run]) -> list[Run]:
    """Return the runs, each once, whatever path it was named by."""
    return [*{run.path.resolve(): run for run in runs}.values()]
