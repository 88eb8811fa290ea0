"""An array of commands as one job of SLURM: each task is one process of `forescale VERB WORDS`.

    FOLDER of the submission, in a run
      submission.json, job.sbatch, code.tar, job.json    as in jobs/, see submission.py
      NAME.log                                           what a task prints
      logs/0                                             of each task, a link to its log

Invariant: tasks are independent: each may fail, or start again, at any time. If SLURM refuses one
array of several that belong together, nothing of any of them is left.
"""

import shlex
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from forescale.ground.errors import UserError
from forescale.ground.storage import write_file
from forescale.slurm import queue
from forescale.slurm.config import SlurmConfig
from forescale.slurm.login.snapshot import write_code
from forescale.slurm.script import escaped, in_lines, rendered, resources
from forescale.slurm.submission import Submission, accepted, facts_of


@dataclass(frozen=True)
class Command:
    """A task of an array. name: of its log; words: the command line after `forescale`; step: the
    checkpoint of the run that it waits for."""

    name: str
    words: Sequence[str]
    step: int | None = None


@dataclass(frozen=True)
class CommandArray:
    """One array, in the folder of its submission. begins_after: a job that must have begun."""

    title: str
    job_name: str
    commands: Sequence[Command]
    submission: Submission
    settings: SlurmConfig
    profile: str
    begins_after: str | None = None

    def script(self) -> str:
        """Return the script as text. Raises UserError for a value that doesn't fit in one line."""
        words = [shlex.join([str(c.step or "-"), *c.words]) for c in self.commands]
        return rendered(
            "command_array.sbatch.j2",
            self.settings,
            title=self.title,
            profile=self.profile,
            script=self.submission.script,
            options=self._options(),
            commands=words,
            job=self.submission.path,
        )

    def log(self, command: Command) -> Path:
        """Return the file that a task writes its output to."""
        return self.submission.path / f"{command.name}.log"

    def _options(self) -> list[tuple[str, str]]:
        s = self.settings
        throttle = f"%{s.at_once}" if s.at_once else ""
        options = [
            (f"--job-name={shlex.quote(self.job_name)}", ""),
            (f"--output={escaped(self.submission.links / '%a')}", "a link to the task's log"),
            ("--open-mode=truncate", "a task that starts again writes a new log"),
            ("--nodes=1", ""),
            ("--ntasks=1", ""),
            (f"--array=0-{len(self.commands) - 1}{throttle}", "a task for each command"),
            *((option, "") for option, _ in resources(s)),
            ("--requeue", "also how a task waits for its checkpoint"),
        ]
        waits = [f"after:{self.begins_after}"] if self.begins_after else []
        if s.after:
            waits.append(f"afterok:{':'.join(s.after)}")
            options.append(("--kill-on-invalid-dep=yes", "a job that can never start doesn't stay"))
        if waits:
            options.append((f"--dependency={','.join(waits)}", ""))
        return in_lines([*options, *((option, "") for option in s.options)])

    def write(self, data: Iterable[str], packages: Sequence[Path]) -> None:
        """Write its files, and the links by which sbatch names its logs after commands. data: what
        the commands read; packages: the user's code that they need."""
        submission = self.submission
        write_code(submission.code, list(packages))
        paths = [p if "://" in p else str(Path(p).expanduser().resolve()) for p in data]
        steps = [c.step for c in self.commands]
        submission.write(**facts_of(self.settings, paths, packages), steps=steps)
        submission.link_logs([self.log(command) for command in self.commands])
        write_file(submission.script, self.script().encode())


def submit_arrays(
    arrays: Sequence[CommandArray], data: Iterable[str], packages: Sequence[Path]
) -> list[str]:
    """Write and submit arrays, and return their ids. Raises UserError if SLURM refuses one."""
    ids = list[str]()
    try:
        for array in arrays:
            array.write(data, packages)
            ids.append(queue.submit(array.submission.script))
    except BaseException:
        for id in ids:
            with suppress(UserError):  # without its files it ends by itself
                queue.cancel(id)
        for array in arrays:
            shutil.rmtree(array.submission.path, ignore_errors=True)
        raise
    for array, id in zip(arrays, ids, strict=True):
        accepted(f"{id}_0", array.submission.script, {id: array.submission})
    return ids
