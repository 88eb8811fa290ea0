"""`forescale study compare`: the compute multiplier between two groups of runs."""

import sys
from pathlib import Path

from forescale.config.job import Action
from forescale.ground.console import open_console
from forescale.ground.document import is_json
from forescale.ground.errors import DONE
from forescale.pages.document import show
from forescale.scaling.actions.shared import LAW, RUNS, TARGET, print_json
from forescale.scaling.analysis.comparison import as_dict, compare
from forescale.scaling.config import StudyJob
from forescale.scaling.report.comparison_page import comparison_sections, path_of, write
from forescale.scaling.study.inputs import read_groups

ACTION = Action(
    "Compare two recipes or datasets: how many times less compute reaches the same loss.",
    (*RUNS, *LAW, *TARGET, "by", "groups", "to"),
    (
        "study compare old.csv new.csv target.flops=1e21 to=compare.html",
        "study compare 'runs/adamw-*' 'runs/muon-*'   (or two studies by name)",
        "study compare points.csv by=dataset groups=[c4,web]",
    ),
    {"sides": list[dict], "level": float, "multiplier": dict, "notes": list[str]},
)


def main(job: StudyJob) -> int:
    """Print the comparison; with `to`, also write its picture."""
    comparison = compare(read_groups(job), job)
    if job.to:
        for file in write(comparison, Path(job.to).expanduser(), ["forescale", *sys.argv[1:]]):
            print(file, file=sys.stderr)
    if is_json():
        return print_json(as_dict(comparison))
    show(open_console(), comparison_sections(comparison), path_of(comparison))
    return DONE
