"""`forescale study`: `plan` runs, `launch` them, `status`; `fit` the law of them, of other runs or
of a table, `report` it as pictures, `predict` a run, `score` what was predicted."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
from rich.live import Live

from forescale.config.compose import compose, overrides_of
from forescale.console import open_console
from forescale.errors import DONE, UserError
from forescale.run.directory import Run
from forescale.scaling.analysis.answer import StudyFit
from forescale.scaling.analysis.forecast import cards, predict, score
from forescale.scaling.analysis.selection import law_of
from forescale.scaling.config import StudyJob
from forescale.scaling.design import planning
from forescale.scaling.design.next_runs import candidates_of, recommend
from forescale.scaling.design.next_runs import show as show_choices
from forescale.scaling.design.simulate import Target
from forescale.scaling.records.exports import is_export
from forescale.scaling.records.records import Refused, of_export, of_runs
from forescale.scaling.report.terminal import show, show_score
from forescale.scaling.study.board import board
from forescale.scaling.study.decisions import add_runs, advance
from forescale.scaling.study.directory import Study, must_be_free, settings
from forescale.scaling.study.local import Launcher
from forescale.scaling.study.queue import Queue

_REDRAW = 2.0  # seconds
_TODO = "write forescale study DEED [RUNS or a table], such as plan, launch, status, fit or predict"


JOB = StudyJob
EXAMPLES = (
    "study plan study=mine plan.cap=1e15 target.flops=4e15   (what to run, how sure)",
    "study plan study=mine plan.cap=1e18 -- data.path=DIR model.mlp=gelu   (of all runs)",
    "study launch study=mine launch.at_once=2   (the same again goes on where it was)",
    "study launch study=mine launch.slurm=PROFILE -- slurm.time='2 h'   (cells as arrays)",
    "study status study=mine --live",
    "study next study=mine cap=1e15 add=true   (more runs where they tell most)",
    "study fit study=mine; study report study=mine   (of a planned study's own runs)",
    "study fit 'runs/*' target.flops=1e18",
    "study fit points.csv columns='{parameters: Model Size, flops: Training FLOP}'",
    "study fit points.csv form=over-training target.parameters=7e9 target.tokens=1e12 --json",
    "study report 'runs/*' target.flops=1e18   (pictures: studies/first/report.html)",
    "study records 'runs/*' > records.csv   (a row a run)",
    "study predict 'runs/small-*' target.run=big target.parameters=1e8 target.tokens=2e9",
    "study score 'runs/*'   (what was foretold, beside what came out)",
)


def main(words: list[str]) -> int:
    for flag in ("json", "live", "sensitivity"):
        words = [f"{flag}=true" if word == f"--{flag}" else word for word in words]
    own: dict[str, Callable[[StudyJob], int]] = {
        "plan": _plan, "launch": _launch, "status": _status, "sync": _sync, "exclude": _exclude,
    }  # fmt: skip
    of_records = {"fit": _fit, "records": _records, "predict": _predict, "score": _score}
    of_records |= {"report": _report, "next": _next}
    words, more = _divided(words)
    deed, rest = (words[0], words[1:]) if words else ("", [])
    if deed not in (*own, *of_records):
        if "=" not in deed:
            raise UserError(deed or "study", "is nothing that a study does", _TODO)
        deed, rest = "fit", words
    overrides = overrides_of(StudyJob, rest)
    # A study that is planned here has no runs yet to read; what else a study does knows its own.
    job = compose(StudyJob, overrides + ["input=[none]"] * (deed in own))
    if deed != "plan":
        job = settings(job, overrides)
    if more:
        job = _told(job, deed, more)
    if deed in own:
        return own[deed](job)
    return of_records[deed](job, *_read(job))


def _divided(words: list[str]) -> tuple[list[str], list[str]]:
    """Those of the study, and those after `--`, which are words of `train` or of `submit`."""
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def _told(job: StudyJob, deed: str, more: list[str]) -> StudyJob:
    if deed == "plan":
        return replace(job, plan=replace(job.plan, words=more))
    if deed == "launch" and job.launch.slurm:
        return replace(job, launch=replace(job.launch, words=more))
    todo = "write them in study plan PLAN -- WORDS of train, or launch.slurm=PROFILE -- of submit"
    raise UserError("--", f"study {deed} passes no words on", todo)


def _read(job: StudyJob) -> tuple[pd.DataFrame, str]:
    """The records, and what they are called in messages. Runs that are none are told of."""
    if not job.input:
        table = Study(job.folder).table()
        if table.empty:
            todo = f"forescale study launch study={job.study}"
            raise UserError(str(job.folder), "none of its cells is complete", todo)
        return table, f"{len(table)} cells of {job.folder}"
    paths = [Path(word).expanduser() for word in job.input]
    if any(map(is_export, paths)):
        if len(paths) > 1:
            raise UserError("input", "mixes tables and runs", "give one table, or runs")
        table, refused = of_export(paths[0], job.columns, job.rows)
        _tell_refused(refused)
        return table, str(paths[0])
    runs = [run for word in job.input for run in _runs(word, Path(job.run.root).expanduser())]
    table, refused = of_runs(runs)
    _tell_refused(refused)
    if table.empty:
        what = f"none of {len(runs)} runs is complete and evaluated"
        raise UserError(" ".join(job.input), what, "train them to their end")
    return table, f"{len(table)} runs"


def _tell_refused(refused: list[Refused]) -> None:
    for one in refused:
        print(f"Note: {one.name} is no record: {one.why}.", file=sys.stderr)


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


def _plan(job: StudyJob) -> int:
    """What a study would run, before anything is spent."""
    must_be_free(job.folder)
    made, sure = planning.plan(job)
    console = open_console()
    Study.make(job.folder, job, made, {"expected": asdict(sure) if sure else None})
    planning.show(made, sure, console)
    console.print(
        f"\nPlanned in {job.folder}. Begin: forescale study launch study={job.study}",
        soft_wrap=True,
    )
    return DONE


def _launch(job: StudyJob) -> int:
    """All that the plan wants, here, some cells at once."""
    study = Study(job.folder)
    with study.deciding():
        if job.launch.retry:
            for state in study.states():
                if state.word in ("diverged", "failed"):
                    study.retry(state.cell.name)
        asked = job.launch
        launcher: Launcher | Queue = Launcher(study, asked.at_once, _tell, asked.target)
        if asked.slurm:
            more = [f"slurm={asked.slurm}", *asked.words]
            options = (asked.at_once, _tell, asked.follow, asked.target)
            launcher = Queue(study, more, *options)
        code = launcher.go()
    if code == DONE:
        _conclude(study, is_waiting=bool(job.launch.slurm and not job.launch.follow))
    return code


def _conclude(study: Study, is_waiting: bool) -> None:
    """What a launch came to: what is left, and how the forecasts came out. is_waiting: jobs may be
    in the queue still."""
    left = study.wanted()
    if not left:
        _tell(f"Nothing is left to run. Next: forescale study report study={study.folder.name}")
    elif not is_waiting:
        trunks = ", ".join(sorted({c.trunk for c in left if c.trunk}))
        _tell(f"{len(left)} cells can't begin: {trunks} has saved nothing where they leave it.")
    if found := cards(study.forecasts):
        show_score(found, score(found, study.table()), open_console())


def _tell(line: str) -> None:
    print(line, flush=True)


def _sync(job: StudyJob) -> int:
    """Decide what the results so far decide, and begin nothing."""
    study = Study(job.folder)
    with study.deciding():
        advance(study, _tell)
        if (table := study.table()).size and (found := cards(study.forecasts)):
            score(found, table)
    return _status(job)


def _status(job: StudyJob) -> int:
    console = open_console()
    if not job.live:
        console.print(board(Study(job.folder)))
        return DONE
    with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
        while True:
            live.update(board(Study(job.folder)), refresh=True)
            time.sleep(_REDRAW)


def _next(job: StudyJob, table: pd.DataFrame, where: str) -> int:
    """Which runs would make the target surest for what they cost; `add` puts them into the plan."""
    if job.cap is None:
        todo = "write cap=1e15: FLOPs that more runs may spend"
        raise UserError("cap", "is not given", todo)
    study = None if job.input else Study(job.folder)
    common = study.plan.common if study else planning.common_of(job)
    made, t = law_of(table, job, where), job.target
    if not t.is_given:
        raise UserError("target", "is not given", "write target.flops=: what is to be foretold")
    target = Target.of(common, t.flops, t.parameters, t.tokens, t.device_hours)
    low = float(made.points.flops.min()) if made.points.flops is not None else job.cap / 100
    offered = candidates_of(common, low, job.cap, made.every)
    found = recommend(made.sure, offered, target, job.cap)
    show_choices(found, open_console(), common.rate)
    if study and job.add:
        with study.deciding():
            add_runs(study, found, _tell)
        _tell(f"Added. Begin: forescale study launch study={job.study}")
    return DONE


def _exclude(job: StudyJob) -> int:
    """Leave cells out of the study, for a reason that stays with it."""
    study = Study(job.folder)
    known = {c.name for c in study.plan.cells}
    if not job.cells or not job.why:
        todo = "write cells=[NAME] why='what is wrong with it'"
        raise UserError("study exclude", "needs cells and a reason", todo)
    for name in job.cells:
        if name not in known:
            todo = f"see forescale study status study={job.study}"
            raise UserError("cells", f"{name} is no cell of {job.folder}", todo)
    with study.deciding():
        for name in job.cells:
            study.event("excluded", cell=name, why=job.why)
    return DONE


def _records(job: StudyJob, table: pd.DataFrame, where: str) -> int:
    """As CSV, for notebooks and for `study fit` elsewhere."""
    table.to_csv(sys.stdout, index=False)
    return DONE


def _report(job: StudyJob, table: pd.DataFrame, where: str) -> int:
    """The same as a page of pictures, one file that opens without a network; of a planned study,
    all that is known so far."""
    from forescale.scaling.report.evidence import gather
    from forescale.scaling.report.html import beside, write

    seen = gather(job, table)
    try:
        made: StudyFit | str = law_of(seen.fitted, job, where)
    except UserError as e:
        if not seen.stages:
            raise
        made = str(e)
    if isinstance(made, StudyFit) and not seen.stages:
        made.foretold()  # a study that goes on may have its target still too far: the page says it
    job.report.parent.mkdir(parents=True, exist_ok=True)
    write(made, seen, job.report, where, ["forescale", *sys.argv[1:]])
    runs = "no law yet" if isinstance(made, str) else f"{len(made.points)} runs"
    print(f"{job.report}: {runs}; open it in a browser. For papers: {beside(job.report)}/")
    return DONE


def _predict(job: StudyJob, table: pd.DataFrame, where: str) -> int:
    """A card of the target, before anybody knows."""
    if job.target.run is None:
        raise UserError("target.run", "names no run", "write target.run=NAME: it is scored by that")
    card = predict(law_of(table, job, where), job.forecasts, job.target.run)
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
    show_score(found, made, open_console())
    return DONE


def _fit(job: StudyJob, table: pd.DataFrame, where: str) -> int:
    made = law_of(table, job, where)
    made.foretold()  # what is wrong with the target is said before anything else
    if job.json:
        json.dump(made.as_dict(), sys.stdout, indent=2)
        print()
        return DONE
    console = open_console()
    show(made, console, where)
    return DONE
