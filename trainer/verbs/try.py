"""`forescale try`: is a change better than the base? Pairs of runs until the answer is known."""

# ruff: noqa: N999 (the file has the name of its verb)

import math

from forescale.config.compose import compose
from forescale.config.job import overrides_of
from forescale.config.schema import hints
from forescale.config.train import TrainJob
from forescale.ground.console import open_console
from forescale.ground.document import tell
from forescale.ground.errors import DONE, UserError
from forescale.trials import page
from forescale.trials.answer import answer, answers
from forescale.trials.campaign import Campaign, expect_campaign
from forescale.trials.config import TryJob
from forescale.trials.fairness import unwritten
from forescale.trials.ideas import run_all
from forescale.trials.running import Runner, alone
from forescale.trials.trial import entered

JOB = TryJob
EXAMPLES = (
    "try window base=[experiment=first] -- model.mixer=window model.mixer.window=64",
    "try window pairs=24   (go on, with more pairs)",
    "try norm larger=[model.width=128,train.tokens=4e7] -- model.norm=layernorm",
    "try ideas=ideas.yaml campaign=week budget.flops=1e16   (many changes, the best get the pairs)",
    "try mine worktree=changed base=[model._target_=mine.Model] equal=tokens   (code of your own)",
    "try   (the trials of the campaign, and its page)",
)


def main(words: list[str]) -> int:
    """Run a trial until it has an answer, or show the campaign. Returns 0 with an answer, also with
    `not yet known`; 75 after a stop signal."""
    at = words.index("--") if "--" in words else len(words)
    overrides = overrides_of(TryJob, words[:at])
    for word in overrides:
        name = word.partition("=")[0].lstrip("+~")
        if name.partition(".")[0] in {*hints(TrainJob), "experiment"} - {*hints(TryJob)}:
            todo = f"write it after two dashes: forescale try NAME -- {word}"
            raise UserError(name, "is a key of forescale train, so it is part of the change", todo)
    job = compose(TryJob, overrides)
    if at < len(words):
        job.change = [*job.change, *words[at + 1 :]]
    code = DONE
    if job.name is None and job.ideas is None:
        if job.change:
            raise UserError("try", "needs a name for the change", "write forescale try NAME -- ...")
        campaign = Campaign(job.folder)
    else:
        campaign, code = _tried(job)
    known = answers(campaign)
    page.write(campaign, known, job.report)
    facts = {"campaign": job.campaign, "trials": [a.as_dict() for a in known]}
    tell({**facts, "log": campaign.ledger.head, "page": job.report})
    page.show(known, open_console())
    print(f"\nPage: {job.report}. Last hash of the log: {campaign.ledger.head[:16]}.")
    return code


def _tried(job: TryJob) -> tuple[Campaign, int]:
    """Run the trial of a job; return its campaign, and the exit code."""
    expect_campaign(job)
    job.folder.mkdir(parents=True, exist_ok=True)
    with alone(job.folder):
        campaign = Campaign.opened(job)
        if job.ideas is not None:
            return campaign, run_all(campaign, job, _log)
        trial = entered(campaign, job)
        number, needed = trial.row["number"], trial.row["threshold"]
        _log(f"{trial.name} is attempt {number} of campaign {job.campaign}: better needs an "
            f"e-value of {needed:.4g}.")  # fmt: skip
        if others := unwritten(trial.row["keys"], trial.row["change"]):
            _log(f"Beside what you wrote it changes {others}.")
        code = Runner(trial, job, _log).go()
        a = answer(trial)
        _log(f"{trial.name}: {a.word} ({a.why}).")
        for noun, factor in a.factors.items():
            if math.isfinite(factor.value):
                _log(f"Factor of {noun}: {factor}.")
    return campaign, code


def _log(line: str) -> None:
    print(line, flush=True)
