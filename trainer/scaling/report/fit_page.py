"""`study report`: the page of a fit, and beside it the main figures for papers and the records.

The order of the page: the answer, the doubts, the figures, the numbers, and where they come from.

Invariant: the same study and versions give the same bytes. Every number in a table is there in full
(<data value=>). A section without data says why. Nothing is loaded from elsewhere.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from markupsafe import Markup

from forescale.ground.storage import write_file
from forescale.pages.document import Cell, Section, number, render, span
from forescale.pages.figure import Figure, shades
from forescale.scaling.analysis.table_fit import Prediction, StudyFit
from forescale.scaling.analysis.task_fit import TaskFit
from forescale.scaling.report import study_sections
from forescale.scaling.report.evidence import StudyEvidence
from forescale.scaling.report.fit_figures import Figures, flops_key
from forescale.scaling.report.fit_text import backtest_rows, doubt_of, parameter_rows, skill_lines
from forescale.scaling.report.provenance import RECORDS, as_csv, counted, provenance
from forescale.scaling.report.task_section import task_section

MAIN = ("isoflop", "optimum", "envelope", "task", "forecasts", "response")  # sections for papers
_SYMBOLS = (
    "N: model parameters. D: training tokens. C: training compute in FLOPs. L: loss. A star, as in "
    "N*, marks the best value for a given compute."
)


def write(
    study: StudyFit | str,
    evidence: StudyEvidence,
    path: Path,
    where: str,
    command: Sequence[str],
    task: TaskFit | str | None = None,
) -> list[Path]:
    """Write the report, and return the paths. For the arguments see `page`."""
    sections = _sections(study, evidence, where, command, task)
    main = {s.name: s for s in sections if s.name in MAIN}
    html = _rendered(study, sections, where)
    return write_report(path, html, main, evidence.records)


def write_report(
    path: Path, html: str, figures: Mapping[str, Section], records: pd.DataFrame | None = None
) -> list[Path]:
    """Write a page, and in the folder `beside(path)` the figures of sections as NAME.png and
    NAME.svg, those of one section below each other, and the records; each file atomically. Return
    the paths."""
    from forescale.pages.picture import pictures  # matplotlib is slow to import

    files = {path: html.encode()}
    folder = beside(path)
    folder.mkdir(parents=True, exist_ok=True)
    if records is not None:
        files[folder / RECORDS] = as_csv(records)
    for name, section in figures.items():
        panels = [p for _, p, _ in section.pictures if isinstance(p, Figure)]
        if panels:
            drawn = pictures(panels, section.key)
            files |= {folder / f"{name}.{form}": data for form, data in drawn.items()}
    for file, data in files.items():
        write_file(file, data)
    return [*files]


def beside(path: Path) -> Path:
    """Return the folder of a report's other files: report-files/ for report.html."""
    return path.with_name(f"{path.stem}-files")


def page(
    study: StudyFit | str,
    evidence: StudyEvidence,
    where: str,
    command: Sequence[str],
    task: TaskFit | str | None = None,
) -> str:
    """Return the report as HTML.

    study: the fit, or why there is none yet; where: the file, or a name of the runs; command: the
    command line that study the report; task: the answer about a metric, or why there is none.
    """
    return _rendered(study, _sections(study, evidence, where, command, task), where)


def _rendered(study: StudyFit | str, sections: Sequence[Section], where: str) -> str:
    return render(
        title=f"Scaling law of {Path(where).name if Path(where).is_file() else where}",
        intro="" if isinstance(study, str) else study.form.source,
        lead=[] if isinstance(study, str) else _lead(study),
        sections=sections,
    )


def _sections(
    study: StudyFit | str,
    evidence: StudyEvidence,
    where: str,
    command: Sequence[str],
    task: TaskFit | str | None,
) -> list[Section]:
    """Return the sections: the law's figures, the study's, the law's tables, provenance."""
    origin = provenance(study, evidence, where, command)
    if isinstance(study, str):
        has_budgets = "budget" in evidence.records
        colours = shades(evidence.records["budget"].dropna()) if has_budgets else {}
        why = Section("prediction", "Prediction", absent=f"There is no law yet: {study}")
        return [why, *study_sections.sections(evidence, colours), origin]
    figures = Figures(study, *counted(study))
    law = [
        _answer(study, figures),
        _doubts(study),
        *_pictures(study, figures),
        *([] if task is None else [task_section(task, figures)]),
        _parameters(study),
        _certificate(study),
        _backtests(study),
        _influence(study),
        _notes(study),
    ]
    size, cost, unit = counted(study)
    runs = f"{len(study.points)} of {len(study.all_points)} runs"
    for section in law:
        section.rests = f"From {runs}. N: {size}; C: {cost}; loss in {unit}."
    first = next(i for i, section in enumerate(law) if section.name == "parameters")
    return [*law[:first], *study_sections.sections(evidence, figures.shades), *law[first:], origin]


def _lead(study: StudyFit) -> list[Cell]:
    p = study.points
    columns = (("N", p.parameters), ("D", p.tokens), ("C", p.flops), ("loss", p.loss))
    ranges = [
        Markup("{} {}").format(name, span((x.min(), x.max()), 4))
        for name, x in columns
        if x is not None
    ]
    return [_SYMBOLS, Markup("; ").join([f"{len(p)} runs", *ranges]) + "."]


def _answer(study: StudyFit, figures: Figures) -> Section:
    """The prediction with its doubt, the law in numbers, and the note that matters most."""
    section = Section("prediction", "Answer", strong=True)
    f = figures.prediction
    if isinstance(f, Prediction):
        section.rows = _predicted(study, f)
        section.after = [doubt_of(study, f)]
    else:
        why = f or "No target is given (target.flops, target.parameters, target.tokens)."
        section.rows = [["Loss", why]]
    values = Markup(", ").join(
        Markup("{} = {}").format(symbol, number(value, 4))
        for symbol, value in study.fit.values.items()
    )
    verdict = "certified" if study.fit.certificate.holds else "not certified"
    section.rows.append(["Law", values])
    section.rows += [["", study.form.source], ["Fit", f"{verdict} as the global optimum"]]
    section.rows += [["N* grows as", text] for text in _allocation(study)]
    count = len(study.doubts) - 1
    others = f" ({count} others below)" if count > 0 else ""
    first = f"{study.doubts[0]}{others}" if study.doubts else "none was found"
    section.rows.append(["First doubt", first])
    section.after += skill_lines(study.skill)
    return section


def _predicted(study: StudyFit, f: Prediction) -> list[list[Cell]]:
    level = f"{study.job.level:.0%}"
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


def _doubts(study: StudyFit) -> Section:
    absent = "" if study.doubts else "No reason was found to doubt the numbers."
    return Section("doubts", "Reasons for doubt", after=[*study.doubts], absent=absent)


def _notes(study: StudyFit) -> Section:
    absent = "" if study.notes else "All rows of the table are used as they are."
    return Section("notes", "How the table was used", after=[*study.notes], absent=absent)


def _pictures(study: StudyFit, figures: Figures) -> list[Section]:
    level, key = f"{study.job.level:.0%}", flops_key(figures.shades)
    return [
        Section("isoflop", "Loss against model size, for each compute budget", [
            ("isoflop-curves", figures.isoflop(),
             "Each colour is one compute budget. The curve is a parabola in log N fitted to its "
             "runs, and the diamond its minimum: the best size for this compute. Hollow dots are "
             "runs of a budget whose parabola was rejected, or runs that the law is not fitted to "
             "(the parabola is). Hover over a dot for the reason." + figures.above()),
        ], after=_isoflop_numbers(study), key=key),
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
             "Each grey line joins points with the same predicted loss. Dots: the runs. Dashed "
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


def _isoflop_numbers(study: StudyFit) -> list[Cell]:
    iso = study.isoflop
    if iso is None:
        return []
    if isinstance(iso, str):
        return [iso]
    lines: list[Cell] = []
    for name, law in (("N*", iso.parameters), ("D*", iso.tokens)):
        ends = law.interval(study.job.level)[:, 1]
        wide = Markup(" ({})").format(span(ends, 4)) if np.isfinite(ends).all() else ""
        lines.append(
            Markup("{} = {} C<sup>a</sup>, a = {}{}, through the minima of {} parabolas.").format(
                name, number(law.k, 4), number(law.a, 4), wide, len(iso.vertices)
            )
        )
    refused = [Markup("No parabola at {} FLOPs: {}.").format(number(r.budget, 3), r.why)
               for r in iso.refusals]  # fmt: skip
    return [*lines, *refused]


def _allocation(study: StudyFit) -> list[Cell]:
    if study.allocation is None:
        return []
    a, ends = study.allocation
    return [Markup("C<sup>a</sup>, a = {} ({})").format(number(a, 4), span(ends.tolist(), 4))]


def _parameters(study: StudyFit) -> Section:
    text = "The last columns are fits of the same law with other objectives, and to all runs."
    rows = parameter_rows(study)
    return Section("parameters", "Parameters of the law", rows=rows, head=True, after=[text])


def _certificate(study: StudyFit) -> Section:
    c, fit = study.fit.certificate, study.fit
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
            f"{study.replicates.uncertified} of {study.job.bootstraps}",
        ],
    ]
    return Section("certificate", "Certificate of the fit", rows=rows)


def _backtests(study: StudyFit) -> Section:
    section = Section("backtest-table", "Backtests of the law alone", head=True)
    if not study.backtests:
        section.absent = "There are no backtests; the section with their figure says why."
        return section
    section.rows = backtest_rows(study)
    section.after = [
        "Error (root mean square) and bias compare predicted with observed loss over all runs of "
        "the more expensive budgets. Resampled: the interval of resampling alone. Calibrated: the "
        "interval with noise and discrepancy."
    ]
    return section


def _influence(study: StudyFit) -> Section:
    rows: list[list[Cell]] = [["run", *study.form.symbols]]
    rows += [[name, *(number(moved[s], 3) for s in moved)] for name, moved in study.influence()]
    text = "The change of each parameter by including the run; the most influential run first."
    return Section("influence", "Most influential runs", rows=rows, head=True, after=[text])
