"""`study report`: one HTML file of a fit that opens anywhere, without a network.

Its order: the answer, the doubts, the figures, the numbers, and where they come from.

Invariant: the same study and versions give the same bytes. Every number in a table is there in full
(<data value=>). A section without data says why. Nothing is loaded from elsewhere.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from forescale.monitor.report.rendering import render
from forescale.monitor.report.sections import Cell, number, percent, span
from forescale.scaling.analysis.table_fit import Prediction, StudyFit
from forescale.scaling.report import study_sections, style
from forescale.scaling.report.evidence import StudyEvidence
from forescale.scaling.report.figures import Figures
from forescale.scaling.report.provenance import RECORDS, as_csv, counted, provenance
from forescale.scaling.report.sections import Section, flops_key
from forescale.scaling.report.tasks.section import task_section
from forescale.scaling.report.words import doubt_of, skill_lines
from forescale.scaling.tasks.answer import TaskAnswer
from forescale.storage import write_file

_SYMBOLS = (
    "N: model parameters. D: training tokens. C: training compute in FLOPs. L: loss. A star, as in "
    "N*, marks the best value for a given compute."
)
_TEMPLATE = Path(__file__).with_name("report.html.j2")


def write(
    made: StudyFit | str,
    seen: StudyEvidence,
    path: Path,
    where: str,
    command: Sequence[str],
    task: TaskAnswer | str | None = None,
) -> None:
    """Write the report, each file atomically: the page, and in the folder `beside(path)` the main
    figures for papers and the records. For the arguments see `page`."""
    # matplotlib is slow to import.
    from forescale.scaling.report.paper import write_pictures

    sections = _sections(made, seen, where, command, task)
    folder = beside(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(path, _rendered(made, sections, where).encode())
    write_file(folder / RECORDS, as_csv(seen.records))
    write_pictures(sections, folder)


def beside(path: Path) -> Path:
    """Return the folder of a report's other files: report-files/ for report.html."""
    return path.with_name(f"{path.stem}-files")


def page(
    made: StudyFit | str,
    seen: StudyEvidence,
    where: str,
    command: Sequence[str],
    task: TaskAnswer | str | None = None,
) -> str:
    """Return the report as HTML.

    made: the fit, or why there is none yet; where: the file, or how to call the runs; command: the
    command line that made the report; task: the answer about a metric, or why there is none.
    """
    return _rendered(made, _sections(made, seen, where, command, task), where)


def _rendered(made: StudyFit | str, sections: Sequence[Section], where: str) -> str:
    return render(
        _TEMPLATE,
        title=Path(where).name if Path(where).is_file() else where,
        source="" if isinstance(made, str) else made.form.source,
        lead=[] if isinstance(made, str) else _lead(made),
        sections=sections,
        plotly=Markup(get_plotlyjs()),
    )


def _sections(
    made: StudyFit | str,
    seen: StudyEvidence,
    where: str,
    command: Sequence[str],
    task: TaskAnswer | str | None,
) -> list[Section]:
    """In the order of the page: the law's figures, the study's, the law's tables, provenance."""
    origin = provenance(made, seen, where, command)
    if isinstance(made, str):
        shades = style.shades(seen.records["budget"].dropna()) if "budget" in seen.records else {}
        why = Section("prediction", "Prediction", absent=f"There is no law yet: {made}")
        return [why, *study_sections.sections(seen, shades), origin]
    figures = Figures(made, *counted(made))
    law = [
        _answer(made, figures),
        _doubts(made),
        *_pictures(made, figures),
        *([] if task is None else [task_section(task, figures)]),
        _parameters(made),
        _certificate(made),
        _backtests(made),
        _influence(made),
        _notes(made),
    ]
    size, cost, unit = counted(made)
    runs = f"{len(made.points)} of {len(made.all_points)} runs"
    for section in law:
        section.rests = f"From {runs}. N: {size}; C: {cost}; loss in {unit}."
    first = next(i for i, section in enumerate(law) if section.name == "parameters")
    return [*law[:first], *study_sections.sections(seen, figures.shades), *law[first:], origin]


def _lead(made: StudyFit) -> list[Cell]:
    p = made.points
    given = (("N", p.parameters), ("D", p.tokens), ("C", p.flops), ("loss", p.loss))
    ranges = [
        Markup("{} {}").format(name, span((x.min(), x.max()), 4))
        for name, x in given
        if x is not None
    ]
    return [_SYMBOLS, Markup("; ").join([f"{len(p)} runs", *ranges]) + "."]


def _answer(made: StudyFit, figures: Figures) -> Section:
    """The prediction with its doubt, the law in numbers, and the note that matters most."""
    section = Section("prediction", "Answer")
    f = figures.prediction
    if isinstance(f, Prediction):
        section.rows = _predicted(made, f)
        section.after = [doubt_of(made, f)]
    else:
        why = f or "No target is given (target.flops, target.parameters, target.tokens)."
        section.rows = [["Loss", why]]
    values = Markup(", ").join(
        Markup("{} = {}").format(symbol, number(value, 4))
        for symbol, value in made.fit.values.items()
    )
    verdict = "certified" if made.fit.certificate.holds else "not certified"
    section.rows.append(["Law", values])
    section.rows += [["", made.form.source], ["Fit", f"{verdict} as the global optimum"]]
    section.rows += [["N* grows as", text] for text in _allocation(made)]
    count = len(made.doubts) - 1
    more = f" ({count} more below)" if count > 0 else ""
    first = f"{made.doubts[0]}{more}" if made.doubts else "none was found"
    section.rows.append(["First doubt", first])
    section.after += skill_lines(made.skill)
    return section


def _predicted(made: StudyFit, f: Prediction) -> list[list[Cell]]:
    level = f"{made.job.level:.0%}"
    rows: list[list[Cell]] = [
        ["Loss", number(f.loss)],
        ["50% interval", span(f.inner)],
        [f"{level} interval", span(f.outer)],
    ]
    names = (
        ("N*, best parameters", "D*, best tokens") if f.sizes else ("N, parameters", "D, tokens")
    )
    for i, (name, value) in enumerate(zip(names, (f.parameters, f.tokens), strict=True)):
        if np.isfinite(value):  # not by a law of C alone
            ends = Markup(" ({})").format(span(f.sizes[i], 3)) if f.sizes else ""
            rows.append([name, Markup("{}{}").format(number(value), ends)])
    compute = Markup("{} FLOPs, {} times the most expensive run").format(
        number(f.flops, 4), number(f.extrapolation_factor, 4)
    )
    return [*rows, ["Compute", compute]]


def _doubts(made: StudyFit) -> Section:
    absent = "" if made.doubts else "No reason was found to doubt the numbers."
    return Section("doubts", "Reasons for doubt", after=[*made.doubts], absent=absent)


def _notes(made: StudyFit) -> Section:
    absent = "" if made.notes else "All rows of the table are used as they are."
    return Section("notes", "What was done with the table", after=[*made.notes], absent=absent)


def _pictures(made: StudyFit, figures: Figures) -> list[Section]:
    level, key = f"{made.job.level:.0%}", flops_key(figures.shades)
    return [
        Section("isoflop", "Loss against model size, for each compute budget", [
            ("isoflop-curves", figures.isoflop(),
             "Each colour is one compute budget. The curve is a parabola in log N fitted to its "
             "runs, and the diamond its minimum: the best size for this compute. Hollow dots are "
             "runs of a budget whose parabola was rejected, or runs that the law is not fitted to "
             "(the parabola is). Hover over a dot for the reason." + figures.above()),
        ], after=_isoflop_numbers(made), key=key),
        Section("optimum", "Best model size and number of tokens for a compute budget", [
            ("best-parameters", figures.optimum("parameters"), ""),
            ("best-tokens", figures.optimum("tokens"),
             f"Solid line: the best value by the law L(N, D), with the {level} band of its "
             f"resampled fits. Dashed blue line: the power law through the diamonds, which are the "
             f"minima of the parabolas, with its {level} band. Both estimate the same quantity; "
             "where they differ, the runs do not determine it. Star: the target."),
        ]),
        Section("envelope", "Loss against compute", [
            ("loss-by-compute", figures.loss_by_compute(),
             "The line is L*(C), the lowest loss at each compute by the law. Without noise, all "
             f"runs would lie on it or above. Grey: its {level} band from the resampled fits. "
             "Orange, beyond the most expensive run: the predicted loss of a new run, with its 50% "
             f"and {level} intervals. Star: the target, with its {level} interval. The law is not "
             "fitted to hollow dots."),
        ], key=key),
        Section("surface", "Predicted loss over model size and tokens", [
            ("contours", figures.contours(),
             "Each grey contour joins points with the same predicted loss. Dots: the runs. Dashed "
             "line: the best N and D for each compute. Star: the target; if it is far from the "
             "dots, the prediction extrapolates far."),
        ], key=key),
        Section("residuals", "Residuals of the law", [
            ("residuals-by-compute", figures.residuals("flops"), ""),
            ("residuals-by-size", figures.residuals("parameters"),
             "Observed minus predicted log loss of each run. Scatter around zero is noise. A slope "
             "or a curve is an error of the law, which grows beyond the runs. The law is not "
             "fitted to hollow dots."),
        ], key=key),
        Section("backtests", "Backtests: predictions of more expensive runs", [
            ("backtest-errors", figures.backtests(),
             "What this study would have predicted from its cheap budgets alone, by the method of "
             "the answer, one and two budgets ahead. Each dot is one predicted run; its colour is "
             "the largest budget known then. Hollow dots are outside the 90% interval of that "
             "moment. The shaded areas are today's 50% and 90% intervals."),
        ], key=key),
    ]  # fmt: skip


def _isoflop_numbers(made: StudyFit) -> list[Cell]:
    iso = made.isoflop
    if iso is None:
        return []
    if isinstance(iso, str):
        return [iso]
    found: list[Cell] = []
    for name, law in (("N*", iso.parameters), ("D*", iso.tokens)):
        ends = law.interval(made.job.level)[:, 1]
        wide = Markup(" ({})").format(span(ends, 4)) if np.isfinite(ends).all() else ""
        found.append(
            Markup("{} = {} C<sup>a</sup>, a = {}{}, through the minima of {} parabolas.").format(
                name, number(law.k, 4), number(law.a, 4), wide, len(iso.vertices)
            )
        )
    refused = [Markup("No parabola at {} FLOPs: {}.").format(number(r.budget, 3), r.why)
               for r in iso.refusals]  # fmt: skip
    return [*found, *refused]


def _allocation(made: StudyFit) -> list[Cell]:
    if made.allocation is None:
        return []
    a, ends = made.allocation
    return [Markup("C<sup>a</sup>, a = {} ({})").format(number(a, 4), span(ends.tolist(), 4))]


def _parameters(made: StudyFit) -> Section:
    low, high = made.replicates.interval(made.job.level)
    errors, level = made.replicates.errors, f"{made.job.level:.0%}"
    head: list[Cell] = ["", "value", "std. error", f"{level} low", "high", *map(str, made.others)]
    rows = [head]
    for i, (symbol, value) in enumerate(made.fit.values.items()):
        others = [other.values[symbol] for other in made.others.values()]
        cells = (value, errors[symbol], low[i], high[i], *others)
        rows.append([symbol, *(number(x) for x in cells)])
    text = "The last columns are fits of the same law with other objectives, and to all runs."
    return Section("parameters", "Parameters of the law", rows=rows, head=True, after=[text])


def _certificate(made: StudyFit) -> Section:
    c, fit = made.fit.certificate, made.fit
    minima = f"{len(c.minima)} from {sum(b.starts for b in c.minima) + c.failed_starts} starts"
    rows: list[list[Cell]] = [
        ["Is it the global optimum?", "yes" if c.holds else "; ".join(c.problems)],
        ["Objective", Markup("{} ({})").format(number(fit.value, 10), str(fit.objective))],
        ["Scaled gradient", number(c.scaled_gradient, 2)],
        ["Curvature", number(c.curvature, 4)],
        [
            "Minima",
            minima
            + (f", {c.failed_starts} of which reached no minimum" if c.failed_starts else ""),
        ],
        ["Parameters at a limit of their range", "; ".join(c.edges) or "none"],
        ["Method", c.method],
        [
            "Resampled fits that are not certified",
            f"{made.replicates.uncertified} of {made.job.bootstraps}",
        ],
    ]
    return Section("certificate", "Certificate of the fit", rows=rows)


def _backtests(made: StudyFit) -> Section:
    level = f"{made.job.level:.0%}"
    section = Section("backtest-table", "Backtests of the law alone", head=True)
    if not made.backtests:
        section.absent = "There are no backtests; the section with their figure says why."
        return section
    section.rows = [
        ["fitted budgets", "runs", "times their compute", "error", "bias",
         f"inside resampled {level}", f"inside calibrated {level}"]
    ]  # fmt: skip
    section.after = [
        "Error (root mean square) and bias compare predicted with observed loss over all runs of "
        "the more expensive budgets. Resampled: the interval of resampling alone. Calibrated: the "
        "interval with noise and discrepancy."
    ]
    for r in made.backtests:
        section.rows.append([
            str(r.budgets), str(r.runs), span((r.factors.min(), r.factors.max()), 3),
            percent(float(np.sqrt(np.mean(r.errors**2)))),
            percent(float(np.mean(r.errors)), sign="+"),
            percent(r.inside_resampled.mean(), 0), percent(r.inside_calibrated.mean(), 0),
        ])  # fmt: skip
    return section


def _influence(made: StudyFit) -> Section:
    rows: list[list[Cell]] = [["run", *made.form.symbols]]
    rows += [[name, *(number(moved[s], 3) for s in moved)] for name, moved in made.influence()]
    text = "The change of each parameter by including the run; the most influential run first."
    return Section("influence", "Most influential runs", rows=rows, head=True, after=[text])
