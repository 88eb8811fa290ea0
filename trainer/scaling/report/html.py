"""`study report`: one HTML file of a study's fit, which opens anywhere, without a network.

    what is foretold -> what makes it doubtful -> the pictures -> the numbers -> where they are from

Invariant: the same study by the same versions makes the same bytes; every number of a table stands
there in full (<data value=>); a section without data says why; nothing is loaded from elsewhere.
"""

from collections.abc import Sequence
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from forescale.scaling.analysis.answer import Foretold, StudyFit
from forescale.scaling.report import study_sections, style
from forescale.scaling.report.evidence import Evidence
from forescale.scaling.report.figures import Figures
from forescale.scaling.report.provenance import RECORDS, as_csv, counted, provenance
from forescale.scaling.report.sections import Cell, Section, flops_key, number, percent, span
from forescale.storage import write_file

_TEMPLATE = Path(__file__).with_name("report.html.j2")


def write(made: StudyFit | str, seen: Evidence, path: Path, where: str, command: Sequence[str]):
    """Write the report, each file whole or not at all: the page, and in the folder `beside` it the
    main pictures for papers and the records. For the rest see `page`."""
    # Drawing for papers is slow to import, and only wanted here.
    from forescale.scaling.report.paper import write_pictures

    sections = _sections(made, seen, where, command)
    folder = beside(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(path, _rendered(made, sections, where).encode())
    write_file(folder / RECORDS, as_csv(seen.records))
    write_pictures(sections, folder)


def beside(path: Path) -> Path:
    """The folder of what belongs to a report: report-files/ of report.html."""
    return path.with_name(f"{path.stem}-files")


def page(made: StudyFit | str, seen: Evidence, where: str, command: Sequence[str]) -> str:
    """The report as text. made: the fit, or why there is none yet; where: the file, or what the
    runs are called; command: the words that made it."""
    return _rendered(made, _sections(made, seen, where, command), where)


def _rendered(made: StudyFit | str, sections: Sequence[Section], where: str) -> str:
    room = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return room.from_string(_TEMPLATE.read_text()).render(
        title=Path(where).name if Path(where).is_file() else where,
        source="" if isinstance(made, str) else made.form.source,
        lead=[] if isinstance(made, str) else _lead(made),
        sections=sections,
        plotly=Markup(get_plotlyjs()),
    )


def _sections(
    made: StudyFit | str, seen: Evidence, where: str, command: Sequence[str]
) -> list[Section]:
    """In the order of the page: the law's pictures, the study's, the law's tables, provenance."""
    origin = provenance(made, seen, where, command)
    if isinstance(made, str):
        shades = style.shades(seen.records["budget"].dropna()) if "budget" in seen.records else {}
        why = Section("foretold", "What is foretold", absent=f"There is no law yet: {made}")
        return [why, *study_sections.sections(seen, shades), origin]
    figures = Figures(made, *counted(made))
    law = [
        _foretold(made, figures),
        _notes(made),
        *_pictures(made, figures),
        _parameters(made),
        _certificate(made),
        _roll_outs(made),
        _influence(made),
    ]
    size, cost, unit = counted(made)
    runs = f"{len(made.points)} of {len(made.every)} runs"
    for section in law:
        section.rests = f"From {runs}; N {size}, C {cost}, loss in {unit}."
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
    verdict = "certified" if made.fit.certificate.holds else "NOT certified"
    law = f"{len(p)} runs; the fit is {verdict}"
    if notes := len(made.notes) + len(made.disagreements()):
        law += f"; {notes} note{'s' * (notes > 1)} below"
    return [f"{law}.", Markup("; ").join(ranges) + "."]


def _foretold(made: StudyFit, figures: Figures) -> Section:
    section = Section("foretold", "What is foretold")
    f, level = figures.foretold, f"{made.job.level:.0%}"
    if not isinstance(f, Foretold):
        section.absent = f or "No target is given (target.flops, target.parameters, target.tokens)."
        return section
    section.rows = [
        ["Loss", number(f.loss)],
        ["Interval of 50%", span(f.inner)],
        [f"Interval of {level}", span(f.outer)],
        [f"{level} of resampling alone", span(f.bare)],
        ["N, parameters", number(f.parameters)],
        ["D, tokens", number(f.tokens)],
        ["Compute over the dearest run's", number(f.beyond, 4)],
    ]
    if not np.isfinite(f.parameters):
        section.rows = [r for r in section.rows if r[0] not in ("N, parameters", "D, tokens")]
    rests = "the prior alone" if made.discrepancy.is_prior else f"{f.origins} roll-outs"
    section.after = [
        Markup(
            "The intervals are of a run to come: noise of the fit, noise of a run, and {} of loss "
            "a decade of compute beyond the runs, which rests on {}. Resampling alone knows of the "
            "first only."
        ).format(percent(made.discrepancy.a_decade), rests)
    ]
    return section


def _notes(made: StudyFit) -> Section:
    notes: list[Cell] = [*made.notes, *made.disagreements()]
    absent = "" if notes else "Nothing was found that makes the numbers doubtful."
    return Section("notes", "What to mind", after=notes, absent=absent)


def _pictures(made: StudyFit, figures: Figures) -> list[Section]:
    level, key = f"{made.job.level:.0%}", flops_key(figures.shades)
    return [
        Section("isoflop", "Loss over size, budget by budget", [
            ("isoflop-curves", figures.isoflop(),
             "Each colour is one budget of compute, its curve the parabola in log N through its "
             "runs, the diamond its lowest point: the best size for so much compute. Hollow: a "
             "budget whose parabola was refused, or a run that the law is not fitted to (the "
             "parabola is); point at one for the reason."),
        ], after=_isoflop_numbers(made), key=key),
        Section("optimum", "The best size and the best data for a budget", [
            ("best-parameters", figures.optimum("parameters"), ""),
            ("best-tokens", figures.optimum("tokens"),
             f"Solid: by the law L(N, D), with the {level} band of its resampled fits. Dashed "
             f"blue: the power law through the diamonds, the parabolas' lowest points, with its "
             f"{level} band. Two ways to one answer: where they part, the runs don't settle "
             "it. Star: the target."),
        ], after=_allocation(made)),
        Section("envelope", "Loss against compute", [
            ("loss-by-compute", figures.loss_by_compute(),
             "The line is L*(C), the least loss for so much compute by the law; but "
             f"for noise runs lie on it or above. Grey: its {level} band by the resampled fits. "
             f"Orange, beyond the dearest run: 50% and {level} intervals of a run to come. "
             f"Star: the target, with its {level} interval. Hollow runs are not fitted to."),
        ], key=key),
        Section("surface", "The law's surface", [
            ("contours", figures.contours(),
             "Along a grey contour the law says the same loss, which stands on it. Dots: the runs; "
             "dashed: the best N and D for each compute; star: the target. A star far from the "
             "dots is foretold from afar."),
        ], key=key),
        Section("residuals", "What the law leaves over", [
            ("residuals-by-compute", figures.residuals("flops"), ""),
            ("residuals-by-size", figures.residuals("parameters"),
             "Observed against the law, at each run. Scatter around zero is noise; a slope or a "
             "bow is something that the law doesn't know, and it grows beyond the runs. Hollow "
             "runs are not fitted to."),
        ], key=key),
        Section("fan", "How it met dearer runs", [
            ("roll-outs", figures.fan(),
             "The law was fitted to the cheaper budgets alone and asked for the dearer ones. Each "
             "dot is one run so foretold, coloured by the dearest budget that the law knew then; "
             "hollow: outside of the interval that was calibrated then. The fan is today's "
             f"interval (50% and {level}), which the target is given."),
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
            Markup("{} = {} C<sup>a</sup>, a = {}{}, through {} lowest points.").format(
                name, number(law.k, 4), number(law.a, 4), wide, len(iso.vertices)
            )
        )
    refused = [Markup("Refused {} FLOPs: {}.").format(number(r.budget, 3), r.why)
               for r in iso.refusals]  # fmt: skip
    return [*found, *refused]


def _allocation(made: StudyFit) -> list[Cell]:
    if made.allocation is None:
        return []
    a, ends = made.allocation
    return [
        Markup("By the law N* grows as C<sup>a</sup>, a = {} ({}).").format(
            number(a, 4), span(ends.tolist(), 4)
        )
    ]


def _parameters(made: StudyFit) -> Section:
    low, high = made.replicates.interval(made.job.level)
    errors, level = made.replicates.errors, f"{made.job.level:.0%}"
    head: list[Cell] = ["", "value", "std. error", f"{level} low", "high", *map(str, made.others)]
    rows = [head]
    for i, (symbol, value) in enumerate(made.fit.values.items()):
        others = [other.values[symbol] for other in made.others.values()]
        cells = (value, errors[symbol], low[i], high[i], *others)
        rows.append([symbol, *(number(x) for x in cells)])
    told = "The last columns are the same law by other objectives, and fitted to all runs."
    return Section("parameters", "Parameters", rows=rows, head=True, after=[told])


def _certificate(made: StudyFit) -> Section:
    c, fit = made.fit.certificate, made.fit
    minima = f"{len(c.basins)} from {sum(b.starts for b in c.basins) + c.astray} starts"
    rows: list[list[Cell]] = [
        ["Verdict", "the optimum" if c.holds else "; ".join(c.problems)],
        ["Objective", Markup("{} ({})").format(number(fit.value, 10), str(fit.objective))],
        ["Scaled gradient", number(c.scaled_gradient, 2)],
        ["Curvature", number(c.curvature, 4)],
        ["Minima", minima + (f", {c.astray} of them astray" if c.astray else "")],
        ["Parameters at an edge", "; ".join(c.edges) or "none"],
        ["Method", c.method],
        ["Resampled fits uncertified", f"{made.replicates.uncertified} of {made.job.bootstraps}"],
    ]
    return Section("certificate", "Certificate of the fit", rows=rows)


def _roll_outs(made: StudyFit) -> Section:
    level = f"{made.job.level:.0%}"
    section = Section("roll-out-table", "Roll-outs", head=True)
    if not made.roll_outs:
        section.absent = "There is none, for the reason above: How it met dearer runs."
        return section
    section.rows = [
        ["fitted to budgets", "runs", "beyond, times", "error", "bias", f"inside bare {level}",
         f"inside calibrated {level}"]
    ]  # fmt: skip
    section.after = [
        "Error and bias are of the foretold against the observed loss, over all runs of the dearer "
        "budgets; bare: the interval of resampling alone."
    ]
    for r in made.roll_outs:
        section.rows.append([
            str(r.budgets), str(r.runs), span((r.factors.min(), r.factors.max()), 3),
            percent(float(np.sqrt(np.mean(r.errors**2)))),
            percent(float(np.mean(r.errors)), sign="+"),
            percent(r.bare.mean(), 0), percent(r.calibrated.mean(), 0),
        ])  # fmt: skip
    return section


def _influence(made: StudyFit) -> Section:
    rows: list[list[Cell]] = [["run", *made.form.symbols]]
    rows += [[name, *(number(moved[s], 3) for s in moved)] for name, moved in made.influence()]
    told = "What leaving the run in adds to each parameter; the most telling first."
    return Section("influence", "Runs that move the law most", rows=rows, head=True, after=[told])
