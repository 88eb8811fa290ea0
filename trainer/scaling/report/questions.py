"""The actions of `forescale study` that answer one question each: read, compute, print.

Invariant: with json=true, standard output is one JSON document and nothing else.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from forescale.console import open_console, progress_display
from forescale.errors import DONE
from forescale.scaling.analysis import compare
from forescale.scaling.analysis.recipes import multipliers
from forescale.scaling.analysis.selection import law_of
from forescale.scaling.config import StudyJob
from forescale.scaling.design import rate_laws
from forescale.scaling.fitting.profile import profiles
from forescale.scaling.report.answers import show_comparison, show_profiles, show_rates
from forescale.scaling.report.recipes.terminal import show_recipes
from forescale.scaling.report.tasks.terminal import show_task_scores, show_tasks
from forescale.scaling.study.groups import read_groups
from forescale.scaling.study.tasks import read_ladders, read_tasks
from forescale.scaling.tasks import answer, judge


def compare_groups(job: StudyJob) -> int:
    """Compare two groups of runs; with `to`, also write the picture."""
    made = compare.compare(read_groups(job), job)
    if job.to:
        from forescale.scaling.report.compare import write  # plotly and matplotlib are slow

        path = Path(job.to).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        for written in write(made, path, ["forescale", *sys.argv[1:]]):
            print(written, file=sys.stderr)
    if job.json:
        return _print(compare.as_dict(made))
    show_comparison(made, open_console())
    return DONE


def compare_recipes(job: StudyJob, table: pd.DataFrame, where: str) -> int:
    """Give the compute multiplier of each recipe against the base."""
    made = multipliers.Multipliers(table, job, where)
    if job.json:
        return _print(multipliers.as_dict(made))
    show_recipes(made, open_console())
    return DONE


def report_recipes(job: StudyJob, table: pd.DataFrame, where: str) -> int:
    """Write the page of the compute multipliers, with its pictures."""
    from forescale.scaling.report.recipes.page import write  # plotly and matplotlib are slow

    made = multipliers.Multipliers(table, job, where)
    job.report.parent.mkdir(parents=True, exist_ok=True)
    page, *_ = write(made, table, job.report, ["forescale", *sys.argv[1:]])
    print(f"{page}: {len(made.candidates)} recipes against {made.base}; open it in a browser.")
    return DONE


def predict_tasks(job: StudyJob) -> int:
    """Fit the link from loss to accuracy of each task, and predict the target's metrics."""
    found = answer.fit_tasks(read_tasks(job), job)
    if job.json:
        return _print(answer.as_dict(found))
    show_tasks(found, open_console())
    return DONE


def backtest_task(job: StudyJob) -> int:
    """Judge what the two steps would have predicted of a metric; of several tables together. One
    that can't be judged is left out with a note."""
    with progress_display() as progress:
        rows, refused = judge.forecasts_of(read_ladders(job), job, progress)
    for one in refused:
        print(f"Note: {one.where} is left out: {one.problem}.", file=sys.stderr)
    found = judge.scores(rows)
    if job.json:
        return _print(judge.as_dict(found))
    show_task_scores(found, job, open_console())
    return DONE


def fit_rates(job: StudyJob, table: pd.DataFrame, where: str) -> int:
    """Fit the laws of the best learning rate and batch, and give both for the target."""
    made = rate_laws.rate_laws(table, job, where)
    if job.json:
        return _print(rate_laws.as_dict(made))
    show_rates(made, open_console(), where)
    return DONE


def profile_law(job: StudyJob, table: pd.DataFrame, where: str) -> int:
    """Print the profile intervals of a law beside those of its resampled fits."""
    made = law_of(table, job, where)
    found = profiles(made.fit, job.level)
    if job.json:
        return _print({"form": made.form.name, "level": job.level, "doubts": made.doubts,
                       "notes": made.notes, "profiles": [vars(one) for one in found]})  # fmt: skip
    show_profiles(found, made, open_console(), where)
    return DONE


def _print(made: Mapping[str, Any]) -> int:
    json.dump(made, sys.stdout, indent=2)
    print()
    return DONE
