"""`forescale study`: `plan` runs, `fit` the law of runs or of a table, `report` it as pictures,
`predict` a run, `score` what was predicted, `records`: the table."""

import json
import sys
from pathlib import Path

import pandas as pd
from rich.console import Console

from trainer.cli import overrides_of
from trainer.compose import compose
from trainer.config_study import StudyJob
from trainer.errors import DONE, UserError
from trainer.run import Run
from trainer.scaling import planning
from trainer.scaling.forecast import cards, predict, score
from trainer.scaling.page import show, show_score
from trainer.scaling.records import of_runs, of_table
from trainer.scaling.study_fit import StudyFit

_TABLES = (".csv", ".parquet")
_WIDEST = 120  # where there is no terminal
_TODO = "write forescale study plan, fit, report, predict, score or records, and RUNS or a table"


def main(words: list[str]) -> int:
    words = ["json=true" if word == "--json" else word for word in words]
    deeds = {"fit": _fit, "records": _records, "predict": _predict, "score": _score}
    deeds["report"] = _report
    if words[:1] == ["plan"]:
        # It has no runs yet to read.
        return _plan(compose("study", [*overrides_of("study", words[1:]), "input=[none]"]))
    if not words or (words[0] not in deeds and "=" not in words[0]):
        raise UserError(words[0] if words else "study", "is nothing that a study does", _TODO)
    deed = words[0] if words[0] in deeds else "fit"
    job: StudyJob = compose("study", overrides_of("study", [w for w in words if w != deed]))
    table, where = _read(job)
    return deeds[deed](job, table, where)


def _read(job: StudyJob) -> tuple[pd.DataFrame, str]:
    """The records, and what they are called in messages. Runs that are none are told of."""
    paths = [Path(word).expanduser() for word in job.input]
    if any(path.suffix in _TABLES for path in paths):
        if len(paths) > 1:
            raise UserError("input", "mixes tables and runs", "give one table, or runs")
        return of_table(paths[0], job.columns, job.rows), str(paths[0])
    runs = [run for word in job.input for run in _runs(word, Path(job.run.root).expanduser())]
    table, refused = of_runs(runs)
    for one in refused:
        print(f"Note: {one.name} is no record: {one.why}.", file=sys.stderr)
    if table.empty:
        what = f"none of {len(runs)} runs is complete and evaluated"
        raise UserError(" ".join(job.input), what, "train them to their end")
    return table, f"{len(table)} runs"


def _runs(word: str, root: Path) -> list[Run]:
    """Those that a word names: a run, a directory of runs, a pattern of either."""
    for base in (Path(), root):
        pattern = str(base / word)
        found = sorted(Path().glob(pattern)) if not Path(pattern).is_absolute() else None
        found = sorted(Path("/").glob(pattern[1:])) if found is None else found
        runs = [Run(path) for path in found if (path / "config.yaml").is_file()]
        inside = [Run(c.parent) for path in found for c in sorted(path.glob("[!.]*/config.yaml"))]
        if runs or inside:
            return runs or inside
    raise UserError(word, f"names no run (looked in {root} too)", "see forescale status")


def _records(job: StudyJob, table: pd.DataFrame, where: str) -> int:
    """As CSV, for notebooks and for `study fit` elsewhere."""
    table.to_csv(sys.stdout, index=False)
    return DONE


def _plan(job: StudyJob) -> int:
    """What a study would run, before anything is spent."""
    made, sure = planning.plan(job)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDEST)
    planning.show(made, sure, console)
    written = ", ".join(map(str, planning.write(made, sure, job.folder)))
    console.print(
        f"\n{written}. A line a run: forescale submit train slurm.runs={job.folder}/stage-1.txt",
        soft_wrap=True,
    )
    return DONE


def _report(job: StudyJob, table: pd.DataFrame, where: str) -> int:
    """The same as a page of pictures, one file that opens without a network."""
    from trainer.scaling.picture import write

    made = StudyFit(table, job, where)
    made.foretold()
    job.report.parent.mkdir(parents=True, exist_ok=True)
    write(made, job.report, where, ["forescale", *sys.argv[1:]])
    print(f"{job.report}: {len(made.points)} runs; open it in a browser.")
    return DONE


def _predict(job: StudyJob, table: pd.DataFrame, where: str) -> int:
    """A card of the target, before anybody knows."""
    if job.target.run is None:
        raise UserError("target.run", "names no run", "write target.run=NAME: it is scored by that")
    card = predict(StudyFit(table, job, where), job.forecasts, job.target.run)
    facts = card.facts
    print(
        f"{card.path}: loss {facts['loss']:.4f}, 50% {facts['interval_50'][0]:.4f} to "
        f"{facts['interval_50'][1]:.4f}, {job.level:.0%} {facts['interval'][0]:.4f} to "
        f"{facts['interval'][1]:.4f}; {facts['roll_outs']} roll-outs. When {job.target.run} is "
        "trained: forescale study score RUNS"
    )
    return DONE


def _score(job: StudyJob, table: pd.DataFrame, where: str) -> int:
    """How the cards of the study came out."""
    found = cards(job.forecasts)
    if not found:
        raise UserError(str(job.forecasts), "holds no forecasts", "make one with study predict")
    made = score(found, table)
    if job.json:
        json.dump(vars(made), sys.stdout, indent=2)
        print()
        return DONE
    console = Console(highlight=False)
    show_score(found, made, console)
    return DONE


def _fit(job: StudyJob, table: pd.DataFrame, where: str) -> int:
    made = StudyFit(table, job, where)
    made.foretold()  # what is wrong with the target is said before anything else
    if job.json:
        json.dump(made.as_dict(), sys.stdout, indent=2)
        print()
        return DONE
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDEST)
    show(made, console, where)
    return DONE
