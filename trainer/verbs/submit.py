"""`forescale submit train`: plans a job, freezes it, and puts it into SLURM's queue."""

import shlex
import sys
from pathlib import Path

from forescale.cli import overrides_of
from forescale.config.compose import compose
from forescale.config.schema import ConfigError
from forescale.errors import DONE, UserError
from forescale.plan.plan import Plan
from forescale.run.directory import Run
from forescale.slurm.config import SubmitJob
from forescale.slurm.script import Order, render
from forescale.slurm.submit import enter, on_nodes, order
from forescale.verbs.plan import show

_TODO = "write forescale submit train [RUN] [key=value ...]"


def main(words: list[str]) -> int:
    """Returns 0; raises ConfigError with all problems of all runs before anything is written."""
    words = ["submit.dry_run=true" if word == "--dry-run" else word for word in words]
    if words and words[0] != "train" and "=" not in words[0]:
        raise UserError(words[0], "is nothing that can be submitted", _TODO)
    overrides = overrides_of("submit", words[1:] if words[:1] == ["train"] else words)
    jobs = _jobs(overrides)
    plans = [Plan(job) for job in jobs]
    dry = jobs[0].submit.dry_run
    if not dry:
        show(plans[0])
        sys.stdout.flush()
    if problems := [p for plan in plans for p in plan.problems]:
        raise ConfigError(problems)
    profile = next((w.partition("=")[2] for w in overrides if w.startswith("slurm=")), "plain")
    if dry:
        runs = [Run(job.run.directory) for job in jobs]
        folders = [run.path / "jobs" / "NNNN" for run in runs]
        print(render(order(plans, runs, folders, profile)), end="")
        return DONE
    made, job = enter(plans, profile)
    _tell(made, job)
    return DONE


def _jobs(overrides: list[str]) -> list[SubmitJob]:
    """One, or those of the lines in slurm.runs, each laid over the rest."""
    first: SubmitJob = on_nodes(compose("submit", overrides))
    if first.slurm.runs is None:
        return [first]
    path = Path(first.slurm.runs).expanduser()
    try:
        lines = path.read_text().splitlines()
    except OSError as e:
        raise UserError(str(path), f"can't be read ({e.strerror})", "check slurm.runs") from None
    found: dict[str, SubmitJob] = {}
    for number, line in enumerate(lines, 1):
        words = shlex.split(line, comments=True)
        if not words:
            continue
        where = f"{path}, line {number}"
        if any(word.startswith(("slurm", "submit")) for word in words):
            what = "sets a key of slurm, which all runs of an array share"
            raise UserError(where, what, "set it on the command line")
        try:
            job = on_nodes(compose("submit", [*overrides, *overrides_of("submit", words)]))
        except ConfigError as e:
            raise ConfigError(p._replace(key=f"{where}: {p.key}") for p in e.problems) from None
        if job.run.name in found:
            raise UserError(where, f"a second run of the name {job.run.name}", "set run.name=NAME")
        found[job.run.name] = job
    if not found:
        raise UserError(str(path), "names no run", "write a line of key=value words for each")
    return list(found.values())


def _tell(made: Order, job: str) -> None:
    several = len(made.names) > 1
    what = f"{len(made.names)} runs as array {job}" if several else f"as job {job}"
    time = made.settings.time
    limit = f"; told to save {made.lead} s before its limit of {time}" if time else ""
    print(f"\nSubmitted {what}{limit}. Script: {made.submissions[0].script}")
    name = made.names[0]
    print(f"Follow: forescale status    forescale logs {name}    End: forescale stop {name}")
