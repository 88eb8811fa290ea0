"""A task of an array of evaluations: `python -P -m forescale.slurm.evaluation_task JOB STEP
ARGUMENTS` becomes `forescale eval` of the checkpoint of that step.

Invariant: it reads the run and writes its log alone, so it may end, or start again, at any time.
"""

import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from forescale.errors import INTERRUPTED, UserError
from forescale.monitor.status import Status
from forescale.run.directory import Run
from forescale.slurm import containers, queue, steps
from forescale.slurm.submission import Submission, waiting_or_running

_SOONEST = 60.0  # seconds until a task looks again for its checkpoint


def main(arguments: Sequence[str]) -> int:
    """Become `forescale eval` of the checkpoint; or be requeued, if the run has yet to make it.

    Raises UserError if it never will.
    """
    submission, step, words = Submission(Path(arguments[0])), int(arguments[1]), arguments[2:]
    run = submission.run
    if step not in run.checkpoint_steps():
        goes_on = waiting_or_running(run) is not None
        known = run.checkpoint_steps()  # only now: the job may have ended with this checkpoint
        if step not in known and goes_on and step > max(known, default=0):
            return _look_again(run, step)
        if step not in known:
            problem = "no such checkpoint, and no job of the run that will make it"
            again = f"forescale submit train {run.name}, and forescale submit eval {run.name}"
            raise UserError(str(run.checkpoint_path(step)), problem, f"give {again} steps=[{step}]")
    command = _command(submission, words)
    os.execvp(command[0], command)


def _look_again(run: Run, step: int) -> int:
    """Requeue this task until half of the time has passed that the run needs up to `step`, by its
    present pace. Return the code with which the task ends, if SLURM doesn't end it first."""
    status = Status(run)
    pause = max(_SOONEST, (step - status.step) * (status.step_seconds or 0.0) / 2)
    print(
        f"{time.strftime('%H:%M:%S')} The run is at step {status.step:,} and has not saved step "
        f"{step:,} yet; this task looks again in {pause / 60:.0f} min.",
        flush=True,
    )
    shutil.rmtree(os.environ["FORESCALE_NODE"], ignore_errors=True)  # the next start has its own
    ended: list[int] = []  # SLURM may end this process as soon as the task is requeued
    signal.signal(signal.SIGTERM, lambda number, frame: ended.append(number))
    queue.requeue(queue.own_job(), pause=pause)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not ended:
        time.sleep(300)
    return INTERRUPTED


def _command(submission: Submission, words: Sequence[str]) -> list[str]:
    """Return the command of the evaluation, in the container if there is one."""
    settings = submission.settings
    score = [*containers.python(settings), "-P", "-m", "forescale", "eval", *words]
    inside = [*containers.prefix(submission), *score]
    of_pyxis = containers.options(submission)  # of srun
    return [*steps.srun(settings, 1, *of_pyxis), *inside] if of_pyxis else inside


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as e:
        print(f"forescale: {e}", file=sys.stderr, flush=True)
        sys.exit(e.code)
