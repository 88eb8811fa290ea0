"""`forescale drill`: faults strike a tiny run; a line a scenario as it ends, then a table of all.

Exit codes: 0 all was survived; 1 something was not.
"""

# ruff: noqa: RUF009 (key and section make fields, as dataclasses.field does)

import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from rich.table import Table

from forescale.config.compose import compose, overrides_of
from forescale.config.duration import Duration
from forescale.config.job import Job, Problems
from forescale.config.schema import key
from forescale.console import open_console
from forescale.drill.judge import Evidence, Verdict
from forescale.drill.runner import Drill
from forescale.drill.scenarios import BY_NAME, SCENARIOS, STEPS
from forescale.drill.scenarios import problems as problems_of_scenarios
from forescale.errors import CRASHED, DONE
from forescale.storage import write_json


@dataclass
class DrillJob(Job):
    VERB: ClassVar[str] = "drill"

    scenarios: list[str] = key([], f"some of {', '.join(BY_NAME)}; none: all")
    processes: Literal[2, 4] = key(2, "ranks of the tiny run; a fault strikes one of them")
    limit: Duration = key(Duration(180, "seconds"), "a command that takes longer is ended")
    to: str | None = key(None, "an empty directory to work in; null: a temporary one")
    keep: bool = key(False, "keep a temporary directory; it is kept where something failed")
    json: str | None = key(None, "a file for the results")

    def problems(self) -> Problems:
        found = problems_of_scenarios(self.scenarios)
        if self.limit.unit != "seconds" or not self.limit.amount:
            found.append(("limit", "must be a wall time", "write limit='3 min'"))
        return found


JOB = DrillJob
EXAMPLES = (
    "drill",
    "drill scenarios=[kill,freeze-data]",
    "drill to=drilled json=drill.json",
)


def main(words: list[str]) -> int:
    job = compose(DrillJob, overrides_of(DrillJob, words))
    chosen = [BY_NAME[name] for name in job.scenarios] or list(SCENARIOS)
    temporary = job.to is None
    directory = Path(tempfile.mkdtemp(prefix="drill-") if temporary else job.to or "").expanduser()
    verdicts: list[Verdict] = []
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # through `finally`
    try:
        drill = Drill(directory, job.processes, job.limit.seconds or 0.0)
        print(f"In {directory}: a run of {STEPS} steps on {job.processes} ranks.", flush=True)
        undisturbed = drill.undisturbed()
        print(f"Undisturbed it takes {undisturbed.seconds:.1f} s.", flush=True)
        for n, scenario in enumerate(chosen, 1):
            print(f"{n:>2}/{len(chosen)}  {scenario.title} ... ", end="", flush=True)
            verdicts.append(drill.run(scenario))
            print(verdicts[-1], flush=True)
        _show(verdicts, undisturbed)
        if job.json:
            write_json(Path(job.json).expanduser(), _results(verdicts, undisturbed))
    finally:
        whole = len(verdicts) == len(chosen) and all(v.survived for v in verdicts)
        if temporary and whole and not job.keep:
            shutil.rmtree(directory, ignore_errors=True)
        else:
            print(f"Runs and logs are in {directory}.")
    return DONE if whole else CRASHED


def _show(verdicts: Sequence[Verdict], undisturbed: Evidence) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("fault", "survived"):
        table.add_column(name)
    for name in ("steps lost", "seconds lost", "noticed after"):
        table.add_column(name, justify="right")
    table.add_column("by")
    for v in verdicts:
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
    survived = sum(v.survived for v in verdicts)
    print(
        f"\n{survived} of {len(verdicts)} survived. Of the wall clock, computing that counts was "
        f"{_ettr(verdicts):.1%} in the drill (ETTR) and "
        f"{undisturbed.compute / undisturbed.seconds:.1%} in the undisturbed run: one so short is "
        f"mostly start-up."
    )


def _ettr(verdicts: Sequence[Verdict]) -> float:
    return sum(v.compute for v in verdicts) / max(1e-9, sum(v.wall for v in verdicts))


def _results(verdicts: Sequence[Verdict], undisturbed: Evidence) -> dict:
    """For programs; seconds."""
    whole = {"seconds": undisturbed.seconds, "compute": undisturbed.compute}
    rows = [{**vars(v), "survived": v.survived} for v in verdicts]
    return {"undisturbed": whole, "ettr": _ettr(verdicts), "scenarios": rows}
