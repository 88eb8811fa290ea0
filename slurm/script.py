"""The batch scripts: of runs that train, and of arrays of commands, `forescale VERB WORDS`.

    FOLDER of the submission of an array of commands, in a run
      submission.json, job.sbatch, code.tar, job.json    as in jobs/, see submission.py
      NAME.log                                           what a task prints
      logs/0                                             of each task, a link to its log

Invariant: a script contains every setting, so a user can read it, change it and submit it by hand.
Every value in it is quoted for the shell; a line for sbatch or a comment holds no character that
could end the line. Commands are independent: each may fail, or start again, at any time.
"""

import shlex
import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jinja2

from forescale.config.sizes import Sizes
from forescale.ground.errors import UserError
from forescale.ground.storage import write_file
from forescale.run.start import versions
from forescale.slurm import queue
from forescale.slurm.config import SlurmConfig
from forescale.slurm.containers import python_of_host
from forescale.slurm.login.snapshot import write_code
from forescale.slurm.steps import own_scratch
from forescale.slurm.submission import Submission, accepted, facts_of

Option = tuple[str, str]  # of sbatch, and a comment on it or ""
# Keys whose name and value are those of sbatch's option.
_SAME = (
    *("partition", "account", "qos", "constraint", "reservation", "mem", "mem_per_gpu"),
    *("gpus_per_task", "switches", "network", "licenses", "nice"),
)


@dataclass(frozen=True)
class Order:
    """The runs of one submission. lead: seconds before the time limit at which they save; waits:
    dependencies beside slurm.after; nodes: how many they can use; None: as slurm.nodes says."""

    names: Sequence[str]
    runs: Sequence[Path]
    submissions: Sequence[Submission]
    settings: SlurmConfig
    lead: int
    profile: str = "?"
    waits: Sequence[str] = ()
    nodes: Sizes | None = None

    def script(self) -> str:
        """Return the script as text. Raises UserError for a value that doesn't fit in one line."""
        s, names, count = self.settings, self.names, len(self.names)
        some = ", ".join(names[:3]) + (f" and {count - 3} more" if count > 3 else "")
        nodes = self.nodes or s.nodes
        # A requeued job asks for all of the range again: `scontrol show job` then says NumNodes=4-4
        # after a start on 4, and a loss with --no-kill changes ReqTRES, but SLURM 24.11 keeps to
        # what the script says, whether a user, a preemption or a lost node is why.
        nodes = Sizes(nodes.least + s.spares, nodes.most + s.spares)
        options = [
            ("--open-mode=append", "a requeued job appends to the same file"),
            (f"--nodes={nodes}", f"{s.spares} of them to spare" if s.spares else ""),
            (f"--ntasks-per-node={s.ranks_per_node}", "one task per rank"),
            ("--requeue" if s.requeue else "--no-requeue", ""),
        ]
        if s.outlives_nodes:
            options.append(("--no-kill", "the job goes on when it loses a node, on others"))
        if s.time is not None:
            why = "this many seconds before the limit, ranks save and end"
            options.append((f"--signal=B:USR1@{self.lead}", why))
        return _rendered(
            "job.sbatch.j2", s, self.submissions[0], self.profile, options,
            title=f"Run {some}",
            job_name=names[0] + ("+" if count > 1 else ""),
            output="output of this script; ranks write to attempts/NNNN/node-N.log",
            tasks=count if count > 1 else 0,
            waits=self.waits,
            runs=self.runs,
            jobs=[s.path for s in self.submissions],
        )  # fmt: skip


@dataclass(frozen=True)
class Command:
    """A task of an array. name: of its log; words: the command line after `forescale`; step: the
    checkpoint of the run that it waits for."""

    name: str
    words: Sequence[str]
    step: int | None = None


@dataclass(frozen=True)
class CommandArray:
    """Commands, each a task of one array, on all of slurm.nodes at once. begins_after: a job that
    must have begun; lead: seconds before the time limit at which a command ends, and its task is
    requeued to go on; None: it ends at the limit."""

    title: str
    job_name: str
    commands: Sequence[Command]
    submission: Submission
    settings: SlurmConfig
    profile: str
    begins_after: str | None = None
    lead: int | None = None

    def script(self) -> str:
        """Return the script as text. Raises UserError for a value that doesn't fit in one line."""
        log = ("truncate", "a task that starts again writes a new log")
        if self.lead is not None:
            log = ("append", "a task that goes on appends to the same log")
        options = [
            (f"--open-mode={log[0]}", log[1]),
            (f"--nodes={self.settings.nodes}", ""),
            ("--ntasks-per-node=1", ""),
            ("--requeue", "a task starts again, as one does that waits for its checkpoint"),
        ]
        if self.lead is not None and self.settings.time is not None:
            why = "this many seconds before the limit, the command ends, and the task is requeued"
            options.append((f"--signal=B:USR1@{self.lead}", why))
        return _rendered(
            "command_array.sbatch.j2", self.settings, self.submission, self.profile, options,
            title=self.title,
            job_name=self.job_name,
            output="a link to the task's log",
            tasks=len(self.commands),
            waits=[f"after:{self.begins_after}"] if self.begins_after else [],
            commands=[shlex.join([str(c.step or "-"), *c.words]) for c in self.commands],
            job=self.submission.path,
        )  # fmt: skip

    def log(self, command: Command) -> Path:
        """Return the file that a task writes its output to."""
        return self.submission.path / f"{command.name}.log"

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
    """Write and submit arrays, and return their ids. Raises UserError if SLURM refuses one: then
    nothing of any of them is left."""
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


def _rendered(
    template: str, settings: SlurmConfig, submission: Submission, profile: str,
    options: Sequence[Option], *, title: str, job_name: str, output: str, tasks: int,
    waits: Sequence[str] = (), **values: object,
) -> str:  # fmt: skip
    """Return the script that a template of this directory makes of `values` and the settings.
    options: of sbatch, beside those that all jobs have; output: a comment on the log; tasks: of an
    array, 0 for a single job; waits: dependencies beside slurm.after. In an array the log is a link
    by the number of the task, %a, to the log that lies beside the task's run."""
    log = submission.links / "%a" if tasks else submission.log
    directory = str(log.parent).replace("%", "%%")
    throttle = f"%{settings.at_once}" if settings.at_once else ""
    after = [f"afterok:{':'.join(settings.after)}"] if settings.after else []
    lines = [
        (f"--job-name={shlex.quote(job_name)}", ""),
        (f"--output={shlex.quote(f'{directory}/{log.name}')}", output),
        *([(f"--array=0-{tasks - 1}{throttle}", "a task for each line below")] if tasks else []),
        ("--export=ALL", "keys and addresses that the shell exports reach the job"),
        *options,
        *_resources(settings),
    ]
    if waits := [*waits, *after]:
        lines.append((f"--dependency={','.join(waits)}", ""))
    if after:
        why = "a job that can never start doesn't stay in the queue"
        lines.append(("--kill-on-invalid-dep=yes", why))
    lines += [(_quoted(option), "") for option in settings.options]
    for option, _ in lines:
        if not option.isprintable():
            problem = "has a line break or another control character, which sbatch can't read"
            todo = "choose another directory or value"
            raise UserError(_in_one_line(option), problem, todo)
    return (
        _templates()
        .get_template(template)
        .render(
            values,
            title=title,
            profile=profile,
            script=submission.script,
            options=lines,
            time=time.strftime("%Y-%m-%d %H:%M:%S"),
            version=versions()["forescale"],
            s=settings,
            scratch=settings.scratch.rstrip("/"),
            own_scratch=own_scratch('"$FORESCALE_SCRATCH"'),
            directory=Path.cwd(),
            python=shlex.join(python_of_host(settings)),
        )
    )


@cache
def _templates() -> jinja2.Environment:
    """Return the scripts' templates, each compiled once."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters["comment"] = _in_one_line
    templates.filters["quoted"] = lambda text: shlex.quote(str(text))
    return templates


def _resources(s: SlurmConfig) -> list[Option]:
    """Return sbatch's options for what a job gets, for how long, and who hears of its end."""
    options: list[Option] = []
    if s.gres:
        options.append((f"--gres={shlex.quote(s.gres)}", ""))
    if s.gpus_per_node and not s.gpus_of_gres:
        option = f"--gpus-per-node={s.gpus_per_node}"
        options.append((option, "all ranks of a node see all its GPUs"))
    for name in _SAME:
        if (value := getattr(s, name)) is not None:
            options.append((f"--{name.replace('_', '-')}={shlex.quote(str(value))}", ""))
    if s.cpus_per_task:
        options.append((f"--cpus-per-task={s.cpus_per_task}", ""))
    if s.time is not None:
        minutes, rest = divmod(round(s.time.seconds or 0.0), 60)
        hours, minutes = divmod(minutes, 60)
        options.append((f"--time={hours // 24}-{hours % 24:02d}:{minutes:02d}:{rest:02d}", ""))
    if s.exclusive:
        options.append(("--exclusive", ""))
    if s.exclude:
        options.append((f"--exclude={shlex.quote(','.join(s.exclude))}", ""))
    if s.mail:
        options.append((f"--mail-user={shlex.quote(s.mail)}", ""))
        options.append(("--mail-type=END,FAIL", "not for each requeue"))
    return options


def _quoted(option: str) -> str:
    """Return an option of the user's own for a line of the script, where a blank ends a value."""
    name, _, value = option.partition("=")
    is_plain = shlex.quote(value) == value or value[:1] in ("'", '"')
    return option if not option.startswith("--") or is_plain else f"{name}={shlex.quote(value)}"


def _in_one_line(value: object) -> str:
    """Return text for a comment: what could end its line is shown as an escape."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(value))
