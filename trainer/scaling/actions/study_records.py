"""`forescale study records`: prints runs as a table."""

import sys

from forescale.config.job import Action
from forescale.ground.document import tell
from forescale.ground.errors import DONE
from forescale.scaling.actions.shared import RUNS
from forescale.scaling.config import StudyJob
from forescale.scaling.study.inputs import read

ACTION = Action(
    "Print the runs as CSV, one row each.",
    RUNS,
    ("study records 'runs/*' > records.csv",),
    {"records": list[dict]},
)


def main(job: StudyJob) -> int:
    """Print a row for each run."""
    table, _ = read(job)
    table.to_csv(sys.stdout, index=False)
    tell({"records": table.to_dict("records")})
    return DONE
