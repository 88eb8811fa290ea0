"""The answer of a trial, and of a campaign: what the log and the base's runs say so far.

Invariant: derived, never stored. The answer is that of the fresh seeds as soon as they have one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from forescale.run.rows import Row
from forescale.trials.campaign import Campaign
from forescale.trials.effect import Factor, compute_factor, product, ratio, slope_of
from forescale.trials.trial import HALF_RUNS, STAGES, Stage, Trial
from forescale.trials.verdict import Verdict


@dataclass(frozen=True)
class Answer:
    """word: better, no better, not yet known, or stopped; why: what it rests on, a sentence;
    verdicts: of each stage with pairs; factors: by what they are of (compute, seconds, memory,
    time); flops: of the pairs' runs; predicted: the row of the prediction for the larger size."""

    row: Row
    word: str
    why: str
    verdicts: Mapping[Stage, Verdict]
    factors: Mapping[str, Factor]
    flops: float
    predicted: Row | None

    @property
    def verdict(self) -> Verdict | None:
        """The verdict that the gain is quoted of: that of the fresh seeds, which no choice has
        favoured, else the first one."""
        return self.verdicts.get("fresh") or self.verdicts.get("first")

    def as_dict(self) -> dict[str, Any]:
        """Return the answer as plain values."""
        v = self.verdict
        names = ("number", "name", "change", "keys", "threshold", "equal")
        return {
            **{name: self.row[name] for name in names},
            "answer": self.word,
            "why": self.why,
            "gain": v.gain if v else None,
            "interval": [_finite(x) for x in v.ends] if v else None,
            "pairs": {stage: v.pairs for stage, v in self.verdicts.items()},
            "factors": {name: {"value": _finite(f.value), "interval": [_finite(x) for x in f.ends]}
                        for name, f in self.factors.items()},
            "flops": self.flops,
        }  # fmt: skip


def answer(trial: Trial) -> Answer:
    """Return the answer of a trial."""
    campaign, number = trial.campaign, trial.row["number"]
    pairs = {stage: rows for stage in STAGES if (rows := trial.pairs(stage))}
    verdicts = {stage: trial.verdict(stage) for stage in pairs}
    word, why = _word(trial, verdicts)
    every = [row for rows in pairs.values() for row in rows]
    flops = sum(row[half]["flops"] or 0.0 for row in every for half in ("base", "change"))
    predictions = campaign.ledger.of("prediction", attempt=number)
    quoted = verdicts.get("fresh") or verdicts.get("first")
    at_size = [row for stage in ("first", "fresh") for row in pairs.get(stage, [])]
    factors = _factors(trial, quoted, at_size) if quoted else {}
    predicted = predictions[-1] if predictions else None
    return Answer(trial.row, word, why, verdicts, factors, flops, predicted)


def _word(trial: Trial, verdicts: Mapping[Stage, Verdict]) -> tuple[str, str]:
    first, fresh = trial.word("first"), trial.word("fresh")
    stops = trial.campaign.ledger.of("stopped", attempt=trial.row["number"])
    if fresh is not None:
        reason = "confirmed by fresh seeds" if fresh == "better" else "fresh seeds don't confirm it"
        larger = {
            "better": "; better at the larger size too",
            "no better": "; no better at the larger size",
        }
        return fresh, reason + larger.get(trial.word("larger") or "", "")
    if first == "better":
        return "better", "not confirmed by fresh seeds yet"
    if first == "no better":
        return first, f"a gain of {trial.row['gain']:.2%} or more is ruled out"
    why = str(stops[-1]["why"]) if stops else ""
    if why in ("flops", "seconds", "runs"):
        return "not yet known", f"budget.{why} is spent; write a larger one to go on"
    pairs = trial.campaign.ledger.of("pair", attempt=trial.row["number"])
    if stops and not (pairs and pairs[-1]["time"] > stops[-1]["time"]):
        return "stopped", why
    return "not yet known", "more pairs can tell"


def _factors(trial: Trial, v: Verdict, pairs: list[Row]) -> dict[str, Factor]:
    seconds, memory = ratio(pairs, "seconds"), ratio(pairs, "memory")
    both = (("memory", memory), ("time", seconds))
    factors = {name: factor for name, factor in both if factor is not None}
    ends = [trial.outcome(planned) for planned in trial.halves()]
    half = [end.loss for end in ends if end.state == "complete"]
    full = {row["seed"]: row["base"]["loss"] for row in pairs if row["base"]["state"] == "complete"}
    if len(half) < HALF_RUNS or len(full) < HALF_RUNS:
        return factors
    compute = compute_factor(v, slope_of([*full.values()], half))
    if compute is None:
        return factors
    if seconds:
        factors = {"seconds": product(compute, seconds)} | factors
    return {"compute": compute} | factors


def answers(campaign: Campaign) -> list[Answer]:
    """Return the answers of all trials of a campaign, in the order in which they were tried."""
    return [answer(Trial(campaign, row)) for row in campaign.attempts]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
