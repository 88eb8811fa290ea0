"""`forescale study rates`: laws of the best learning rate and batch."""

from forescale.config.job import Action
from forescale.ground.console import open_console
from forescale.ground.errors import DONE
from forescale.pages.document import Cell, Section, number, percent, show, span
from forescale.scaling.actions.shared import RUNS, TARGET, print_json, read_one_recipe
from forescale.scaling.config import StudyJob
from forescale.scaling.design.rate_laws import BATCH, SYMBOLS, RateLaws, as_dict, rate_laws
from forescale.scaling.report.fit_sections import reasons

ACTION = Action(
    "Fit how the best learning rate and batch depend on N and D, from a table of sweeps.",
    (*RUNS, "size", "cost", "level", *TARGET, "against", "json"),
    (
        "study rates sweeps.csv target.parameters=7e9 target.tokens=1e12",
        "study rates 'runs/*' against=[flops] target.flops=1e21",
    ),
)


def main(job: StudyJob) -> int:
    """Print both laws, and their values for the target."""
    table, where = read_one_recipe(job, "rates")
    laws = rate_laws(table, job, where)
    if job.json:
        return print_json(as_dict(laws))
    show(open_console(), rate_sections(laws), where)
    return DONE


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
