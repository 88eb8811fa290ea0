"""The mixing law of a table of runs, its best shares with intervals, and their check.

    mixtures   runs with the same shares, pooled to their mean log losses; all count alike
    goal       the mean of held-out losses that the best shares minimise (`goal=`)
    law        the one that predicts left-out mixtures best, among those that can be fitted
    intervals  of fits to drawn losses: of the best shares, and of losses at given shares
    check      in a study: goals of larger runs at the best and the current shares, by pairs of
               runs with the same seeds

Invariant: runs of the check are never among those that the law is fitted to.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import ndtr, stdtrit

from forescale.ground.errors import UserError
from forescale.scaling.analysis.ratio import Ratio, Spread
from forescale.scaling.config import StudyJob
from forescale.scaling.fitting.mixing import (
    BEST,
    CURRENT,
    FIRST,
    Mixing,
    MixingLaw,
    best_shares,
    drawn_losses,
    laws_for,
    left_out,
    nearest,
    rounded_shares,
)
from forescale.scaling.fitting.points import Array

_SHARE, _LOSS = "share_", "loss_"
_EDGE = 2e-3  # of a share, within which it counts as at the end of the runs' range
_EPOCHS = 1.0
_ALIKE = 1.02  # factor by which N and D of runs of one size may differ


def has_mixtures(table: pd.DataFrame, job: StudyJob) -> bool:
    """True for records of a study of mixtures, and for others with more mixtures than sources."""
    columns = [name for name in table if str(name).startswith(_SHARE)]
    if len(columns) < 2 or (job.plan.kind == "mixtures" and not job.input):
        return bool(columns)
    return len(table[columns].dropna().round(6).drop_duplicates()) > len(columns)


@dataclass(frozen=True)
class Trial:
    """A way to predict left-out mixtures. error: root mean square of relative errors of the goal;
    law: None for a trivial one."""

    name: str
    text: str
    error: float
    law: MixingLaw | None = None


@dataclass(frozen=True)
class Check:
    """Larger runs at the best shares and at the current ones. ratio: of their goals, best over
    current; predicted: that of the law at the small size; pairs: of runs with one seed."""

    shares: dict[str, float]
    goals: tuple[float, float]
    flops: float
    ratio: Ratio
    predicted: Ratio
    pairs: int


class MixtureFit:
    """The law and its answers. Raises UserError if columns are missing, if the runs are not of one
    size, or if their mixtures determine no law."""

    def __init__(self, table: pd.DataFrame, job: StudyJob, where: str):
        self.job, self.where = job, where
        self.sources = [str(c)[len(_SHARE) :] for c in table if str(c).startswith(_SHARE)]
        self.goal = _goal(job.goal or dict.fromkeys(self.sources, 1.0), table, where)
        self._columns = [_SHARE + name for name in self.sources]
        self.checks = table[table["role"] == "confirm"] if "role" in table else table[:0]
        losses = [_LOSS + name for name in self.goal]
        runs = _small_runs(table, where).dropna(subset=[*self._columns, *losses])
        self.runs = runs.assign(goal=self._goals(runs))
        groups = runs[self._columns].round(5).groupby(self._columns, sort=False).ngroup()
        first = ~groups.duplicated()
        raw = runs.loc[first, self._columns].to_numpy(dtype=float)
        self.shares: Array = raw / raw.sum(axis=1, keepdims=True)
        logs = np.log(runs[losses]).groupby(groups).mean()
        self.losses: Array = np.exp(logs.to_numpy(dtype=float))
        by_group = np.log(self.runs["goal"]).groupby(groups)
        self.noise = Spread.within(y.to_numpy() for _, y in by_group)
        self._weights = np.array([*self.goal.values()])
        laws = laws_for(self.shares)
        if not laws:
            problem = f"has {len(self.shares)} mixtures of {len(self.sources)} sources, which "
            todo = f"train {len(self.sources) + 2} or more, of one size"
            raise UserError(where, f"{problem}determine no mixing law", todo)
        self.trials = self._trials(laws)
        self.law = next(t.law for t in self.trials if t.law is not None)

    def _goals(self, runs: pd.DataFrame) -> Array:
        columns = runs[[_LOSS + name for name in self.goal]].to_numpy(dtype=float)
        return np.asarray(columns @ np.array([*self.goal.values()]))

    def _trials(self, laws: list[MixingLaw]) -> list[Trial]:
        """Return all ways to predict a left-out mixture, the best first."""
        goals, n = np.log(self.losses @ self._weights), len(self.shares)

        def error(predicted: Array) -> float:
            return float(np.sqrt(np.square(predicted - goals).mean()))

        trials = [
            Trial("mean", "mean of the other mixtures", error((goals.sum() - goals) / (n - 1))),
            Trial("nearest", "loss of the nearest mixture", error(goals[nearest(self.shares)])),
        ]
        for law in laws:
            predicted = left_out(law, self.shares, self.losses) @ self._weights
            trials.append(Trial(law.name, law.text, error(np.log(predicted)), law))
        return sorted(trials, key=lambda t: t.error)

    @cached_property
    def fit(self) -> Mixing:
        """Return the fit to all mixtures."""
        return self.law.fit(self.shares, self.losses)

    @cached_property
    def replicates(self) -> Mixing:
        """Return the fits to drawn losses."""
        of = (self.law, self.shares, self.losses)
        drawn = drawn_losses(*of, self.job.bootstraps, self.job.seed)
        return self.law.fit(self.shares, drawn)

    def _lowest(self, fits: Mixing) -> Array:
        """Return the best shares by each fit, (B, S)."""
        return best_shares(
            lambda shares: fits.losses(shares) @ self._weights, self.shares, len(fits.slopes)
        )

    @cached_property
    def best(self) -> dict[str, float]:
        """Return the best shares, to be used as data.weights."""
        shares = self._lowest(self.fit)[0]
        return rounded_shares(dict(zip(self.sources, map(float, shares), strict=True)))

    @cached_property
    def ends(self) -> dict[str, tuple[float, float]]:
        """Return the interval of the best share of each source."""
        low, high = np.quantile(self._lowest(self.replicates), self._tails, axis=0)
        return {n: (float(a), float(b)) for n, a, b in zip(self.sources, low, high, strict=True)}

    @cached_property
    def _tails(self) -> Array:
        """The quantiles of an interval: of a normal distribution at the ends of Student's t, since
        percentiles are too narrow for few runs."""
        free = len(self.shares) - self.law.size(len(self.sources))
        return ndtr(stdtrit(free, np.array([1 - self.job.level, 1 + self.job.level]) / 2))

    @cached_property
    def places(self) -> dict[str, dict[str, float]]:
        """Return the shares that are shown: the best, the current (of a study), the uniform."""
        known = {}
        if "cell_of" in self.runs and self.runs["cell_of"].iloc[0] == FIRST:
            known = {CURRENT: dict(zip(self.sources, map(float, self.shares[0]), strict=True))}
        uniform = dict.fromkeys(self.sources, 1 / len(self.sources))
        return {BEST: self.best, **known, "uniform": uniform}

    def _goals_at(self, shares: Array, weights: Array | None = None) -> tuple[Array, Array]:
        """Return the goal of the fit at these shares, (K,), and of drawn studies, (B, K). weights:
        of the losses, None for the goal's."""
        weights = self._weights if weights is None else weights
        value, draws = (f.losses(shares) @ weights for f in (self.fit, self.replicates))
        return value[0], draws

    def predicted(self, shares: Mapping[str, float], of: str = "") -> Ratio:
        """Return the predicted goal, or the loss of one source, with its interval."""
        pick = np.array([float(name == of) for name in self.goal]) if of else None
        (value,), draws = self._goals_at(np.array([[*shares.values()]]), pick)
        return Ratio(float(value), *map(float, np.quantile(draws, self._tails)))

    def against(self, shares: Mapping[str, float], other: Mapping[str, float]) -> Ratio:
        """Return the predicted goal at these shares over that at others, with its interval."""
        value, draws = self._goals_at(np.array([[*shares.values()], [*other.values()]]))
        ends = np.quantile(draws[:, 0] / draws[:, 1], self._tails)
        return Ratio(float(value[0] / value[1]), *map(float, ends))

    def curve(self, source: str, shares: Array) -> tuple[Array, Array]:
        """Return the predicted goal, (n,), and its ends, (2, n), along shares of one source, the
        others in the proportions of the best mixture."""
        i = self.sources.index(source)
        others = np.delete([*self.best.values()], i)
        others = others / others.sum() if others.sum() else np.full(len(others), 1 / len(others))
        value, draws = self._goals_at(np.stack([np.insert((1 - x) * others, i, x) for x in shares]))
        return value, np.quantile(draws, self._tails, axis=0)

    @cached_property
    def check(self) -> Check | None:
        """Return the check, None before both mixtures have a larger run of one seed."""
        if self.checks.empty:
            return None
        table = self.checks.assign(goal=self._goals(self.checks))
        table["of"] = table["name"].str.removeprefix("check-").str.split("-seed").str[0]
        goals = table.pivot_table(index="seed", columns="of", values="goal").reindex(
            columns=[BEST, CURRENT]
        ).dropna()  # fmt: skip
        if goals.empty:
            return None
        logs, n = np.log(goals[BEST] / goals[CURRENT]).to_numpy(), len(goals)
        half = np.inf
        if n > 1:
            half = stdtrit(n - 1, (1 + self.job.level) / 2) * logs.std(ddof=1) / np.sqrt(n)
        with np.errstate(over="ignore"):
            ratio = Ratio(*map(float, np.exp(logs.mean() + np.array([0, -half, half]))))
        rows = {of: table[table["of"] == of].iloc[0] for of in (BEST, CURRENT)}
        shares = {of: {n: float(r[_SHARE + n]) for n in self.sources} for of, r in rows.items()}
        means = float(goals[BEST].mean()), float(goals[CURRENT].mean())
        flops = float(rows[BEST][f"flops_{self.job.cost}"])
        predicted = self.against(shares[BEST], shares[CURRENT])
        return Check(shares[BEST], means, flops, ratio, predicted, n)

    @property
    def doubts(self) -> Iterator[str]:
        """Yield what makes the answer doubtful, as sentences."""
        trivial = next(t for t in self.trials if t.law is None)
        chosen = next(t for t in self.trials if t.law is not None)
        if trivial.error <= chosen.error:
            yield (
                f"No law predicts left-out mixtures better than the {trivial.text} does: the best "
                "shares are hardly more than a guess. Train more mixtures, or longer ones."
            )
        if CURRENT in self.places:
            gain = self.against(self.best, self.places[CURRENT])
            if gain.high >= 1:
                yield "It is not shown that the best shares are better than the current ones."
            if self.noise.free and self.noise.sd > 1 - gain.value:
                yield (
                    f"A new seed moves the goal by {self.noise.sd:.2%}, more than the best shares "
                    "do. All mixtures have one seed, so that only the check has others."
                )
        for (name, share), column in zip(self.best.items(), self.shares.T, strict=True):
            for edge, end in (("lowest", column.min()), ("highest", column.max())):
                if abs(share - end) < _EDGE:
                    yield (
                        f"The best share of {name} is the {edge} one that a run has, {share:.1%}: "
                        "the optimum may be beyond, and is not searched there."
                    )
        if not self.noise.free:
            yield "No mixture was repeated with another seed: the noise of the losses is unknown."
        if "epochs" in self.runs and (most := self.runs["epochs"].max()) > _EPOCHS:
            yield (
                f"A source was read up to {most:.2g} times in these runs. A longer run repeats a "
                "small source more often, which the law doesn't know; data.max_epochs limits it."
            )
        yield (
            "The law is of runs of one size and length: larger ones may have other best shares, "
            "and the intervals know neither that nor the choice of the law."
        )


def _small_runs(table: pd.DataFrame, where: str) -> pd.DataFrame:
    """Return the runs that the law is fitted to: in a study the best learning rate of each mixture
    and the repeats; of a table all. Raises UserError if they are not of one size."""
    if "role" in table:
        table = table[table["fitted"] | (table["role"] == "seed")]
    for name in ("parameters", "parameters_total", "tokens"):
        # A window at the end of a shard is shorter, so that runs of one length differ a little.
        if name in table and table[name].max() > _ALIKE * table[name].min():
            low, high = table[name].min(), table[name].max()
            problem = f"has runs with {low:,.0f} to {high:,.0f} {name}"
            todo = "a mixing law is of one size and length; of a table, keep one with rows={...}"
            raise UserError(where, problem, todo)
    return table


def _goal(goal: Mapping[str, float], table: pd.DataFrame, where: str) -> dict[str, float]:
    """Return the weights of the goal's losses, which sum to 1."""
    for name, weight in goal.items():
        if _LOSS + name not in table:
            known = ", ".join(str(c)[len(_LOSS) :] for c in table if str(c).startswith(_LOSS))
            todo = f"choose goal={{NAME: 1}} among: {known}"
            raise UserError(where, f"has no column {_LOSS}{name}", todo)
        if not 0 < weight < np.inf:
            raise UserError(f"goal.{name}", f"{weight:g} is no weight", "give a positive number")
    return {name: weight / sum(goal.values()) for name, weight in goal.items()}


def as_dict(fit: MixtureFit) -> dict[str, Any]:
    """Return the answer as plain values, for JSON."""
    check = fit.check and {**asdict(fit.check), "ratio": fit.check.ratio.as_dict(),
                           "predicted": fit.check.predicted.as_dict()}  # fmt: skip
    return {
        "weights": fit.best,
        "level": fit.job.level,
        "interval": {name: list(ends) for name, ends in fit.ends.items()},
        "goal": fit.goal,
        "law": fit.law.name,
        "left_out_error": {t.name: t.error for t in fit.trials},
        "mixtures": len(fit.shares),
        "noise": {"sd": fit.noise.sd if fit.noise.free else None, "free": fit.noise.free},
        "predicted": {
            name: {"weights": shares, "goal": fit.predicted(shares).as_dict(),
                   **{_LOSS + of: fit.predicted(shares, of).as_dict() for of in fit.goal}}
            for name, shares in fit.places.items()
        },
        "check": check,
        "doubts": [*fit.doubts],
    }  # fmt: skip
