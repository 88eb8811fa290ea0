"""The batch script of one run or of an array of runs.

Invariant: the script contains every setting, so a user can read it, change it and submit it by
hand. Every value in it is quoted for the shell; a line for sbatch or a comment holds no character
that could end the line.
"""

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from forescale.ground.errors import UserError
from forescale.run.start import versions
from forescale.slurm.config import SlurmConfig
from forescale.slurm.containers import python_of_host
from forescale.slurm.steps import own_scratch
from forescale.slurm.submission import Submission


@dataclass(frozen=True)
class Order:
    """The runs of one submission. lead: seconds before the time limit at which they save."""

    names: Sequence[str]
    runs: Sequence[Path]
    submissions: Sequence[Submission]
    settings: SlurmConfig
    lead: int
    profile: str = "?"

    @property
    def log(self) -> Path:
        """The log of the batch script; in an array, %a is the number of the task, and the file a
        link to the log beside the task's own run."""
        first = self.submissions[0]
        return first.links / "%a" if len(self.names) > 1 else first.log


def render(order: Order) -> str:
    """Return the script as text. Raises UserError for an option that doesn't fit in one line."""
    names = order.names
    some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return rendered(
        "job.sbatch.j2",
        order.settings,
        title=f"Run {some}",
        profile=order.profile,
        script=order.submissions[0].script,
        options=options(order),
        runs=order.runs,
        jobs=[s.path for s in order.submissions],
    )


def rendered(template: str, settings: SlurmConfig, **values: object) -> str:
    """Return the script that a template of this directory makes of `values` and the settings."""
    room = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    room.filters["comment"] = _in_one_line
    room.filters["quoted"] = lambda text: shlex.quote(str(text))
    return room.get_template(template).render(
        values,
        time=time.strftime("%Y-%m-%d %H:%M:%S"),
        version=versions()["forescale"],
        modules=settings.modules,
        setup=settings.setup,
        scratch=settings.scratch.rstrip("/"),
        own_scratch=own_scratch('"$FORESCALE_SCRATCH"'),
        offline=settings.offline,
        exports=settings.exports,
        interface=settings.interface,
        directory=Path.cwd(),
        python=shlex.join(python_of_host(settings)),
    )


def options(order: Order) -> list[tuple[str, str]]:
    """Return sbatch's options, each with a comment, or "" if it needs none."""
    s, several = order.settings, len(order.names) > 1
    log = order.log
    options: list[tuple[str, str]] = [
        (f"--job-name={shlex.quote(order.names[0] + ('+' if several else ''))}", ""),
        (
            f"--output={escaped(log)}",
            "output of this script; ranks write to attempts/NNNN/rank-N.log",
        ),
        ("--open-mode=append", "a requeued job appends to the same file"),
        (f"--nodes={s.nodes + s.spares}", f"{s.spares} of them to spare" if s.spares else ""),
        (f"--ntasks-per-node={s.ranks_per_node}", "one task per rank"),
    ]
    if s.outlives_nodes:
        options.append(("--no-kill", "the job goes on when it loses a node, with a spare one"))
    if several:
        throttle = f"%{s.at_once}" if s.at_once else ""
        options.append(
            (f"--array=0-{len(order.names) - 1}{throttle}", "one task of the array per run")
        )
    options += resources(s)
    if s.time is not None:
        why = "this many seconds before the limit, ranks save and end"
        options.append((f"--signal=B:USR1@{order.lead}", why))
    if s.after:
        options.append((f"--dependency=afterok:{':'.join(s.after)}", ""))
        options.append(
            ("--kill-on-invalid-dep=yes", "a job that can never start doesn't stay in the queue")
        )
    options.append(("--requeue" if s.requeue else "--no-requeue", ""))
    return in_lines([*options, *((option, "") for option in s.options)])


def resources(s: SlurmConfig) -> list[tuple[str, str]]:
    """Return sbatch's options for what a job gets, for how long, and who hears of its end."""
    options: list[tuple[str, str]] = []
    if s.gres:
        options.append((f"--gres={shlex.quote(s.gres)}", ""))
    if s.gpus_per_node and not s.gpus_of_gres:
        options.append(
            (f"--gpus-per-node={s.gpus_per_node}", "all ranks of a node see all its GPUs")
        )
    for name in ("partition", "account", "qos", "constraint", "reservation", "mem"):
        if (value := getattr(s, name)) is not None:
            options.append((f"--{name}={shlex.quote(value)}", ""))
    if s.cpus_per_task:
        options.append((f"--cpus-per-task={s.cpus_per_task}", ""))
    if s.time is not None:
        options.append((f"--time={_time(s.time.seconds or 0.0)}", ""))
    if s.exclusive:
        options.append(("--exclusive", ""))
    if s.exclude:
        options.append((f"--exclude={shlex.quote(','.join(s.exclude))}", ""))
    if s.mail:
        options.append((f"--mail-user={shlex.quote(s.mail)}", ""))
        options.append(("--mail-type=END,FAIL", "not for each requeue"))
    return options


def in_lines(options: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the options. Raises UserError for one that doesn't fit in one line."""
    for option, _ in options:
        if not option.isprintable():
            problem = "has a line break or another control character, which sbatch can't read"
            todo = "choose another directory or value"
            raise UserError(_in_one_line(option), problem, todo)
    return options


def _in_one_line(value: object) -> str:
    """Return text for a comment: what could end its line is shown as an escape."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(value))


def _time(seconds: float) -> str:
    """Return a time in sbatch's format, days-hours:minutes:seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}-{hours:02d}:{minutes:02d}:{rest:02d}"


def escaped(path: Path) -> str:
    """Return a quoted file name for sbatch, with % escaped in the directory."""
    directory = str(path.parent).replace("%", "%%")
    return shlex.quote(f"{directory}/{path.name}")
