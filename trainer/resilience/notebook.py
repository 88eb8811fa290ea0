"""Training from Python: the command `forescale train` in a process of its own.

Invariant: a run started here is the run of the same command: same config, ranks, locks, resuming.
This process imports no torch for it, and ends no sooner than the run has saved.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forescale.config.job import overrides_of, words_of
from forescale.config.target import targets
from forescale.config.train import TrainJob
from forescale.ground.errors import DONE, INTERRUPTED, UserError
from forescale.ground.processes import die_with_parent
from forescale.run.command import job_of

_LINES = 20  # of the output that an error repeats


class TrainingFailed(Exception):
    """A run that ended before it was complete. code: as of the command; the text: its last
    lines."""

    def __init__(self, code: int, lines: list[str]):
        super().__init__("".join(lines[-_LINES:]).strip() or f"the run ended with code {code}")
        self.code = code


def train_run(*words: str, show: Callable[[str], None] | None = None, **keys: Any) -> Path:
    """Train a run to its end, or go on with it, and return its directory.

    words: of the command line, such as "experiment=quick" or "train.tokens=5e6"; keys: the same as
    values and dicts, such as run={"name": "first"}. show: called with each line of the output; by
    default it is printed.

    An interrupt (Ctrl-C, the stop button of a notebook) saves the run and raises KeyboardInterrupt;
    the same call then goes on. Raises UserError for wrong keys, TrainingFailed if the run fails.
    """
    for word in words:
        if not isinstance(word, str):
            todo = 'write such as train_run("experiment=quick")'
            raise UserError(repr(word), "is no word of a command line", todo)
    words = (*words, *words_of(keys))
    job = job_of(TrainJob, overrides_of(TrainJob, words))
    for key, target in targets(job).items():
        if target.startswith("__main__."):
            problem = f"{target} exists in this process alone, and ranks are processes of their own"
            todo = "write the class into a file beside the notebook, such as mine.py: mine.Name"
            raise UserError(key, problem, todo)
    code, lines = _run(list(words), show or (lambda line: print(line, end="", flush=True)))
    if code == INTERRUPTED:
        raise KeyboardInterrupt("the run is saved; the same call goes on")
    if code != DONE:
        raise TrainingFailed(code, lines)
    return job.run.directory


def _run(words: list[str], show: Callable[[str], None]) -> tuple[int, list[str]]:
    """Run the command; return its exit code and its last lines. An interrupt of this process asks
    it to save; a second one ends it at once."""
    command = [sys.executable, "-P", "-m", "forescale", "train", *words]
    started = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        # Else Ctrl-C of a terminal would reach the command too, which would count two.
        start_new_session=True,
        # Nor would it see the death of this process: the ranks go with it, and nothing is lost.
        preexec_fn=die_with_parent,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert started.stdout is not None
    lines: list[str] = []
    while True:
        try:
            for line in started.stdout:
                lines = [*lines[-_LINES:], line]
                show(line)
            return started.wait(), lines
        except KeyboardInterrupt:
            started.send_signal(signal.SIGINT)
        except BaseException:  # of show: the run must not go on unseen
            started.terminate()
            started.wait()
            raise
