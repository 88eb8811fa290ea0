"""`forescale study ACTION`: train runs by a plan, fit a scaling law, predict a bigger run.

Invariant: an action gets only keys that it reads (scaling/actions.py); any other key is
refused.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import pandas as pd
from rich.live import Live

from forescale.config.compose import compose, overrides_of
from forescale.config.schema import leaves
from forescale.console import open_console, progress_display
from forescale.errors import DONE, UserError
from forescale.scaling.actions import ACTIONS
from forescale.scaling.analysis import judge
from forescale.scaling.analysis.answer import StudyFit
from forescale.scaling.analysis.export import as_dict
from forescale.scaling.analysis.forecast import read_forecasts, score, write_forecast
from forescale.scaling.analysis.recipes.table import has_recipes
from forescale.scaling.analysis.selection import law_of
from forescale.scaling.config import StudyJob
from forescale.scaling.design import planning
from forescale.scaling.design.next_runs import candidates_of, recommend
from forescale.scaling.design.next_runs import show as show_next_runs
from forescale.scaling.design.simulate import Target
from forescale.scaling.report import questions
from forescale.scaling.report.tasks.terminal import show_task, show_task_forecasts
from forescale.scaling.report.tasks.words import prediction_of
from forescale.scaling.report.terminal import show, show_score, show_scores
from forescale.scaling.study.board import board
from forescale.scaling.study.decisions import add_runs, advance
from forescale.scaling.study.directory import Study, must_be_free, settings
from forescale.scaling.study.inputs import read, read_finished
from forescale.scaling.study.local import Launcher
from forescale.scaling.study.queue import Queue
from forescale.scaling.study.tasks import with_columns, with_outcome
from forescale.scaling.study.trust import expect_no_code
from forescale.scaling.tasks.answer import TaskAnswer, answer_as_dict, task_of
from forescale.scaling.tasks.forecast import columns_of, facts_of, score_tasks

_REDRAW = 2.0  # seconds between two drawings of the live table

JOB = StudyJob
EXAMPLES = tuple(example for action in ACTIONS.values() for example in action.examples)


def main(arguments: list[str]) -> int:
    """Run one action of a study and return the exit code."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    own, passed_on = arguments[:at], arguments[at + 1 :]
    action, rest = (own[0], own[1:]) if own else ("", [])
    if action not in ACTIONS:
        if "=" not in action:
            todo = f"write forescale study ACTION; the actions are {', '.join(ACTIONS)}"
            problem = "is no action of a study" if action else "needs an action"
            raise UserError(action or "study", problem, todo)
        action, rest = "fit", own
    overrides = overrides_of(StudyJob, rest)
    refuse_other_keys(action, overrides)
    # These actions read no records, so that the rule about a missing input does not apply to them.
    job = compose(StudyJob, overrides + ["input=[none]"] * (action in _OF_STUDY))
    if action != "plan":
        job = settings(job, overrides)
    if passed_on:
        job = _with_arguments(job, action, passed_on)
    if action in _OF_INPUT:
        return _OF_INPUT[action](job)
    if action in _OF_STUDY:
        return _OF_STUDY[action](job)
    table, where = read(job)
    if has_recipes(table):
        return _of_recipes(action, job, table, where)
    return _OF_RECORDS[action](job, with_outcome(table, job, where), where)


def _of_recipes(action: str, job: StudyJob, table: pd.DataFrame, where: str) -> int:
    """Run an action on records of several recipes, to which no single law can be fitted."""
    if action in _OF_RECIPES:
        return _OF_RECIPES[action](job, table, where)
    problem = f"has several recipes, and study {action} is for one"
    todo = "compare them with study fit; of a table, keep one with rows={recipe: NAME}"
    raise UserError(where, problem, todo)


def refuse_other_keys(action: str, overrides: Sequence[str]) -> None:
    """Raise UserError for a key that this action does not read, naming the actions that do."""
    known = leaves(StudyJob)
    for override in overrides:
        path = override.partition("=")[0]
        if path in known and not ACTIONS[action].reads(path):
            users = ", ".join(name for name, other in ACTIONS.items() if other.reads(path))
            problem = f"is no key of forescale study {action}"
            raise UserError(path, problem, f"leave it out; the actions with this key are {users}")


def _with_arguments(job: StudyJob, action: str, arguments: list[str]) -> StudyJob:
    """The job with the arguments after `--`, which go to `train` or `submit`."""
    if action == "plan":
        return replace(job, plan=replace(job.plan, arguments=arguments))
    if action == "launch" and job.launch.slurm:
        return replace(job, launch=replace(job.launch, arguments=arguments))
    todo = (
        "only study plan takes them (for train), and study launch with launch.slurm=PROFILE (for "
        "submit)"
    )
    raise UserError("--", f"study {action} takes no arguments after it", todo)


def _plan(job: StudyJob) -> int:
    must_be_free(job.folder)
    made, precision = planning.plan(job)
    console = open_console()
    Study.make(job.folder, job, made, {"expected": asdict(precision) if precision else None})
    planning.show(made, precision, console)
    console.print(
        f"\nThe plan is in {job.folder}. Next: forescale study launch study={job.study}",
        soft_wrap=True,
    )
    return DONE


def _launch(job: StudyJob) -> int:
    study = Study(job.folder)
    if not job.launch.trust:
        expect_no_code(study)
    with study.deciding():
        if job.launch.retry:
            for state in study.states():
                if state.status in ("diverged", "failed"):
                    study.retry(state.cell.name)
        keys = job.launch
        launcher: Launcher | Queue = Launcher(study, keys.at_once, _log, keys.target, keys.trust)
        if keys.slurm:
            more = [f"slurm={keys.slurm}", *keys.arguments]
            launcher = Queue(study, more, keys.at_once, _log, keys.follow, keys.target, keys.trust)
        code = launcher.go()
    if code == DONE:
        _conclude(study, is_waiting=bool(job.launch.slurm and not job.launch.follow))
    return code


def _conclude(study: Study, is_waiting: bool) -> None:
    """Print what is left to run, and the score of the forecasts.

    is_waiting: jobs may still be in the queue.
    """
    left = study.wanted()
    if not left:
        _log(f"Nothing is left to run. Next: forescale study report study={study.folder.name}")
    elif not is_waiting:
        trunks = ", ".join(sorted({c.trunk for c in left if c.trunk}))
        _log(f"{len(left)} cells can't start: {trunks} saved no checkpoint where they branch off.")
    if found := read_forecasts(study.forecasts):
        show_score(found, score(found, study.table()), open_console())


def _log(line: str) -> None:
    print(line, flush=True)


def _sync(job: StudyJob) -> int:
    study = Study(job.folder)
    with study.deciding():
        advance(study, _log)
        if (table := study.table()).size and (found := read_forecasts(study.forecasts)):
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


def _exclude(job: StudyJob) -> int:
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
            study.event("cell_excluded", cell=name, why=job.why)
    return DONE


def _next(job: StudyJob, table: pd.DataFrame, where: str) -> int:
    if job.cap is None:
        todo = "write cap=1e15, the FLOPs that the additional runs may spend"
        raise UserError("cap", "is not given", todo)
    study = None if job.input else Study(job.folder)
    common = study.plan.common if study else planning.common_of(job)
    made, t = law_of(table, job, where), job.target
    if not t.is_given:
        todo = "write target.flops=1e18, the compute of the run to predict"
        raise UserError("target", "is not given", todo)
    target = Target.of(common, t.flops, t.parameters, t.tokens, t.device_hours)
    low = float(made.points.flops.min()) if made.points.flops is not None else job.cap / 100
    offered = candidates_of(common, low, job.cap, made.all_points)
    found = recommend(made.calibrated, offered, target, job.cap)
    show_next_runs(found, open_console(), common.rate)
    if study and job.add:
        with study.deciding():
            add_runs(study, found, _log)
        _log(f"Added to the plan. Next: forescale study launch study={job.study}")
    return DONE


def _fit(job: StudyJob, table: pd.DataFrame, where: str) -> int:
    made = law_of(table, job, where)
    made.predict()  # raises UserError for a bad target before anything is printed
    task = task_of(made, where)
    if job.json:
        more = {} if task is None else {"task": answer_as_dict(task)}
        json.dump(as_dict(made) | more, sys.stdout, indent=2)
        print()
        return DONE
    show(made, open_console(), where)
    if task is not None:
        show_task(task, open_console())
    return DONE


def _report(job: StudyJob, table: pd.DataFrame, where: str) -> int:
    """Write the HTML report. For a planned study it is written even before a law can be fitted."""
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
        made.predict()  # raises UserError; in a planned study's report a page says it instead
    task: TaskAnswer | str | None = None
    if isinstance(made, StudyFit):
        try:
            task = task_of(made, where)
        except UserError as e:
            if not seen.stages:
                raise
            task = str(e)
    job.report.parent.mkdir(parents=True, exist_ok=True)
    write(made, seen, job.report, where, ["forescale", *sys.argv[1:]], task)
    runs = "no law yet" if isinstance(made, str) else f"{len(made.points)} runs"
    print(f"{job.report}: {runs}; open it in a browser. Figures for papers: {beside(job.report)}/")
    return DONE


def _predict(job: StudyJob, table: pd.DataFrame, where: str) -> int:
    if job.target.run is None:
        todo = "write target.run=NAME, the name that the run will have"
        raise UserError("target.run", "is not given", todo)
    law = law_of(table, job, where)
    task = task_of(law, where)
    more = {} if task is None else {"task": facts_of(task.fit)}
    made = write_forecast(law, job.forecasts, job.target.run, more=more)
    facts = made.facts
    print(
        f"{made.path}: loss {facts['loss']:.4f}, 50% interval {facts['interval_50'][0]:.4f} to "
        f"{facts['interval_50'][1]:.4f}, {job.level:.0%} interval {facts['interval'][0]:.4f} to "
        f"{facts['interval'][1]:.4f}, by {facts['method']}, calibrated with "
        f"{facts['backtests']} earlier forecasts. When {job.target.run} "
        "is trained: forescale study score RUNS"
    )
    if task is not None:
        print(f"{job.task}: {prediction_of(task.fit)}")
    return DONE


def _score(job: StudyJob, table: pd.DataFrame, where: str) -> int:
    found = read_forecasts(job.forecasts)
    if not found:
        todo = "make one with forescale study predict"
        raise UserError(str(job.forecasts), "holds no forecasts", todo)
    made = score(found, table)
    tasks = score_tasks(found, with_columns(table, job, columns_of(found)))
    if job.json:
        json.dump(vars(made) | {"tasks": [asdict(one) for one in tasks]}, sys.stdout, indent=2)
        print()
        return DONE
    show_score(found, made, open_console())
    show_task_forecasts(tasks, open_console())
    return DONE


def _backtest(job: StudyJob) -> int:
    """Judge what each method would have forecast; of several tables, apart and together."""
    if job.task is not None:
        return questions.backtest_task(job)
    studies = read_finished(job)
    with progress_display() as progress:
        found = judge.scores(judge.forecasts(studies, job, progress=progress))
    if job.json:
        json.dump(judge.as_dict(found), sys.stdout, indent=2)
        print()
        return DONE
    show_scores(found, open_console())
    return DONE


def _records(job: StudyJob, table: pd.DataFrame, where: str) -> int:
    table.to_csv(sys.stdout, index=False)
    return DONE


_OF_STUDY: dict[str, Callable[[StudyJob], int]] = {
    "plan": _plan, "launch": _launch, "status": _status, "sync": _sync, "exclude": _exclude,
}  # fmt: skip
# These actions read the input in a way of their own.
_OF_INPUT: dict[str, Callable[[StudyJob], int]] = {
    "backtest": _backtest, "compare": questions.compare_groups, "tasks": questions.predict_tasks,
}  # fmt: skip
_OF_RECORDS: dict[str, Callable[[StudyJob, pd.DataFrame, str], int]] = {
    "next": _next, "fit": _fit, "report": _report, "predict": _predict, "score": _score,
    "records": _records, "rates": questions.fit_rates, "profile": questions.profile_law,
}  # fmt: skip
_OF_RECIPES: dict[str, Callable[[StudyJob, pd.DataFrame, str], int]] = {
    "fit": questions.compare_recipes, "report": questions.report_recipes, "records": _records,
}  # fmt: skip
