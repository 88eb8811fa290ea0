"""A task of an array of commands: `python -P -m forescale.slurm.command_task JOB STEP VERB WORDS`
becomes `forescale VERB WORDS` once the run has the checkpoint of STEP (- for none). A build of a
dataset stays its child: near the time limit, the task is requeued to go on.

Invariant: it reads the run and writes its log alone, so it may end, or start again, at any time.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from forescale.ground.errors import INTERRUPTED, UserError
from forescale.monitor.status import Status
from forescale.run.directory import Run
from forescale.slurm import containers, queue, steps
from forescale.slurm.submission import Submission, waiting_or_running

_SOONEST = 60.0  # seconds until a task looks again for its checkpoint


def main(arguments: Sequence[str]) -> int:
    """Become the command; or be requeued, if the run has yet to save the checkpoint. Raises
    UserError if it never will."""
    submission, step, words = Submission(Path(arguments[0])), arguments[1], arguments[2:]
    if step != "-" and _must_wait(submission.run, int(step), words[0]):
        return _look_again(submission.run, int(step))
    command = _command(submission, words)
    if words[0] == "shards":
        return _run(command)
    os.execvp(command[0], command)


def _run(command: Sequence[str]) -> int:
    """Run a command, and pass signals on to it. Where SLURM announces the time limit (USR1), and
    the command says that it can go on, requeue this task. Return the exit code."""
    received: list[int] = []
    early: list[int] = []  # those of them that came before the command ran
    process: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: object) -> None:
        received.append(number)
        if process is None:
            early.append(number)
        else:
            process.send_signal(number)

    # Before the command starts: a signal that found no handler would end this process alone, and
    # the command would go on without a parent.
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    process = subprocess.Popen(command)
    while early:
        process.send_signal(early.pop(0))
    code = process.wait()
    if code == INTERRUPTED and signal.SIGUSR1 in received and signal.SIGTERM not in received:
        print(f"{time.strftime('%H:%M:%S')} The time limit is near: requeued to go on.", flush=True)
        _requeue()
    return code if code >= 0 else 128 - code


def _must_wait(run: Run, step: int, verb: str) -> bool:
    """True if the run has yet to save this checkpoint. Raises UserError if it never will."""
    if step in run.checkpoint_steps():
        return False
    is_training = waiting_or_running(run) is not None
    known = run.checkpoint_steps()  # only now: the job may have ended with this checkpoint
    if step in known:
        return False
    if is_training and step > max(known, default=0):
        return True
    problem = "no such checkpoint, and no job of the run that will save it"
    todo = f"give forescale submit train {run.name}, and forescale submit {verb} {run.name}"
    raise UserError(str(run.checkpoint_path(step)), problem, f"{todo} steps=[{step}]")


def _look_again(run: Run, step: int) -> int:
    """Requeue this task, to start again after half of the time that the run needs up to `step` at
    its present pace. Return the exit code of the task, if SLURM doesn't end it first."""
    status = Status(run)
    pause = max(_SOONEST, (step - status.step) * (status.step_seconds or 0.0) / 2)
    print(
        f"{time.strftime('%H:%M:%S')} The run is at step {status.step:,} and has not saved step "
        f"{step:,} yet; this task looks again in {pause / 60:.0f} min.",
        flush=True,
    )
    _requeue(pause)
    return INTERRUPTED


def _requeue(pause: float = 0.0) -> None:
    """Requeue this task, to start in `pause` seconds or later, and wait for its end."""
    shutil.rmtree(os.environ["FORESCALE_NODE"], ignore_errors=True)  # the next start has its own
    ended: list[int] = []  # SLURM may end this process as soon as the task is requeued
    signal.signal(signal.SIGTERM, lambda number, frame: ended.append(number))
    queue.requeue(queue.own_job(), pause=pause)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not ended:
        time.sleep(300)


def _command(submission: Submission, words: Sequence[str]) -> list[str]:
    """Return the command, in the container if there is one."""
    settings = submission.settings
    command = [*containers.python(settings), "-P", "-m", "forescale", *words]
    inside = [*containers.prefix(submission), *command]
    if settings.nodes.most > 1:
        hosts = queue.hosts(os.environ["SLURM_JOB_NODELIST"])
        label = ["--label"] if words[0] == "shards" else []
        return steps.command(submission, hosts, inside, *label)
    of_pyxis = containers.options(submission)  # of srun
    return [*steps.srun(settings, 1, *of_pyxis), *inside] if of_pyxis else inside


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as e:
        print(f"forescale: {e}", file=sys.stderr, flush=True)
        sys.exit(e.code)
