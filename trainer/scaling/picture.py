"""`study report`: one HTML file of a study's fit, which opens anywhere, without a network.

    what is foretold -> what makes it doubtful -> the pictures -> the numbers -> where they are from

Invariant: the same study by the same versions makes the same bytes; every number of a table stands
there in full (<data value=>); a section without data says why; nothing is loaded from elsewhere.
"""

import platform
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup
from plotly.io import to_html
from plotly.offline import get_plotlyjs

from trainer.durable import hash_file, write_file
from trainer.scaling.figures import Figures, Picture
from trainer.scaling.study_fit import Foretold, StudyFit

_PACKAGES = ("forescale", "numpy", "scipy", "pandas", "plotly")
_TEMPLATE = Path(__file__).with_name("report.html.j2")

Cell = Markup | str


@dataclass
class Section:
    """pictures: (name, picture or why there is none, caption); rows: of a table, the first its head
    where `head` says so; after: sentences; absent: why there is nothing."""

    name: str
    title: str
    pictures: list[tuple[str, Picture, str]] = field(default_factory=list)
    rows: list[list[Cell]] = field(default_factory=list)
    head: bool = False
    keyed: bool = False  # shows which colour is which budget
    after: list[Cell] = field(default_factory=list)
    absent: str = ""

    def drawn(self) -> Iterator[tuple[Markup, str]]:
        """Each picture as HTML, or the sentence in its place, and its caption."""
        for name, picture, caption in self.pictures:
            if isinstance(picture, str):
                yield Markup('<p class="absent">Not drawn: {}</p>').format(picture), ""
            else:
                yield _html(name, picture), caption


def write(made: StudyFit, path: Path, where: str, command: Sequence[str]) -> None:
    """Write the report, whole or not at all. where: the file, or what the runs are called;
    command: the words that made it."""
    write_file(path, page(made, where, command).encode())


def page(made: StudyFit, where: str, command: Sequence[str]) -> str:
    """The report as text."""
    figures = Figures(made, *_counted(made))
    room = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    shades = figures.shades.items()
    return room.from_string(_TEMPLATE.read_text()).render(
        title=Path(where).name if Path(where).is_file() else where,
        source=made.form.source,
        lead=_lead(made),
        budgets=[(_number(budget, 3), colour) for budget, colour in shades],
        sections=[
            _foretold(made, figures),
            _notes(made),
            *_pictures(made, figures),
            _parameters(made),
            _certificate(made),
            _roll_outs(made),
            _influence(made),
            _provenance(made, figures, where, command),
        ],
        plotly=Markup(get_plotlyjs()),
    )


def _counted(made: StudyFit) -> tuple[str, str, str]:
    """How N and C and the loss are counted. A table's own columns are what its makers counted."""
    table, p = made.table, made.every
    size = "as the table counts" if "parameters" in table else made.job.size.replace("_", " ")
    cost = "as the table counts" if "flops" in table else made.job.cost
    unit = "nats a token" if "validation" in table else "the table's unit"
    return size, "6 N D" if p.flops is None else cost, unit


def _html(name: str, picture: Picture) -> Markup:
    save = {"format": "svg", "filename": name}
    config = {"displaylogo": False, "responsive": True, "toImageButtonOptions": save}
    made = to_html(picture, config, include_plotlyjs=False, full_html=False, div_id=name)
    return Markup(made)


def _number(value: float, digits: int = 5) -> Markup:
    """Rounded for the eye, whole for programs."""
    text = f"{value:.{digits}g}"
    if "e" in text:
        mantissa, power = text.split("e")
        text = f"{mantissa}×10<sup>{int(power)}</sup>"
    shown = Markup(text.replace("-", "−"))
    return Markup('<data value="{}">{}</data>').format(repr(float(value)), shown)


def _range(ends: Iterable[float], digits: int = 5) -> Markup:
    return Markup("{} to {}").format(*(_number(x, digits) for x in ends))


def _percent(value: float, digits: int = 2, sign: str = "") -> Markup:
    return Markup('<data value="{}">{}</data>').format(
        repr(float(value)), f"{value:{sign}.{digits}%}".replace("-", "−")
    )


def _lead(made: StudyFit) -> list[Cell]:
    p = made.points
    given = (("N", p.parameters), ("D", p.tokens), ("C", p.flops), ("loss", p.loss))
    ranges = [
        Markup("{} {}").format(name, _range((x.min(), x.max()), 4))
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
        ["Loss", _number(f.loss)],
        ["Interval of 50%", _range(f.inner)],
        [f"Interval of {level}", _range(f.outer)],
        [f"{level} of resampling alone", _range(f.bare)],
        ["N, parameters", _number(f.parameters)],
        ["D, tokens", _number(f.tokens)],
        ["Compute over the dearest run's", _number(f.beyond, 4)],
    ]
    if not np.isfinite(f.parameters):
        section.rows = [r for r in section.rows if r[0] not in ("N, parameters", "D, tokens")]
    rests = "the prior alone" if made.discrepancy.is_prior else f"{f.origins} roll-outs"
    section.after = [
        Markup(
            "The intervals are of a run to come: noise of the fit, noise of a run, and {} of loss "
            "a decade of compute beyond the runs, which rests on {}. Resampling alone knows of the "
            "first only."
        ).format(_percent(made.discrepancy.a_decade), rests)
    ]
    return section


def _notes(made: StudyFit) -> Section:
    notes: list[Cell] = [*made.notes, *made.disagreements()]
    absent = "" if notes else "Nothing was found that makes the numbers doubtful."
    return Section("notes", "What to mind", after=notes, absent=absent)


def _pictures(made: StudyFit, figures: Figures) -> list[Section]:
    level = f"{made.job.level:.0%}"
    return [
        Section("isoflop", "Loss over size, budget by budget", [
            ("isoflop-curves", figures.isoflop(),
             "Each colour is one budget of compute, its curve the parabola in log N through its "
             "runs, the diamond its lowest point: the best size for so much compute. Hollow: a "
             "budget whose parabola was refused, or a run that the law is not fitted to (the "
             "parabola is); point at one for the reason."),
        ], after=_isoflop_numbers(made), keyed=True),
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
        ], keyed=True),
        Section("surface", "The law's surface", [
            ("contours", figures.contours(),
             "Along a grey contour the law says the same loss, which stands on it. Dots: the runs; "
             "dashed: the best N and D for each compute; star: the target. A star far from the "
             "dots is foretold from afar."),
        ], keyed=True),
        Section("residuals", "What the law leaves over", [
            ("residuals-by-compute", figures.residuals("flops"), ""),
            ("residuals-by-size", figures.residuals("parameters"),
             "Observed against the law, at each run. Scatter around zero is noise; a slope or a "
             "bow is something that the law doesn't know, and it grows beyond the runs. Hollow "
             "runs are not fitted to."),
        ], keyed=True),
        Section("fan", "How it met dearer runs", [
            ("roll-outs", figures.fan(),
             "The law was fitted to the cheaper budgets alone and asked for the dearer ones. Each "
             "dot is one run so foretold, coloured by the dearest budget that the law knew then; "
             "hollow: outside of the interval that was calibrated then. The fan is today's "
             f"interval (50% and {level}), which the target is given."),
        ], keyed=True),
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
        wide = Markup(" ({})").format(_range(ends, 4)) if np.isfinite(ends).all() else ""
        found.append(
            Markup("{} = {} C<sup>a</sup>, a = {}{}, through {} lowest points.").format(
                name, _number(law.k, 4), _number(law.a, 4), wide, len(iso.vertices)
            )
        )
    refused = [Markup("Refused {} FLOPs: {}.").format(_number(r.budget, 3), r.why)
               for r in iso.refusals]  # fmt: skip
    return [*found, *refused]


def _allocation(made: StudyFit) -> list[Cell]:
    if made.allocation is None:
        return []
    a, ends = made.allocation
    return [
        Markup("By the law N* grows as C<sup>a</sup>, a = {} ({}).").format(
            _number(a, 4), _range(ends.tolist(), 4)
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
        rows.append([symbol, *(_number(x) for x in cells)])
    told = "The last columns are the same law by other objectives, and fitted to all runs."
    return Section("parameters", "Parameters", rows=rows, head=True, after=[told])


def _certificate(made: StudyFit) -> Section:
    c, fit = made.fit.certificate, made.fit
    minima = f"{len(c.basins)} from {sum(b.starts for b in c.basins) + c.astray} starts"
    rows: list[list[Cell]] = [
        ["Verdict", "the optimum" if c.holds else "; ".join(c.problems)],
        ["Objective", Markup("{} ({})").format(_number(fit.value, 10), str(fit.objective))],
        ["Scaled gradient", _number(c.scaled_gradient, 2)],
        ["Curvature", _number(c.curvature, 4)],
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
            str(r.budgets), str(r.runs), _range((r.factors.min(), r.factors.max()), 3),
            _percent(float(np.sqrt(np.mean(r.errors**2)))),
            _percent(float(np.mean(r.errors)), sign="+"),
            _percent(r.bare.mean(), 0), _percent(r.calibrated.mean(), 0),
        ])  # fmt: skip
    return section


def _influence(made: StudyFit) -> Section:
    rows: list[list[Cell]] = [["run", *made.form.symbols]]
    rows += [[name, *(_number(moved[s], 3) for s in moved)] for name, moved in made.influence()]
    told = "What leaving the run in adds to each parameter; the most telling first."
    return Section("influence", "Runs that move the law most", rows=rows, head=True, after=[told])


def _provenance(made: StudyFit, figures: Figures, where: str, command: Sequence[str]) -> Section:
    job, file = made.job, Path(where)
    size, cost, unit = _counted(made)
    chosen = [f"{k} = {v}" for k, v in job.rows.items()]
    chosen += [f"{ours} is its {theirs!r}" for ours, theirs in job.columns.items()]
    rows: list[list[Cell]] = [
        ["Runs", where],
        ["SHA-256", hash_file(file).sha256 if file.is_file() else "not one file"],
        ["Chosen of it", "; ".join(chosen) or "all, by its own names"],
        ["Fitted to", f"{len(made.points)} of {len(made.every)} runs"],
        ["N", size],
        ["C", cost],
        ["Loss", unit],
        ["Law", made.form.source],
        ["Objective", str(made.fit.objective)],
        ["Resampling", f"{job.bootstraps} fits, {job.resample} where it applies, seed {job.seed}"],
        ["Versions", ", ".join(f"{name} {v}" for name, v in _versions().items())],
        ["Command", Markup("<code>{}</code>").format(shlex.join(command))],
    ]
    return Section("provenance", "Where the numbers are from", rows=rows)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a checkout that isn't installed
            found[package] = "unknown"
    return found
