"""The config keys of `forescale try`."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from forescale.config.job import Job
from forescale.config.schema import key, section


@dataclass
class BudgetKeys:
    """What a campaign may spend, in all its trials together."""

    flops: float | None = key(None, gt=0, common=True)  # FLOPs of training; null: no limit
    seconds: float | None = key(None, gt=0)  # seconds of runs, each from its start to its end
    runs: int | None = key(None, ge=1)  # number of runs


@dataclass
class TryJob(Job):
    """All keys of `forescale try`."""

    VERB: ClassVar[str] = "try"
    TARGET: ClassVar[str] = "name"
    PRINTS: ClassVar = {"campaign": str, "trials": list[dict], "log": str, "page": str}

    # name of the trial; null: show the campaign
    name: str | None = key(None, common=True)
    campaign: str = key("first", common=True)  # trials that are counted and corrected together
    campaigns: str = "campaigns"  # the directory that holds the campaigns
    # arguments of `forescale train` for both sides, such as [experiment=first]; a campaign has one
    # base, so that later trials needn't repeat it
    base: list[str] = key([], common=True)
    # more arguments of both sides at a larger size, such as [model.width=128, train.tokens=4e7]; a
    # change that is better is tried there too
    larger: list[str] = key([], common=True)
    # YAML file of many changes, each as NAME: [KEY=VALUE, ...]; the pairs go to the most promising
    ideas: str | None = key(None, common=True)
    # arguments of the change; better written after `--`
    change: list[str] = key([])
    # directory with a changed copy of your own code, whose classes the base or the change names
    worktree: str | None = None
    # changes of your own code in the working directory, as `git diff --relative` writes them
    patch: str | None = None
    # the smallest gain that is worth having, as a share of the loss
    gain: float = key(0.01, gt=0, lt=1, common=True)
    pairs: int = key(12, ge=2, common=True)  # most pairs of runs
    # what both sides have alike: FLOPs of training, or tokens
    equal: Literal["flops", "tokens"] = "flops"
    # chance that a campaign without any better change calls one better
    alpha: float = key(0.05, gt=0, lt=0.5)
    at_once: int = key(1, ge=1, common=True)  # number of runs at the same time
    # slurm=CHOICE of `forescale submit` to queue the runs with, as arrays; null: run them here
    slurm: str | None = None
    submit: list[str] = key([])  # with slurm: more arguments of `forescale submit`
    budget: BudgetKeys = section(BudgetKeys)  # what the campaign may spend
    # the HTML file to write; null: campaigns/CAMPAIGN/report.html
    to: str | None = None

    @property
    def folder(self) -> Path:
        """The directory of the campaign."""
        return Path(self.campaigns).expanduser() / self.campaign

    @property
    def report(self) -> Path:
        """The HTML file of the campaign."""
        return Path(self.to).expanduser() if self.to else self.folder / "report.html"
