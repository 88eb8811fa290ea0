"""The answers of `study profile` and `study rates`.

Invariant: everything that makes the numbers doubtful is shown with them.
"""

from collections.abc import Sequence

from forescale.pages.document import Cell, Section, number, percent, span
from forescale.scaling.analysis.table_fit import StudyFit
from forescale.scaling.design.rate_laws import BATCH, SYMBOLS, RateLaws
from forescale.scaling.fitting.profile import Profile
from forescale.scaling.report.fit_sections import reasons


def rate_sections(laws: RateLaws) -> list[Section]:
    """Return the laws of the best learning rate and batch, with their values for the target."""
    level = laws.job.level
    fits = [law for law in (laws.rate, laws.batch) if law]
    names = [f"exponent of {SYMBOLS[c]}" for c in fits[0].columns]
    ends = [column for name in names for column in (name, f"{level:.0%} interval")]
    rows: list[list[Cell]] = [["best", "sweeps", "k", *ends, "scatter"]]
    for law in fits:
        cells = [cell for value, *each in law.exponents(level).values()
                 for cell in (number(value, 4), span(each, 4))]  # fmt: skip
        count = str(law.freedom + len(law.columns) + 1)
        rows.append([law.quantity, count, number(law.k, 4), *cells, percent(law.scatter, 1)])
    after = list[Cell]()
    if laws.cost is not None:
        after.append(
            f"At twice the best learning rate the loss is {laws.cost:.2%} higher (median)."
        )
    for name, (value, low, high) in laws.target.items():
        after.append(
            f"For the target: best {name} {value:.3g}{' tokens' * (name == BATCH)}, {level:.0%} "
            f"interval {low:.3g} to {high:.3g}"
        )
    after += [
        f"No optimum at N {one.at['parameters']:.3g}, D {one.at['tokens']:.3g}: {one.why}"
        for one in laws.refused
    ]
    title = f"{len(laws.optima)} sweeps with an optimum inside"
    sections = [Section("rates", title, rows=rows, head=True, after=after)]
    if laws.notes:
        sections.append(reasons(laws.notes))
    return sections


def profile_sections(profiles: Sequence[Profile], study: StudyFit) -> list[Section]:
    """Return each profile interval beside that of the resampled fits, and what stays open."""
    level = f"{study.job.level:.0%}"
    low, high = study.replicates.interval(study.job.level)
    rows: list[list[Cell]] = [["", "value", f"{level} low", "high", "resampled low", "high"]]
    doubts = list[str]()
    for one in profiles:
        i = study.form.symbols.index(one.symbol)
        ends = {"below": one.low, "above": one.high}
        cells = ["open" if end is None else number(end) for end in ends.values()]
        rows.append([one.symbol, number(one.value), *cells, number(low[i]), number(high[i])])
        if sides := [side for side, end in ends.items() if end is None]:
            doubts.append(
                f"{one.symbol} is open {' and '.join(sides)}: to the end of its range the fit is "
                "not clearly worse, so these runs don't determine it there."
            )
    return [
        Section("profile", study.form.source, rows=rows, head=True),
        reasons([*doubts, *study.doubts, *study.notes]),
    ]
