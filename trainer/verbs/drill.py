"""`forescale drill`: inject faults into a tiny run; print a line per scenario, then a table.

Exit codes: 0 if the run survived all scenarios, 1 if not.
"""

import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NotRequired

from rich.table import Table

from forescale.config.compose import parse
from forescale.config.duration import Duration
from forescale.config.job import Job, Problems
from forescale.config.schema import key
from forescale.drill.judge import Evidence, Judgement
from forescale.drill.runner import Drill
from forescale.drill.scenarios import BY_NAME, SCENARIOS, STEPS
from forescale.drill.scenarios import problems as problems_of_scenarios
from forescale.ground.console import open_console
from forescale.ground.document import tell
from forescale.ground.errors import CRASHED, DONE
from forescale.ground.storage import make_folder, write_json


@dataclass
class DrillJob(Job):
    """The scenarios to run, and where."""

    VERB: ClassVar[str] = "drill"
    PRINTS: ClassVar = {"ettr": float, "scenarios": list[dict], "path": NotRequired[str]}

    scenarios: list[str] = key([], f"the scenarios to run, of {', '.join(BY_NAME)}; empty: all")
    processes: Literal[2, 4] = 2  # ranks of the tiny run; each fault is injected into one of them
    # a training command that runs longer is killed and counts as failed
    limit: Duration = key(Duration(180, "seconds"))
    to: str | None = None  # an empty directory for the runs; null: a temporary one
    keep: bool = False  # keep the temporary directory; it is always kept if a scenario fails
    json: str | None = None  # file for the results, as JSON; --json prints them

    def problems(self) -> Problems:
        problems = problems_of_scenarios(self.scenarios)
        if self.limit.unit != "seconds" or not self.limit.amount:
            problems.append(("limit", "must be a wall time", "write limit='3 min'"))
        return problems


JOB = DrillJob
EXAMPLES = ("drill", "drill scenarios=[kill,freeze-data]", "drill to=drilled json=drill.json")


def main(arguments: list[str]) -> int:
    """Run the scenarios. Return 0 if all were survived, else 1."""
    job = parse(DrillJob, arguments)
    if job.json:  # before some minutes of work
        make_folder(Path(job.json).expanduser().parent)
    chosen = [BY_NAME[name] for name in job.scenarios] or list(SCENARIOS)
    temporary = job.to is None
    directory = Path(tempfile.mkdtemp(prefix="drill-") if temporary else job.to or "").expanduser()
    judgements: list[Judgement] = []
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # through `finally`
    try:
        drill = Drill(directory, job.processes, job.limit.seconds or 0.0)
        print(f"In {directory}: a run of {STEPS} steps on {job.processes} ranks.", flush=True)
        undisturbed = drill.undisturbed()
        print(f"Without faults it takes {undisturbed.seconds:.1f} s.", flush=True)
        for n, scenario in enumerate(chosen, 1):
            print(f"{n:>2}/{len(chosen)}  {scenario.title} ... ", end="", flush=True)
            judgements.append(drill.run(scenario))
            print(judgements[-1], flush=True)
        _show(judgements, undisturbed)
        whole_run = {"seconds": undisturbed.seconds, "compute": undisturbed.compute}
        rows = [{**vars(v), "survived": v.survived} for v in judgements]
        results = {"undisturbed": whole_run, "ettr": _ettr(judgements), "scenarios": rows}
        tell(results)
        if job.json:
            write_json(Path(job.json).expanduser(), results)  # times in seconds
    finally:
        whole = len(judgements) == len(chosen) and all(v.survived for v in judgements)
        if temporary and whole and not job.keep:
            shutil.rmtree(directory, ignore_errors=True)
        else:
            print(f"Runs and logs are in {directory}.")
            tell({"path": directory})
    return DONE if whole else CRASHED


def _show(judgements: Sequence[Judgement], undisturbed: Evidence) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("fault", "survived"):
        table.add_column(name)
    for name in ("steps lost", "seconds lost", "noticed after"):
        table.add_column(name, justify="right")
    table.add_column("noticed by")
    for v in judgements:
        table.add_row(
            v.title,
            "[green]yes[/]" if v.survived else "[red]no[/]",
            str(v.steps),
            f"{v.seconds:.1f}",
            "-" if v.noticed is None else f"{v.noticed:.2f} s",
            v.by or "-",
        )
    console = open_console()
    console.print()
    console.print(table)
    survived = sum(v.survived for v in judgements)
    print(
        f"\n{survived} of {len(judgements)} survived. Computing of steps that count took "
        f"{_ettr(judgements):.1%} of the wall time in the drill (ETTR), and "
        f"{undisturbed.compute / undisturbed.seconds:.1%} without faults; the rest is mostly "
        f"start-up, because the runs are short."
    )


def _ettr(judgements: Sequence[Judgement]) -> float:
    return sum(v.compute for v in judgements) / max(1e-9, sum(v.wall for v in judgements))
