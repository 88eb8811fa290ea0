"""The scores of `study backtest`: of losses, and of a task's metric.

Invariant: a table of scores says on how many forecasts it rests.
"""

from collections.abc import Sequence

from forescale.pages.document import Cell, Section
from forescale.scaling.analysis.backtest import BEST, GROUPS, OTHER, RIVALS, Scores
from forescale.scaling.analysis.task_fit import LAST_VALUE, LINE
from forescale.scaling.forecasting.predictor import BANDS, band_name

_INSIDE = "shares inside the 50 % and the 90 % interval, of"
_LOSS = (
    "error: median |log of predicted over observed loss| at the minima of budgets; bias: its mean "
    f"with sign; minima, near, other: {_INSIDE} minima, of runs within 1 % of their budget's "
    "minimum, and of other runs; score: of the 90 % intervals at the minima, lower is better; vs: "
    "skill, 1 - mean |error| over that of the rival, in brackets its 90 % interval by resampled "
    "families of tables (names that begin alike). Minima are even if they lie within 0.6 % of a "
    "parabola in log C, as those of tuned studies do."
)
_METRIC = (
    "error: median size of predicted minus observed metric (of a loss: of the log of their ratio) "
    "at the run with the lowest loss of each budget; mean: its mean size; bias: its mean with "
    f"sign; best, other: {_INSIDE} these runs and of the others; vs: skill, 1 - mean error over "
    "that of the rival. two steps: the loss by the law, the metric by the link; line: straight in "
    "log C through the best runs of the last three budgets; last value: that of the last budget's "
    "best run."
)


def score_sections(scores: Sequence[Scores], metric: str | None = None) -> list[Section]:
    """Return the scores of all methods at each distance, over all tables; then those of the first
    method by kind of table, and for each table.

    metric: the kind of the task's metric; None for scores of losses.
    """
    names = list(dict.fromkeys(one.table for one in scores if one.table is not None))
    groups, rivals = (GROUPS, RIVALS) if metric is None else ((BEST, OTHER), (LINE, LAST_VALUE))
    columns = ["forecasts", "error", *["mean"] * (metric is not None), "bias", *groups,
               *["score"] * (metric is None), *(f"vs {rival}" for rival in rivals)]  # fmt: skip
    parts = list(dict.fromkeys((one.table, one.kind) for one in scores))
    pooled, *apart = parts if len(names) > 1 else parts[-1:]
    sections = []
    for band in range(len(BANDS) - 1):
        at = [one for one in scores if (one.table, one.kind, one.band) == (*pooled, band)]
        if at:
            rows = [[one.method, *_row(one, groups, rivals, metric)] for one in at]
            title = f"{band_name(band).capitalize()} the compute"
            sections.append(Section("scores", title, rows=[["method", *columns], *rows], head=True))
    for part in apart:
        at = [one for one in scores
              if (one.table, one.kind, one.method) == (*part, scores[0].method)]  # fmt: skip
        rows = [[band_name(one.band), *_row(one, groups, rivals, metric)] for one in at]
        title = f"{scores[0].method.capitalize()}, {part[0] or part[1]}"
        sections.append(Section("scores", title, rows=[["distance", *columns], *rows], head=True))
    count = f"{len(names)} table{'s' * (len(names) > 1)}"
    text = (
        f"Forecasts at every origin of {count}. An origin knows the runs of its budgets, three or "
        "more, and nothing beyond them. Distances are the compute of what is predicted over the "
        "last known budget."
    )
    lines = list[Cell]([text, _LOSS if metric is None else _METRIC])
    return [*sections, Section("meaning", "What the columns mean", after=lines)]


def _row(
    one: Scores, groups: Sequence[str], rivals: Sequence[str], metric: str | None
) -> list[Cell]:
    row: list[Cell] = [str(one.count), change(one.median, metric)]
    if metric is not None:
        row.append("-" if one.mean is None else change(one.mean, metric))
    row.append(change(one.bias, metric, "+"))
    for group in groups:
        c = one.coverage.get(group)
        row.append(f"{c.inner:.0%} {c.outer:.0%}" if c and c.count else "-")
    if metric is None:
        row.append("-" if one.interval_score is None else f"{one.interval_score:.2%}")
    for rival in rivals:
        text = f"{one.skill[rival]:+.2f}" if rival in one.skill else "-"
        if rival == LINE and (ends := one.skill_interval.get(rival)):
            text += f" ({ends[0]:+.2f} to {ends[1]:+.2f})"
        row.append(text)
    return row


def change(error: float, metric: str | None, sign: str = "") -> str:
    """Return an error as text: that of a loss as a percentage, that of a share in points."""
    if metric in (None, "loss"):
        return f"{error:{sign}.2%}"
    return f"{100 * error:{sign}.2f} points"
