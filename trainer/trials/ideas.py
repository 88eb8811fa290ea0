"""A queue of ideas: many trials of one campaign, whose pairs go to those that look best.

    round 1    every idea has two pairs
    round 2    four pairs for the better half of those that are not decided, and for all whose gain
               so far is worth having; then eight for a half of these, and so on
    the end    the better ones together, as one more trial: do their gains add up?

Invariant: an idea that is set aside is not yet known, stays aside in this queue (by its name alone
it goes on), and counts as an attempt. Each has the threshold of its place in the file, so that who
believes in an idea writes it first. The evidence is valid whichever idea has the next pair, for
that is chosen before it is trained.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from forescale.config.frozen import read_yaml
from forescale.ground.errors import DONE, UserError
from forescale.ground.foreign import read_bytes
from forescale.trials.campaign import Campaign
from forescale.trials.config import TryJob
from forescale.trials.fairness import unwritten
from forescale.trials.running import Runner
from forescale.trials.trial import Trial, entered

_FIRST = 2  # pairs of each idea in the first round


def read_ideas(path: Path) -> dict[str, list[str]]:
    """Return the changes of a file by name. Raises UserError if it isn't a YAML file of NAME:
    [KEY=VALUE, ...]."""
    tree = read_yaml(read_bytes(path), str(path))
    todo = "write NAME: [KEY=VALUE, ...] for each idea"
    if not isinstance(tree, dict) or not tree:
        raise UserError(str(path), "holds no ideas", todo)
    for name, words in tree.items():
        if not isinstance(words, list) or not all(isinstance(w, str) and "=" in w for w in words):
            raise UserError(str(path), f"{name} is no list of arguments", todo)
    return {str(name): words for name, words in tree.items()}


def run_all(campaign: Campaign, job: TryJob, log: Callable[[str], None]) -> int:
    """Run the ideas of job.ideas until each is decided or set aside, then the better ones together;
    return 0, or 75 after a stop signal. An idea that `train` refuses is named and left out."""
    trials = list[Trial]()
    for name, words in read_ideas(Path(job.ideas or "").expanduser()).items():
        try:
            trials.append(entered(campaign, replace(job, name=name, change=words)))
            if others := unwritten(trials[-1].row["keys"], words):
                log(f"{name}: beside what you wrote it changes {others}.")
        except UserError as e:
            log(f"{name} is left out: {e}")
    dropped = {row["attempt"] for row in campaign.ledger.of("aside")}
    left = [trial for trial in trials if trial.row["number"] not in dropped]
    pairs = min(_FIRST, job.pairs)
    while left:
        log(f"{pairs} pairs each: {', '.join(trial.name for trial in left)}.")
        for trial in list(left):
            code, spent = _run(trial, job, pairs, log)
            if code != DONE or spent:
                return code
        left = [trial for trial in left if trial.stage is not None]
        if pairs >= job.pairs:
            break
        left, aside = _promising(left)
        if aside:
            for trial in aside:
                campaign.ledger.add("aside", attempt=trial.row["number"], pairs=pairs)
            log(f"Set aside, not yet known: {', '.join(trial.name for trial in aside)}.")
        pairs = min(2 * pairs, job.pairs)
    return _together(campaign, trials, job, log)


def _promising(trials: list[Trial]) -> tuple[list[Trial], list[Trial]]:
    """Return those that go on, the best gain first, and those that are set aside."""
    gains = {trial.name: trial.verdict("first").gain for trial in trials}
    ranked = sorted(trials, key=lambda trial: -gains[trial.name])
    half = (len(ranked) + 1) // 2
    worth = [trial for trial in ranked[half:] if gains[trial.name] >= trial.row["gain"]]
    return ranked[:half] + worth, [trial for trial in ranked[half:] if trial not in worth]


def _run(trial: Trial, job: TryJob, pairs: int, log: Callable[[str], None]) -> tuple[int, bool]:
    """Run a trial to so many pairs; return the exit code, and whether the budget is spent. What
    can't be run is named, and counts."""
    is_better = trial.word("first") == "better"  # its fresh seeds need no other round
    runner = Runner(trial, job, log, most=job.pairs if is_better else pairs)
    try:
        return runner.go(), runner.budget_is_spent
    except UserError as e:
        log(f"{trial.name} is stopped: {e}")
        return DONE, False


def _together(
    campaign: Campaign, trials: list[Trial], job: TryJob, log: Callable[[str], None]
) -> int:
    """Try the better changes together, and say how their gain compares with the sum of theirs."""
    better = [trial for trial in trials if trial.word("fresh") == "better"]
    if len(better) < 2:
        return DONE
    name, total = "+".join(trial.name for trial in better), 0.0
    words = [word for trial in better for word in trial.row["change"]]
    try:
        both = entered(campaign, replace(job, name=name, change=words))
    except UserError as e:
        log(f"The better ones can't be tried together: {e}")
        return DONE
    code, _ = _run(both, job, job.pairs, log)
    if code == DONE and both.pairs("first"):
        total = sum(trial.verdict("fresh").gain for trial in better)
        gain = both.verdict("fresh" if both.pairs("fresh") else "first").gain
        log(f"{name}: gain {gain:+.2%}, where the sum of the single gains is {total:+.2%}.")
    return code
