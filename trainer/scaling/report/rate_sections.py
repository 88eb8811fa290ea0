"""The laws of the best learning rate and batch, as sections, and as rows of a study's answer."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from markupsafe import Markup

from forescale.ground.errors import UserError
from forescale.pages.document import Cell, Section, number, percent, span
from forescale.scaling.analysis.prediction import Prediction
from forescale.scaling.analysis.table_fit import StudyFit
from forescale.scaling.design.pilot import PILOT
from forescale.scaling.design.rate_laws import BATCH, SYMBOLS, RateLaws, critical_batches, rate_laws

_STEP = 1.01  # of D, for the slope of the law


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
    after += [Markup("For the target: best {} {}").format(*each) for each in _best(laws)]
    after += [
        f"No optimum at N {one.at['parameters']:.3g}, D {one.at['tokens']:.3g}: {one.why}"
        for one in laws.refused
    ]
    title = f"{len(laws.optima)} sweeps with an optimum inside"
    sections = [Section("rates", title, rows=rows, head=True, after=after)]
    if laws.notes:
        sections.append(Section("doubts", "Reasons for doubt", after=[*laws.notes]))
    return sections


def rate_rows(study: StudyFit, f: Prediction) -> Iterator[list[Cell]]:
    """Yield a row on each of learning rate, batch and critical batch at the target, or why it is
    not determined; none for runs without learning rates, or a law of C alone."""
    table, job = study.records, study.job
    if not _is_known(table, "learning_rate") or not np.isfinite(f.parameters):
        return
    # A pilot's batches are not those of the other stages.
    staged = table[table["stage"] != PILOT] if "stage" in table else table
    try:
        laws = rate_laws(staged, job, "", {name: getattr(f, name) for name in SYMBOLS})
        yield from ([name.capitalize(), value] for name, value in _best(laws))
        if laws.cost is not None:
            yield ["Twice that rate", Markup("{} of the loss").format(percent(laws.cost, sign="+"))]
    except UserError as e:
        yield ["Learning rate", f"not determined: {e.problem}"]
    if not _is_known(table, "batch_tokens"):
        return

    def slope(n: float, d: float) -> float:
        tokens, held = d * np.array([1, _STEP]), f.settings | {"unique_tokens": 2 * d}
        loss = study.fit.predict(parameters=n, tokens=tokens, **held)
        return float(np.log(loss[0] / loss[1]) / np.log(_STEP))

    text: Cell = "not determined: no three batches had three learning rates each"
    try:
        if critical := critical_batches(table, job, "", slope):
            text = Markup("; ").join(map(_critical, *zip(*critical, strict=True)))
    except UserError as e:
        text = f"not determined: {e.problem}"
    yield ["Critical batch", text]


def _is_known(table: pd.DataFrame, column: str) -> bool:
    return column in table and bool((pd.to_numeric(table[column], errors="coerce") > 0).all())


def _critical(tokens: float, batch: float) -> Markup:
    size = Markup("{} tokens").format(number(batch, 3))
    if not 0 < batch < np.inf:
        size = Markup("above those tried" if batch else "below those tried")
    return Markup("{} at D {}").format(size, number(tokens, 3))


def _best(laws: RateLaws) -> list[tuple[str, Markup]]:
    """Return the best values for the target: what they are of, and the value with its interval."""
    text, units = Markup("{}{} ({:.0%}: {})"), {BATCH: " tokens"}
    return [
        (name, text.format(number(x, 3), units.get(name, ""), laws.job.level, span(ends, 3)))
        for name, (x, *ends) in laws.target.items()
    ]
