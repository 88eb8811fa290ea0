"""`study report`: the page of a fit, and beside it the main figures for papers and the records.

The order of the page: the answer, the doubts, the figures, the numbers, and where they come from.

Invariant: the same study and versions give the same bytes. Every number in a table is there in full
(<data value=>). A section without data says why. Nothing is loaded from elsewhere.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from forescale.ground.storage import write_output
from forescale.pages import figure as chart
from forescale.pages.document import Cell, Section, render
from forescale.scaling.analysis.forecast import Forecast
from forescale.scaling.analysis.prediction import Prediction
from forescale.scaling.analysis.table_fit import StudyFit
from forescale.scaling.analysis.task_fit import TaskFit
from forescale.scaling.report import fit_sections as parts
from forescale.scaling.report import study_sections
from forescale.scaling.report.evidence import StudyEvidence
from forescale.scaling.report.fit_figures import Figures, flops_key
from forescale.scaling.report.provenance import RECORDS, as_csv, counted, provenance
from forescale.scaling.report.task_section import task_section

MAIN = ("prediction", "isoflop", "optimum", "task", "forecasts", "response")  # sections for papers


def write(
    study: StudyFit | str, evidence: StudyEvidence, path: Path, where: str, command: Sequence[str],
    task: TaskFit | str | None = None,
) -> list[Path]:  # fmt: skip
    """Write the report, and return the paths.

    study: the fit, or why there is none yet; where: the file, or a name of the runs; command: the
    command line of the report; task: the answer about a metric, or why there is none.
    """
    html, sections = page(study, evidence, where, command, task)
    main = {s.name: s for s in sections if s.name in MAIN}
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
    if records is not None:
        files[folder / RECORDS] = as_csv(records)
    for name, section in figures.items():
        panels = [p for _, p, _ in section.pictures if isinstance(p, chart.Figure)]
        if panels:
            drawn = pictures(panels, section.key)
            files |= {folder / f"{name}.{form}": data for form, data in drawn.items()}
    for file, data in files.items():
        write_output(file, data)
    return [*files]


def beside(path: Path) -> Path:
    """Return the folder of a report's other files: report-files/ for report.html."""
    return path.with_name(f"{path.stem}-files")


def page(
    study: StudyFit | str, evidence: StudyEvidence, where: str, command: Sequence[str],
    task: TaskFit | str | None = None,
) -> tuple[str, list[Section]]:  # fmt: skip
    """Return the report as HTML, and its sections: the law's figures, the study's, the law's
    tables, provenance. For the arguments see `write`."""
    lead = list[Cell]()
    if isinstance(study, str):
        has_budgets = "budget" in evidence.records
        colours = chart.shades(evidence.records["budget"].dropna()) if has_budgets else {}
        first = [Section("prediction", "Prediction", absent=f"There is no law yet: {study}")]
        last = list[Section]()
    else:
        lead = [parts.ranges(study)]
        size, cost, unit = counted(study)
        figures = Figures(study, size, cost, unit)
        colours = figures.shades
        doubts, notes = parts.doubts(study)
        forecast = parts.of_target(evidence.forecasts, study.job, figures.prediction)
        first = [_answer(study, figures, forecast), doubts, *_pictures(study, figures)]
        if task is not None:
            first.append(task_section(task, figures))
        last = [parts.parameters(study), parts.certificate(study), parts.backtests(study),
                parts.influence(study), notes]  # fmt: skip
        runs = f"{len(study.points)} of {len(study.all_points)} runs"
        for section in (*first, *last):
            section.rests = f"From {runs}. N: {size}; C: {cost}; loss in {unit}."
        first[0].rests += f" {parts.SYMBOLS}"
    origin = provenance(study, evidence, where, command)
    sections = [*first, *study_sections.sections(evidence, colours), *last, origin]
    title = f"Scaling law of {Path(where).name if Path(where).is_file() else where}"
    return render(title=title, lead=lead, sections=sections), sections


def _answer(study: StudyFit, figures: Figures, forecast: Forecast | None) -> Section:
    """Return what the first screen of the page has."""
    section = parts.answer(study, figures.prediction, forecast)
    diamond = " Diamond: its observed loss." * bool(forecast and forecast.outcome)
    if isinstance(f := figures.prediction, Prediction) and f.repetition.get("lost"):
        diamond += " Its tokens repeat, those of a law of N and D alone don't."
    section.pictures = [
        ("loss-by-compute", figures.loss_by_compute(forecast),
         "Dots: the lowest loss of each budget. Orange: the forecast at the best N and D, with its "
         f"50% and {study.job.level:.0%} intervals for a new run. Star: the target."
         f"{diamond} Grey: the law L(N, D) alone."),
    ]  # fmt: skip
    return section


def _pictures(study: StudyFit, figures: Figures) -> list[Section]:
    level, key = f"{study.job.level:.0%}", flops_key(figures.shades)
    past = parts.history(study, figures.prediction)
    past.key, past.pictures = key, [
        ("backtest-errors", figures.backtests(),
         "What this study would have predicted from its cheap budgets alone, by the method of the "
         "answer. Each dot is one predicted run; its colour is the largest budget known then. "
         "Hollow dots are outside the 90% interval of that moment. The shaded areas are today's "
         "50% and 90% intervals."),
    ]  # fmt: skip
    return [
        Section("isoflop", "Loss against model size, for each compute budget", [
            ("isoflop-curves", figures.isoflop(),
             "Each colour is one compute budget. The curve is a parabola in log N fitted to its "
             "runs, and the diamond its minimum: the best size for this compute. Hollow dots are "
             "runs of a budget whose parabola was rejected, or runs that the law is not fitted to "
             "(the parabola is). Hover over a dot for the reason." + figures.above()),
        ], after=parts.parabola_lines(study), key=key),
        Section("optimum", "Best model size and number of tokens for a compute budget", [
            ("best-parameters", figures.optimum("parameters"), ""),
            ("best-tokens", figures.optimum("tokens"),
             f"Solid line: the best value by the law L(N, D), with the {level} band of its "
             f"resampled fits. Dashed blue line: the power law through the diamonds, which are the "
             f"minima of the parabolas, with its {level} band. Both estimate the same quantity; "
             "where they differ, the runs do not determine it. Star: the target."),
        ]),
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
        past,
    ]  # fmt: skip
