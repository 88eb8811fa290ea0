"""The actions of `forescale study` that answer one question each: read, compute, print.

Invariant: with json=true, standard output is one JSON document and nothing else.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forescale.console import open_console
from forescale.errors import DONE
from forescale.scaling.analysis.compare import as_dict, compare
from forescale.scaling.config import StudyJob
from forescale.scaling.report.answers import show_comparison
from forescale.scaling.study.groups import read_groups


def compare_groups(job: StudyJob) -> int:
    """Compare two groups of runs; with `to`, also write the picture."""
    made = compare(read_groups(job), job)
    if job.to:
        from forescale.scaling.report.compare import write  # plotly and matplotlib are slow

        path = Path(job.to).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        for written in write(made, path, ["forescale", *sys.argv[1:]]):
            print(written, file=sys.stderr)
    if job.json:
        return _print(as_dict(made))
    show_comparison(made, open_console())
    return DONE


def _print(made: Mapping[str, Any]) -> int:
    json.dump(made, sys.stdout, indent=2)
    print()
    return DONE
