"""From records to the tuned loss of each recipe at each budget.

    a cell      a recipe at a budget, all learning rates and seeds
    its runs    in a study those with other seeds, not the sweep that chose their rate; else all
    its rate    the learning rate with the most of its runs; of several such rates, the one with
                the lowest mean loss
    its loss    the mean log loss of the runs at this rate
    bracketed   worse learning rates were tried on both sides of the best one

Invariant: runs that confirm a winner (role confirm) are never among those that made it one.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from forescale.ground.errors import UserError
from forescale.scaling.config import StudyJob
from forescale.scaling.fitting.points import Array
from forescale.scaling.records.records import HELD

RECIPE = "recipe"
_NEAR = 1.15  # costs of one budget are at most this factor apart, by rounding to whole steps
_RATES = 3  # learning rates that bracket one
_FREE = ("parametrization",)  # of HELD, what a recipe may change: the losses stay comparable


@dataclass(frozen=True)
class RecipeCell:
    """A recipe at one budget.

    flops: mean C of its runs; logs: (n,), log losses of the runs at its learning rate; fresh: log
    losses of the runs that confirm it; rates: all tried learning rates, by value; is_bracketed:
    None if fewer than three were tried; diverged: number of runs without a finite loss.
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
    runs = table.assign(loss=losses, _cost=table[cost], _rate=rates, _role=roles, _budget=budgets)
    cells, lost = list[RecipeCell](), list[LostCell]()
    for (recipe, budget), rows in runs.groupby([RECIPE, "_budget"], sort=True):
        one = _cell(str(recipe), float(budget), rows)
        if isinstance(one, RecipeCell):
            cells.append(one)
        elif one is not None:
            lost.append(one)
    return cells, lost


def _cell(recipe: str, budget: float, rows: pd.DataFrame) -> RecipeCell | LostCell | None:
    """Return the cell of these runs; None if all of them confirm it."""
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
    logs = np.log(runs["loss"])
    by_rate = logs.groupby(runs["_rate"]).agg(["size", "mean"])
    rate = by_rate.sort_values(["size", "mean"], ascending=[False, True]).index[0]
    # Bracketed by worse rates on both sides of the best one; a diverged run is worse too.
    swept = rows[is_swept]
    losses, is_bracketed = swept["loss"].fillna(np.inf).groupby(swept["_rate"]).mean(), None
    if len(losses) >= _RATES:
        is_bracketed = 0 < int(np.argmin(losses.to_numpy())) < len(losses) - 1
    fresh = np.log(rows["loss"][is_fresh & is_finite].to_numpy())
    return RecipeCell(
        recipe, budget, float(runs["_cost"].mean()), float(rate),
        logs[runs["_rate"] == rate].to_numpy(), fresh,
        tuple(sorted(rows["_rate"].unique())), is_bracketed, int((~is_finite).sum()),
    )  # fmt: skip
