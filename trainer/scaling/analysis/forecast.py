"""Forecast cards: what was foretold of a run before anybody knew, and how it came out.

    studies/<name>/forecasts/
      0001.json            a card: target, loss, intervals, the same as bands of the end and of each
                           branch, rivals' forecasts, fit, hashes, time; run/forecast.py reads it
      0001.outcome.json    what the run reached; written by `score`, beside the card, never in it

Invariant: a card is written once, before its target has a record, and holds the hash of the card
before it: who changes, removes or slips in a card breaks the chain, and `score` says where. A card
whose target never ran counts as abandoned; none is left out of a score.
"""

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from forescale.errors import UserError
from forescale.run.forecast import GENESIS, SAME, Card, cards, hash_of
from forescale.scaling.analysis.answer import Foretold, StudyFit
from forescale.scaling.config import TargetPoint
from forescale.scaling.fitting import laws
from forescale.scaling.fitting.backtest import spent
from forescale.scaling.fitting.fit import fit
from forescale.scaling.fitting.points import Points
from forescale.storage import write_json

__all__ = ["GENESIS", "Card", "cards", "hash_of"]


def predict(made: StudyFit, folder: Path, run: str, target: TargetPoint | None = None) -> Card:
    """Write the card of `run`, which is the target of the fit unless another is given, with a band
    for its end and for each branch of the target. Raises UserError where it or a branch has a
    record already, where it has a card, where no target is given, and for branches that are none.
    """
    foretold = made.foretold(target)
    if foretold is None:
        todo = "write target.parameters= and target.tokens=, or target.flops="
        raise UserError("target", "is not given", todo)
    _refuse_known(made.known, run, foretold.parameters, foretold.tokens, made.job.size)
    branches = _branches(made, foretold, target or made.job.target, run)
    before = cards(folder)
    if any(card.facts["target"]["run"] == run for card in before):
        what = f"has a card already, in {folder}"
        raise UserError(run, what, "a forecast is made once; give another run")
    aim = {"run": run, "parameters": foretold.parameters, "tokens": foretold.tokens}
    facts: dict[str, Any] = {
        "target": {**aim, "beyond": foretold.beyond},
        "loss": foretold.loss,
        "interval_50": list(foretold.inner),
        "interval": list(foretold.outer),
        "level": made.job.level,
        "bands": [_band(point) for point in (foretold, *branches) if math.isfinite(point.tokens)],
        "rivals": rivals(made.points, foretold.parameters, foretold.tokens, foretold.beyond)
        | {"without discrepancy": {"loss": foretold.loss, "interval": list(foretold.bare)}},
        "roll_outs": foretold.origins,
        "discrepancy_a_decade": made.discrepancy.a_decade,
        "form": made.form.name,
        "values": made.fit.values,
        "certified": made.fit.certificate.holds,
        "convention": made.points.convention,
        "data": data_hash(made.points),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "before": before[-1].facts["hash"] if before else GENESIS,
    }
    facts["hash"] = hash_of(facts)
    folder.mkdir(parents=True, exist_ok=True)
    card = Card(folder / f"{len(before) + 1:04d}.json", facts)
    write_json(card.path, facts)
    return card


def _branches(made: StudyFit, end: Foretold, target: TargetPoint, run: str) -> list[Foretold]:
    """Each a run of the target's N that decays earlier."""
    found = []
    for tokens in target.branches:
        if not 0 < tokens < end.tokens * (1 - SAME):  # a law of FLOPs alone knows no D: NaN
            what = f"{tokens:g} tokens are no branch of a run of {end.tokens:g}"
            raise UserError("target.branches", what, "give the tokens where shorter decays end")
        point = made.foretold(TargetPoint(parameters=end.parameters, tokens=tokens))
        assert point is not None  # both N and D are given
        _refuse_known(made.known, run, end.parameters, tokens, made.job.size)
        found.append(point)
    return found


def _band(point: Foretold) -> dict[str, Any]:
    ends = {"interval_50": list(point.inner), "interval": list(point.outer)}
    return {"tokens": point.tokens, "loss": point.loss, **ends}


def _refuse_known(table: pd.DataFrame, run: str, n: float, d: float, size: str) -> None:
    what = "has a record already: what is known can't be foretold"
    if "name" in table and (table["name"] == run).any():
        raise UserError(run, what, "foretell a run before it is trained")
    sizes = table.get("parameters", table.get(f"parameters_{size}"))
    if sizes is None or "tokens" not in table:
        return
    near = (np.abs(np.log(sizes / n)) < SAME) & (np.abs(np.log(table["tokens"] / d)) < SAME)
    if near.any():
        what = f"a run of {n:.4g} parameters on {d:.4g} tokens {what}"
        raise UserError("target", what, "choose a run that nobody has made")


def data_hash(points: Points) -> str:
    """Of all that the fit read."""
    found = hashlib.sha256(str(points.convention).encode())
    for name in ("loss", "parameters", "tokens", "flops", "unique_tokens"):
        if (column := getattr(points, name)) is not None:
            found.update(name.encode() + np.ascontiguousarray(column).tobytes())
    return found.hexdigest()


def rivals(points: Points, n: float, d: float, beyond: float) -> dict[str, dict[str, float]]:
    """What simpler ways foretell: a line in log C and log loss through the best runs of the last
    two budgets, and a law L(C) of three parameters through the best runs of all. What a way can't
    be made of is absent."""
    cost = spent(points)
    wanted = float(cost.max()) * beyond
    order = np.argsort(cost)
    groups = np.split(order, np.flatnonzero(np.diff(np.log(cost[order])) > np.log1p(0.05)) + 1)
    best = np.array([g[np.argmin(points.loss[g])] for g in groups])
    c, loss = np.log(cost[best]), np.log(points.loss[best])
    found: dict[str, dict[str, float]] = {}
    if len(best) >= 2:
        slope = (loss[-1] - loss[-2]) / (c[-1] - c[-2])
        found["line"] = {"loss": float(np.exp(loss[-1] + slope * (math.log(wanted) - c[-1])))}
    if len(best) >= laws.FRONTIER.size:
        try:
            law = fit(laws.FRONTIER, Points(points.loss[best], flops=cost[best]))
            found["L(C)"] = {"loss": float(law.predict(flops=wanted)[0])}
        except UserError:
            pass  # these runs can't tell it
    return found


@dataclass(frozen=True)
class Score:
    """Of all cards of a study. errors: log of foretold over observed, by card; inside, inside_50:
    how many of those that came out; interval_score: mean, in loss, at the cards' level, lower is
    better (Gneiting and Raftery 2007, eq. 43); skill: by rival, 1 - our mean absolute error over
    theirs, on the cards that both foretold; abandoned: cards whose target has no record."""

    errors: dict[str, float]
    inside: int
    inside_50: int
    interval_score: float
    skill: dict[str, float]
    abandoned: list[str]


def score(found: Sequence[Card], table: pd.DataFrame) -> Score:
    """Fill in the outcomes that `table` knows, and judge all that came out."""
    losses = dict(zip(table["name"], table["loss"], strict=True)) if "name" in table else {}
    for card in found:
        run = card.facts["target"]["run"]
        if run in losses:
            card.came_out(run, float(losses[run]))
    out = [(card, o["loss"]) for card in found if (o := card.outcome)]
    marks, rival = [], dict[str, list[tuple[float, float]]]()
    errors: dict[str, float] = {}
    for card, loss in out:
        f = card.facts
        errors[card.id] = math.log(f["loss"] / loss)
        low, high = f["interval"]
        miss = max(low - loss, loss - high, 0.0)
        marks.append(high - low + 2 / (1 - f["level"]) * miss)
        for name, theirs in f["rivals"].items():
            both = (abs(errors[card.id]), abs(math.log(theirs["loss"] / loss)))
            rival.setdefault(name, []).append(both)
    return Score(
        errors,
        sum(c.facts["interval"][0] <= x <= c.facts["interval"][1] for c, x in out),
        sum(c.facts["interval_50"][0] <= x <= c.facts["interval_50"][1] for c, x in out),
        float(np.mean(marks)) if marks else math.nan,
        {name: _skill(pairs) for name, pairs in rival.items()},
        [card.id for card in found if card.outcome is None],
    )


def _skill(pairs: Sequence[tuple[float, float]]) -> float:
    ours, theirs = np.array(pairs).mean(0)
    return float(1 - ours / theirs) if theirs else 0.0
