"""From records to the tuned loss of each recipe at each budget.

    a cell      a recipe at a budget, all learning rates and seeds
    its runs    in a study those with other seeds, not the sweep that chose their rate; else all
    its runs'   the size and learning rate with the most of its runs; of several such, those with
    setting     the lowest mean loss
    its loss    the mean log loss of the runs at this setting
    its costs   means of these runs: seconds of training, parameters in memory, bytes of text read
    bracketed   worse learning rates were tried on both sides of the best one; edges: what was best
                at the end of what was tried, such as size

Invariant: runs that confirm a recipe (role confirm) are never among those that give its loss.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from forescale.ground.errors import UserError
from forescale.scaling.config import StudyJob
from forescale.scaling.fitting.points import Array
from forescale.scaling.records.records import HELD

RECIPE = "recipe"
_NEAR = 1.15  # costs of one budget are at most this factor apart, by rounding to whole steps
_RATES = 3  # learning rates that bracket one
# What a run costs beside FLOPs, and the columns that say so, the first that a table has.
COSTS = {"seconds": ("train_seconds",), "parameters": ("parameters_total", "parameters"),
         "bytes": ("bytes",)}  # fmt: skip
_EQUAL = ("device", "threads", "world_size", "torch_version")  # in runs whose seconds compare
_FREE = ("parametrization",)  # of HELD, what a recipe may change: the losses stay comparable


@dataclass(frozen=True)
class RecipeCell:
    """A recipe at one budget.

    flops: mean C of its runs; logs: (n,), log losses of the runs at its learning rate; fresh: log
    losses of the runs that confirm it, infinite if they diverged; rates: all tried learning rates,
    by value; is_bracketed: None if fewer than three were tried; diverged: number of runs without a
    finite loss; unstable: of those with other seeds, of which some have one.
    costs: by COSTS, as far as all its runs have them; size, ratio: N and D/N; sizes: number of
    sizes that were tried, 0 if they aren't known; clocks: the different conditions under which its
    seconds ran.
    """

    recipe: str
    budget: float
    flops: float
    learning_rate: float
    logs: Array
    fresh: Array
    rates: tuple[float, ...]
    is_bracketed: bool | None
    diverged: int
    unstable: int
    edges: tuple[str, ...] = ()
    costs: Mapping[str, float] = field(default_factory=dict)
    size: float = 0.0
    ratio: float | None = None
    sizes: int = 0
    clocks: frozenset[str] = frozenset()

    @property
    def log_loss(self) -> float:
        """The mean log loss of its runs."""
        return float(self.logs.mean())


@dataclass(frozen=True)
class LostCell:
    """A recipe at one budget where it has no loss, since all `runs` that would count diverged. are:
    their name in messages."""

    recipe: str
    budget: float
    runs: int
    are: str = "runs"

    def __str__(self) -> str:
        return (
            f"{self.recipe} has no loss at {self.budget:.3g} FLOPs: all {self.runs} {self.are} "
            "diverged."
        )


def has_recipes(table: pd.DataFrame) -> bool:
    """True if the records name two recipes or more."""
    return RECIPE in table and table[RECIPE].nunique() > 1


def cells_of(
    table: pd.DataFrame, job: StudyJob, where: str
) -> tuple[list[RecipeCell], list[LostCell]]:
    """Return the cells, by recipe and budget, and those without a loss. Raises UserError if a
    column is missing, or if the losses can't be compared."""
    table = table.reset_index(drop=True)
    cost = "flops" if "flops" in table else f"flops_{job.cost}"
    for column in (RECIPE, cost, "loss"):
        if column not in table or table[column].isna().any():
            todo = "give each run its recipe, flops, loss, and learning_rate where it was tuned"
            raise UserError(where, f"has no {column} of each run", todo)
    for name in set(HELD) - set(_FREE):
        if name in table and len(kinds := sorted(map(str, table[name].dropna().unique()))) > 1:
            problem = f"losses are not comparable: {name} is {' and '.join(kinds[:2])}"
            raise UserError(where, problem, "compare recipes that share it")
    budgets = table.get("budget")
    if budgets is None:  # costs without a gap between them are of one budget
        ordered = table[cost].astype(float).sort_values()
        numbers = (ordered / ordered.shift() > _NEAR).cumsum()
        budgets = ordered.groupby(numbers).transform("mean").reindex(table.index)
    # A table may say nothing of rates and roles.
    rates = table.get("learning_rate", pd.Series(1.0, table.index)).fillna(1.0).astype(float)
    roles = table.get("role", pd.Series("", table.index))
    losses = table["loss"].astype(float)
    n = table.get(f"parameters_{job.size}", table.get("parameters"))
    sizes = pd.Series(0.0, table.index) if n is None else n.fillna(0.0).astype(float)
    runs = table.assign(loss=losses, _cost=table[cost], _rate=rates, _role=roles, _budget=budgets,
                        _size=sizes)  # fmt: skip
    cells, lost = list[RecipeCell](), list[LostCell]()
    for (recipe, budget), rows in runs.groupby([RECIPE, "_budget"], sort=True):
        one = _cell(str(recipe), float(budget), rows)
        if isinstance(one, RecipeCell):
            cells.append(one)
        elif one is not None:
            lost.append(one)
    return cells, lost


def _cell(recipe: str, budget: float, rows: pd.DataFrame) -> RecipeCell | LostCell | None:
    """Return the cell of these runs; None if all of them confirm it, or if
    its search has not ended."""
    is_fresh, is_seed = rows["_role"] == "confirm", rows["_role"] == "seed"
    is_finite = np.isfinite(rows["loss"])
    is_swept = rows["_role"].isin(("grid", "rate")) if is_seed.any() else ~is_fresh
    is_counted = is_seed if is_seed.any() else ~is_fresh
    runs = rows[is_counted & is_finite]
    if runs.empty:
        is_swept_well = (is_swept & is_finite).any()  # so that other seeds alone diverged
        gone = is_counted if is_swept_well else ~is_fresh
        are = "runs with other seeds" if is_swept_well else "runs"
        return LostCell(recipe, budget, int(gone.sum()), are) if gone.any() else None
    if "edges" in rows and not is_seed.any():
        return None  # its search goes on
    logs = np.log(runs["loss"])
    by_setting = logs.groupby([runs["_size"], runs["_rate"]]).agg(["size", "mean"])
    size, rate = by_setting.sort_values(["size", "mean"], ascending=[False, True]).index[0]
    # Bracketed by worse rates on both sides of the best one; a diverged run is worse too.
    swept = rows[is_swept]
    sizes = swept["_size"][swept["_size"] > 0].nunique()
    edges: tuple[str, ...] = ()
    is_bracketed = _is_bracketed(swept[swept["_size"].isin((0.0, size))], "_rate")
    if "edges" in rows and is_seed.any():  # of a search, which varied more than these
        edges = next(iter(runs["edges"]))
        is_bracketed = "rate" not in edges
    elif _is_bracketed(swept, "_size") is False:
        edges = ("size",)
    fresh = np.log(rows["loss"][is_fresh].fillna(np.inf).to_numpy())
    best = runs[(runs["_rate"] == rate) & (runs["_size"] == size)]
    names = {of: next((c for c in columns if c in rows), None) for of, columns in COSTS.items()}
    known = {of: float(best[c].mean(skipna=False)) for of, c in names.items() if c}
    ratio = float(best["tokens"].mean()) / size if size and "tokens" in best else None
    conditions = best[[c for c in _EQUAL if c in best]].itertuples(index=False)
    clocks = frozenset(", ".join(map(str, row)) for row in conditions)
    return RecipeCell(
        recipe, budget, float(best["_cost"].mean()), float(rate),
        logs[best.index].to_numpy(), fresh,
        tuple(sorted(rows["_rate"][is_swept | is_counted].unique())), is_bracketed,
        int((~is_finite).sum()), int((~is_finite & is_seed).sum()), edges,
        {of: x for of, x in known.items() if 0 < x < np.inf}, size, ratio, sizes, clocks,
    )  # fmt: skip


def _is_bracketed(swept: pd.DataFrame, column: str) -> bool | None:
    """True if worse values of a column were tried on both sides of the best one; None if fewer than
    three were tried."""
    losses = (
        swept["loss"]
        .fillna(np.inf)
        .groupby(swept[column])
        .agg("mean" if column == "_rate" else "min")
    )
    if len(losses) < _RATES:
        return None
    return 0 < int(np.argmin(losses.to_numpy())) < len(losses) - 1
