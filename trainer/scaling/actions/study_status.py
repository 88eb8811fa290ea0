"""`forescale study status`: shows every run of a study."""

import time

from rich.live import Live

from forescale.config.job import Action
from forescale.console import open_console
from forescale.errors import DONE
from forescale.scaling.actions.shared import STUDY
from forescale.scaling.config import StudyJob
from forescale.scaling.study.board import board
from forescale.scaling.study.directory import Study

ACTION = Action(
    "Show the state, loss and cost of every run of a study.",
    (*STUDY, "live"),
    ("study status study=mine --live",),
)
_REDRAW = 2.0  # seconds between two drawings of the live table


def main(job: StudyJob) -> int:
    """Print the board of the study; with `live`, redraw it until Ctrl-C."""
    console = open_console()
    if not job.live:
        console.print(board(Study(job.folder)))
        return DONE
    with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
        while True:
            live.update(board(Study(job.folder)), refresh=True)
            time.sleep(_REDRAW)
