"""A campaign: one base, and the trials of changes to it, counted and corrected together.

    campaigns/<name>/
      log.jsonl        all that happened, in a chain of hashes (ledger.py)
      runs/base-s1     a run of the base with seed 1, which all trials share
      runs/NAME-s1     a run of the trial NAME, the other half of a pair
      code/            copies of the user's own code (own_code.py)
      logs/  report.html

Invariant: all trials of a campaign have the same base, code and alpha, from its first row on.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from forescale.config.frozen import decisive
from forescale.config.schema import display, plain
from forescale.config.target import targets
from forescale.config.train import TrainJob
from forescale.ground.errors import UserError
from forescale.ground.storage import make_folder
from forescale.run.directory import Run
from forescale.run.rows import Row
from forescale.trials.config import BudgetKeys, TryJob
from forescale.trials.fairness import Side, code_hash, joined, side, with_tokens
from forescale.trials.ledger import Ledger
from forescale.trials.own_code import copy_code, expect_code

BASE = "base"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+-]*")  # of a campaign, and of a trial


@dataclass(frozen=True)
class Planned:
    """A run that a trial needs. name: below runs/; words: of `train`; flops: what it costs; job:
    the config that it must have, but for its seed; folder: of the user's own code, where it runs;
    None: where the command runs."""

    name: str
    words: tuple[str, ...]
    flops: float
    seed: int
    job: TrainJob = field(compare=False)
    folder: Path | None = None


class Campaign:
    """A campaign's directory. Raises UserError if its log was changed, or if the code was."""

    def __init__(self, folder: Path):
        self.folder, self.ledger = folder, Ledger(folder / "log.jsonl")
        if not self.ledger.rows:
            problem = "holds no campaign"
            todo = "begin one: forescale try NAME campaign=NAME -- CHANGE"
            raise UserError(str(folder), problem, todo)

    @classmethod
    def opened(cls, job: TryJob) -> "Campaign":
        """Return the campaign of a job, begun if it wasn't. Raises UserError for another base, for
        a base that `train` refuses, or for code that isn't the campaign's."""
        path = job.folder / "log.jsonl"
        if not NAME.fullmatch(job.campaign):
            todo = "use letters, digits, -, _ and +; campaigns=DIR says where it is"
            raise UserError("campaign", f"{job.campaign!r} is no name", todo)
        if not path.exists():
            settings: dict[str, Any] = {"base": job.base, "larger": job.larger, "alpha": job.alpha}
            first, larger = _whole(job.base), _whole(joined(job.base, job.larger))
            settings["config"], settings["larger_config"] = _config(first), _config(larger)
            make_folder(job.folder)
            if targets(first.job):
                settings["own_code"] = copy_code(Path.cwd(), job.folder / "code" / BASE)
            Ledger(path).add("campaign", code=code_hash(), **settings)
            base = " ".join(job.base) or "the defaults of forescale train (write base=[KEY=VALUE])"
            print(f"Campaign {job.campaign} begins. Its base: {base}.", flush=True)
        campaign = cls(job.folder)
        facts = campaign.ledger.rows[0]
        for name, value in (("base", job.base), ("larger", job.larger)):
            if value and value != facts[name]:
                problem = f"the campaign has {name}={in_brackets(facts[name])}"
                todo = f"leave it out, or choose another campaign=NAME than {job.campaign}"
                raise UserError(name, problem, todo)
        if job.alpha not in (facts["alpha"], TryJob().alpha):
            problem = f"is {facts['alpha']} for this campaign since it began"
            raise UserError("alpha", problem, "leave it out, or begin another campaign=NAME")
        campaign.expect_own_runs()
        if code_hash() != facts["code"]:
            problem = "the code of forescale has changed since the campaign began, so that new "
            problem += "runs and its earlier ones can't be compared"
            todo = "go back to that code, or begin another campaign=NAME"
            raise UserError(str(job.folder), problem, todo)
        campaign.expect_own_config()
        return campaign

    def expect_own_config(self) -> None:
        """Raise UserError if the words of the base mean another config than when the campaign
        began: a config file that they name was changed."""
        facts = self.ledger.rows[0]
        for name, of in (("config", self.base), ("larger_config", self.larger)):
            before, now = facts.get(name), _config(of) if of else None
            if before is None or now is None:  # a campaign of an older version; no larger size
                continue
            keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
            if keys:
                key = keys[0]
                problem = f"is {display(now.get(key))} in the base today, and was "
                problem += f"{display(before.get(key))} when the campaign began"
                todo = "restore the config file that the base names, or begin another campaign=NAME"
                raise UserError(key, problem, todo)

    def expect_own_runs(self) -> None:
        """Raise UserError for a run of a trial that isn't in the log, which has each trial before
        its first run: the end of the log was cut off."""
        known = {BASE, f"{BASE}-half", *(row["name"] for row in self.attempts)}
        for path in sorted((self.folder / "runs").glob("*")):
            match = re.fullmatch(r"(\w.*?)(-larger)?-s\d+", path.name)
            if match and match[1] not in known:
                problem = f"has no trial {match[1]}, but there is {path}: rows are missing"
                todo = "restore the file from a copy, or move that run away"
                raise UserError(str(self.ledger.path), problem, todo)

    @cached_property
    def base(self) -> Side:
        """The base at its own size."""
        return _whole(self.ledger.rows[0]["base"])

    @cached_property
    def larger(self) -> Side | None:
        """The base at the larger size; None if the campaign has none."""
        facts = self.ledger.rows[0]
        if not facts["larger"]:
            return None
        return _whole(joined(facts["base"], facts["larger"]))

    @property
    def alpha(self) -> float:
        """The chance that a campaign without any better change calls one better."""
        return float(self.ledger.rows[0]["alpha"])

    @property
    def attempts(self) -> list[Row]:
        """The rows of the attempts, oldest first."""
        return self.ledger.of("attempt")

    def run(self, name: str) -> Run:
        """Return the run of this name."""
        return Run(self.folder / "runs" / name)

    def code(self, name: str, known: str | None) -> Path | None:
        """Return the copy of the user's own code for a side; None if it has none. known: its hash.
        Raises UserError if it was changed."""
        if known is None:
            return None
        folder = self.folder.absolute() / "code" / name
        expect_code(folder, known)
        return folder

    def words(self, name: str, of_side: Sequence[str], seed: int) -> tuple[str, ...]:
        """Return the words of `train` for a run."""
        scored = [] if any(w.startswith("validation.every=") for w in of_side) else [
            "validation.every=100 %"
        ]  # fmt: skip
        runs = str((self.folder / "runs").absolute())
        return (*of_side, *scored, f"train.seed={seed}", f"run.root={runs}", f"run.name={name}")

    def budget(self, keys: BudgetKeys) -> BudgetKeys:
        """Return what the campaign may spend: the limits that a command gave last. New
        ones are entered in the log."""
        rows = self.ledger.of("budget")
        before = rows[-1]["limits"] if rows else {}
        limits = before | {k: v for k, v in plain(keys).items() if v is not None}
        if limits != before:
            self.ledger.add("budget", limits=limits)
        return BudgetKeys(**limits)

    def spent(self, but: Sequence[str] = ()) -> tuple[float, float, int]:
        """Return FLOPs, seconds and number of all runs so far, whatever became of them, but for
        those that are named. A run that was resumed has rows of all its steps, so its last one
        counts."""
        rows = (row for row in self.ledger.of("ran") if row["name"] not in but)
        last = {row["name"]: row for row in rows}.values()
        return sum(row["flops"] for row in last), sum(row["seconds"] for row in last), len(last)


def _whole(words: Sequence[str]) -> Side:
    """Return a side with its length in tokens among its words."""
    return side(with_tokens(words, side(words).tokens))


def _config(of: Side) -> dict[str, Any]:
    """Return the keys of a side that decide what it computes, as JSON has them."""
    keys: dict[str, Any] = json.loads(json.dumps(decisive(of.job), default=str))
    return keys


def in_brackets(words: Sequence[str]) -> str:
    """Return words as one would type them."""
    return f"[{', '.join(words)}]"


def expect_campaign(job: TryJob) -> None:
    """Raise UserError for a campaign that hasn't begun and has no base, where there are others: its
    name may be mistyped."""
    others = sorted(path.parent.name for path in job.folder.parent.glob("*/log.jsonl"))
    if others and not job.base and job.campaign not in others:
        problem = f"there is no campaign {job.campaign} in {job.campaigns}, but "
        problem += f"{', '.join(others[:5])}{', ...' if len(others) > 5 else ''}"
        todo = "choose one of them, or give the new one a base=[KEY=VALUE, ...]"
        raise UserError("campaign", problem, todo)
