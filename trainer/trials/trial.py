"""A trial: one attempt of a campaign at a change. Its runs, its pairs, and its verdicts.

    an attempt -> pairs at the base's size -> a verdict; one that is better -> pairs on fresh seeds
    -> if the campaign has a larger size, a prediction of its gain there -> pairs there

Invariant: what a trial is, what it needs to be called better, and all that came of it stand in the
log before the next run begins; the same command goes on. An attempt counts however it ended.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from forescale.config.target import targets
from forescale.ground.errors import UserError
from forescale.models.config import ModelConfig
from forescale.run.rows import Row
from forescale.trials.campaign import BASE, NAME, Campaign, Planned, in_brackets
from forescale.trials.config import TryJob
from forescale.trials.evidence import power
from forescale.trials.fairness import (
    Outcome,
    Side,
    changed_side,
    changes_of,
    outcome,
    side,
    unfair,
    unplanned,
    with_tokens,
)
from forescale.trials.judge import judged
from forescale.trials.own_code import copy_code
from forescale.trials.verdict import Verdict, spread, threshold, verdict

Stage = Literal["first", "fresh", "larger"]
STAGES: tuple[Stage, ...] = ("first", "fresh", "larger")
NOISE_RUNS = 4  # of the base, before the first pair: halves of pairs, so that they cost nothing
HALF_RUNS = 2  # of the base at half the compute, by which a gain becomes a factor of compute
_FRESH = 1000  # added to the seeds of the fresh pairs
_SHARE = 0.8  # of trials in which a gain is called shown


def entered(campaign: Campaign, job: TryJob) -> "Trial":
    """Return the trial of a job, entered in the log if it is new. Raises UserError for a change
    that is another's, or that was tried before under another name."""
    rows = {row["name"]: row for row in campaign.attempts}
    name = job.name or ""
    if name in rows:
        row = rows[name]
        if job.change and job.change != row["change"]:
            problem = f"is the trial of {in_brackets(row['change'])}"
            raise UserError(name, problem, "give the other change another name")
        for key in ("gain", "equal"):
            if getattr(job, key) not in (row[key], getattr(TryJob(), key)):
                problem = f"is {row[key]} for {name} since it began"
                raise UserError(key, problem, "leave it out; more pairs= are allowed")
        return Trial(campaign, row)
    has_code = job.worktree is not None or job.patch is not None
    if not (job.change or has_code):
        problem = "is no trial of the campaign yet, so it needs a change"
        raise UserError(name, problem, f"write forescale try {name} -- KEY=VALUE")
    taken = name.partition("-")[0] == BASE or name.endswith("-larger")
    if taken or not NAME.fullmatch(name):
        raise UserError(name, "is no name of a trial", "use letters, digits, -, _ and +")
    changed = changed_side(campaign.base, job.change, job.equal, has_code)
    keys, own_code = changes_of(campaign.base, changed), _own_code(campaign, job, changed)
    if not keys and own_code == campaign.ledger.rows[0].get("own_code"):
        raise UserError(name, "has the code of the base, and no other key", "change something")
    for row in campaign.attempts:
        if (row["keys"], row.get("own_code")) == (keys, own_code):
            problem = f"is the change of {row['name']}, and its runs would be the same"
            todo = f"go on with it: forescale try {row['name']} pairs={row['pairs'] * 2}"
            raise UserError(name, problem, todo)
    better = sum(row["word"] == "better" for row in campaign.ledger.of("verdict", stage="first"))
    number = len(rows) + 1
    row = campaign.ledger.add(
        "attempt", number=number, name=name, change=job.change, keys=keys, gain=job.gain,
        pairs=job.pairs, equal=job.equal, threshold=threshold(campaign.alpha, number, better),
        own_code=own_code,
    )  # fmt: skip
    return Trial(campaign, row)


def _own_code(campaign: Campaign, job: TryJob, changed: Side) -> str | None:
    """Copy the code of the change's own classes, and return its hash; None if it names none. Raises
    UserError for code that no key names."""
    if not targets(changed.job):
        if job.worktree is None and job.patch is None:
            return None
        key = "patch" if job.worktree is None else "worktree"
        todo = "name a class of it, as in -- model._target_=mine.Model"
        raise UserError(key, "holds code that neither base nor change uses", todo)
    if job.worktree is not None and job.patch is not None:
        raise UserError("patch", "can't be combined with worktree", "give one of the two")
    source = Path(job.worktree).expanduser() if job.worktree else Path.cwd()
    patch = Path(job.patch).expanduser() if job.patch else None
    return copy_code(source, campaign.folder / "code" / (job.name or ""), patch)


class Trial:
    """One attempt of a campaign: its pairs, and its verdict so far."""

    def __init__(self, campaign: Campaign, row: Row):
        self.campaign, self.row, self.name = campaign, row, str(row["name"])
        self._sides: dict[bool, tuple[Side, Side]] = {}
        self._ended: dict[str, Outcome] = {}
        self._folders: dict[str, Path | None] = {}

    @property
    def stage(self) -> Stage | None:
        """The stage that it is in; None when it is over."""
        for stage in STAGES:
            if stage == "larger" and not self.campaign.ledger.rows[0]["larger"]:
                return None
            word = self.word(stage)
            if word is None:
                return stage
            if word != "better":
                return None
        return None

    def word(self, stage: Stage) -> str | None:
        """Return the verdict of a stage; None before it."""
        rows = self.campaign.ledger.of("verdict", attempt=self.row["number"], stage=stage)
        return str(rows[-1]["word"]) if rows else None

    def pairs(self, stage: Stage) -> list[Row]:
        """Return the rows of the pairs of a stage, in the order of their seeds."""
        return self.campaign.ledger.of("pair", attempt=self.row["number"], stage=stage)

    def verdict(self, stage: Stage) -> Verdict:
        """Return the verdict after the pairs so far."""
        gains = [row["gain"] for row in self.pairs(stage)]
        alpha = self.campaign.alpha
        needed = self.row["threshold"] if stage == "first" else 1 / alpha
        return verdict(gains, -math.log1p(-self.row["gain"]), needed, alpha)

    def sides(self, stage: Stage) -> tuple[Side, Side]:
        """Return base and change of a stage."""
        is_larger = stage == "larger"
        if is_larger not in self._sides:
            base = self.campaign.larger if is_larger else self.campaign.base
            assert base is not None, "the stage exists"
            has_code = self.row.get("own_code") is not None
            changed = changed_side(base, self.row["change"], self.row["equal"], has_code)
            self._sides[is_larger] = base, changed
        return self._sides[is_larger]

    def planned(self, most: int) -> list[Planned]:
        """Return the runs of the stage it is in, in the order in which they are needed: at first
        runs of the base that show the noise, then pair after pair; at the end of the first stage
        also the base at half its compute. most: pairs."""
        stage = self.stage
        if stage is None:
            return self.halves()
        base, changed = self.sides(stage)
        runs = list[Planned]()
        first = self._noise_runs if stage == "first" else 0
        for i in range(1, first + 1):
            runs.append(self._run(BASE, base, stage, i))
        for i in range(len(self.pairs(stage)) + 1, most + 1):
            halves = [self._run(BASE, base, stage, i), self._run(self.name, changed, stage, i)]
            runs += halves if i % 2 else halves[::-1]  # neither is always the first on the machine
        return list(dict.fromkeys(runs))

    def halves(self) -> list[Planned]:
        """Return the runs of the base at half its compute, which only a better change needs."""
        if self.word("first") != "better":
            return []
        base = self.campaign.base
        step = base.job.tokens_per_step
        tokens = max(1, base.tokens // 2 // step) * step
        words, runs = with_tokens(base.words, tokens), list[Planned]()
        half = side(words)
        for seed in range(1, HALF_RUNS + 1):
            name = f"{BASE}-half-s{seed}"
            run_words = self.campaign.words(name, words, seed)
            folder = self._folder(BASE)
            runs.append(Planned(name, run_words, half.flops, seed, half.job, folder))
        return runs

    def _run(self, name: str, of: Side, stage: Stage, number: int) -> Planned:
        seed = number + (_FRESH if stage == "fresh" else 0)
        full = f"{name}{'-larger' if stage == 'larger' else ''}-s{seed}"
        words, folder = self.campaign.words(full, of.words, seed), self._folder(name)
        return Planned(full, words, of.flops, seed, of.job, folder)

    def _folder(self, name: str) -> Path | None:
        """Return where the runs of a side begin: in its copy of the user's own code, if it has
        one."""
        if name not in self._folders:
            row = self.campaign.ledger.rows[0] if name == BASE else self.row
            self._folders[name] = self.campaign.code(name, row.get("own_code"))
        return self._folders[name]

    def outcome(self, planned: Planned) -> Outcome:
        """Return how a run ended. Raises UserError if it isn't the planned one."""
        if planned.name not in self._ended:
            run = self.campaign.run(planned.name)
            end = outcome(run, self.campaign.base.uniform)
            if end.state == "open":
                return end
            if problems := unplanned(run, planned.job, planned.seed):
                problem = f"isn't the run of this trial: {'; '.join(problems[:3])}"
                raise UserError(str(run.path), problem, "move it away, and repeat the command")
            if end.state == "complete" and self._is_judged(planned):
                end = self._judged(planned, end)
            self._ended[planned.name] = end
        return self._ended[planned.name]

    def _is_judged(self, planned: Planned) -> bool:
        """True for both sides of a pair of which one has a model class of the user's own."""
        sides = self.sides("larger" if "-larger-s" in planned.name else "first")
        return any(not isinstance(of.job.model, ModelConfig) for of in sides)

    def _judged(self, planned: Planned, end: Outcome) -> Outcome:
        """Return the outcome with the loss that the logits of a run have. It is in the log once."""
        ledger, name = self.campaign.ledger, planned.name
        rows = ledger.of("judged", name=name)
        if not rows:
            result = judged(self.campaign.run(name), planned.folder or Path.cwd())
            rows = [ledger.add("judged", name=name, loss=result.loss, moved=result.moved)]
        return replace(end, loss=float(rows[-1]["loss"]))

    def settle(self, most: int, log: Callable[[str], None]) -> None:
        """Enter in the log what is due: the noise, pairs that are complete, the verdict of a stage,
        and the prediction of the larger size. Raises UserError for a pair that isn't fair."""
        while (stage := self.stage) is not None:
            if stage == "first":
                self._enter_noise(log)
            if stage == "larger":
                self._enter_prediction(log)
            self._enter_pairs(stage, most, log)
            v = self.verdict(stage)
            if v.word == "not yet known" and v.pairs < most:
                return
            facts = {"gain": v.gain, "ends": [_finite(x) for x in v.ends]}
            facts |= {"evidence": v.evidence, "against": v.against, "pairs": v.pairs}
            if v.word == "not yet known":
                self._enter_open(stage, facts, log)
                return
            self.campaign.ledger.add(
                "verdict", attempt=self.row["number"], stage=stage, word=v.word, **facts
            )
            log(f"{self.name}, {_where(stage)}: {v.word}. {v}")

    def _enter_open(self, stage: Stage, facts: dict[str, Any], log: Callable[[str], None]) -> None:
        number, ledger = self.row["number"], self.campaign.ledger
        last = ledger.of("open", attempt=number, stage=stage)
        if not last or last[-1]["pairs"] != facts["pairs"]:
            ledger.add("open", attempt=number, stage=stage, **facts)
            v = self.verdict(stage)
            log(f"{self.name}, {_where(stage)}: not yet known. {v}")

    def _enter_pairs(self, stage: Stage, most: int, log: Callable[[str], None]) -> None:
        """Enter pairs in the order of their seeds, as far as they are complete."""
        base, changed = self.sides(stage)
        for i in range(len(self.pairs(stage)) + 1, most + 1):
            if self.verdict(stage).word != "not yet known":
                return
            halves = self._run(BASE, base, stage, i), self._run(self.name, changed, stage, i)
            of_base, of_change = (self.outcome(half) for half in halves)
            if "open" in (of_base.state, of_change.state):
                return
            if of_base.state == of_change.state == "complete":
                equal = self.row["equal"]
                if problems := unfair(of_base.facts, of_change.facts, equal):
                    problem = f"the pair of seed {i} isn't fair: {'; '.join(problems)}"
                    raise UserError(self.name, problem, "give the change without that")
            gain = math.log(of_base.loss / of_change.loss)
            self.campaign.ledger.add(
                "pair", attempt=self.row["number"], stage=stage, seed=i, gain=gain,
                base=_pair_facts(of_base), change=_pair_facts(of_change),
            )  # fmt: skip
            v = self.verdict(stage)
            evidence = f"e-value {math.exp(min(v.evidence, 700)):.3g} of {self.needed(stage):.3g}"
            log(
                f"{self.name}, {_where(stage)}, pair {i}: {of_base.loss:.4f} -> "
                f"{of_change.loss:.4f} ({gain:+.2%}) | {evidence}"
            )

    def needed(self, stage: Stage) -> float:
        """Return the e-value that counts as better."""
        return float(self.row["threshold"]) if stage == "first" else 1 / self.campaign.alpha

    @property
    def _noise_runs(self) -> int:
        return min(NOISE_RUNS, int(self.row["pairs"]))

    def _enter_noise(self, log: Callable[[str], None]) -> None:
        """Enter the noise of seeds once the first runs of the base are complete, with what the
        pairs can show. It is known to the campaign from its first trial on."""
        ledger, number = self.campaign.ledger, self.row["number"]
        if ledger.of("noise", attempt=number):
            return
        base, _ = self.sides("first")
        most, is_known = int(self.row["pairs"]), bool(ledger.of("noise"))
        numbers = range(1, self._noise_runs + 1)
        ends = [self.outcome(self._run(BASE, base, "first", i)) for i in numbers]
        losses = [end.loss for end in ends if end.state == "complete"]
        if len(losses) < self._noise_runs:
            return
        noise = float(np.std(np.log(losses), ddof=1))
        known = ledger.of("pair", stage="first")
        gains = [[row["gain"] for row in known if row["attempt"] == k] for k in range(number)]
        measured = spread(gains)  # without it, as if two runs of one seed shared no noise
        deviation = measured or noise * math.sqrt(2)  # of a gain
        gain = -math.log1p(-self.row["gain"])
        shows = power(gain, deviation, most, self.needed("first")) if noise else None
        facts = {"share": shows.share if shows else 1.0, "median": shows.pairs if shows else 2}
        ledger.add("noise", attempt=number, noise=noise, runs=len(losses), **facts)
        if not is_known:
            log(f"Noise of seeds: {noise:.2%} of the loss ({len(losses)} runs of the base).")
        if shows is None:
            return
        runs, size = f"{most} pairs, {2 * most} runs", f"{self.row['gain']:.2%}"
        share = f"{'' if measured else 'at least '}{shows.share:.0%}"
        log(f"{self.name}: with {runs}, a gain of {size} is found in {share} of trials.")
        if shows.share < _SHARE:
            for pairs in (2 * most, 4 * most, 8 * most):
                if power(gain, deviation, pairs, self.needed("first")).share >= _SHARE:
                    log(f"Note: {pairs} pairs find it in {_SHARE:.0%}: write pairs={pairs}.")
                    break
            else:
                log("Note: a larger gain=, or a larger base with less noise, is needed to see it.")

    def _enter_prediction(self, log: Callable[[str], None]) -> None:
        """Predict the gain at the larger size before its first pair: that of the fresh pairs."""
        ledger, number = self.campaign.ledger, self.row["number"]
        if ledger.of("prediction", attempt=number):
            return
        v = self.verdict("fresh")
        ledger.add("prediction", attempt=number, gain=v.gain, ends=[_finite(x) for x in v.ends])
        log(f"{self.name}: predicted for the larger size: {v}")


def _pair_facts(end: Outcome) -> dict[str, Any]:
    names = ("flops", "tokens", "seconds", "memory", "order", "data")
    return {"loss": end.loss, "state": end.state, **{n: end.facts.get(n) for n in names}}


def _where(stage: Stage) -> str:
    return {"first": "first seeds", "fresh": "fresh seeds", "larger": "larger size"}[stage]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
