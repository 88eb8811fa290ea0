"""The batch script of one run, or of an array of runs, from its profile.

Invariant: all that was decided stands in the script in plain words, so that a user can read it,
change it and submit it by hand; no value reaches the shell unquoted.
"""

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from forescale.run.start import versions
from forescale.slurm.config import SlurmConfig
from forescale.slurm.submission import Submission


@dataclass(frozen=True)
class Order:
    """What is submitted together. lead: seconds before the limit at which the job is told."""

    names: Sequence[str]
    runs: Sequence[Path]
    submissions: Sequence[Submission]
    settings: SlurmConfig
    lead: int
    profile: str = "?"

    @property
    def log(self) -> Path:
        """Of the batch scripts; those of an array lie together, %a is the task's number."""
        name = "slurm-%a.log" if len(self.names) > 1 else "slurm.log"
        return self.submissions[0].path / name


def render(order: Order) -> str:
    """The script as text."""
    room = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    room.filters["quoted"] = lambda text: shlex.quote(str(text))
    names, settings = order.names, order.settings
    some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return room.get_template("job.sbatch.j2").render(
        title=f"Run {some}, of {time.strftime('%Y-%m-%d %H:%M:%S')}.",
        version=versions()["forescale"],
        profile=order.profile,
        script=order.submissions[0].script,
        options=options(order),
        runs=order.runs,
        jobs=[s.path for s in order.submissions],
        modules=settings.modules,
        setup=settings.setup,
        scratch=settings.scratch.rstrip("/"),
        offline=settings.offline,
        exports=settings.exports,
        interface=settings.interface,
        directory=Path.cwd(),
        # Outside of the container there is the Python that submits.
        python=sys.executable if settings.container else settings.python or sys.executable,
    )


def options(order: Order) -> list[tuple[str, str]]:
    """sbatch's options, each with why it is there where that isn't plain."""
    s, several = order.settings, len(order.names) > 1
    log = order.log
    found: list[tuple[str, str]] = [
        (f"--job-name={shlex.quote(order.names[0] + ('+' if several else ''))}", ""),
        (f"--output={_escaped(log)}", "of this script; ranks write to attempts/NNNN/rank-N.log"),
        ("--open-mode=append", "a requeued job goes on in the same file"),
        (f"--nodes={s.nodes}", ""),
        (f"--ntasks-per-node={s.ranks_per_node}", "one rank a task"),
    ]
    if several:
        throttle = f"%{s.at_once}" if s.at_once else ""
        found.append((f"--array=0-{len(order.names) - 1}{throttle}", "one run a task of the array"))
    if s.gres:
        found.append((f"--gres={s.gres}", ""))
    elif s.gpus_per_node:
        found.append((f"--gpus-per-node={s.gpus_per_node}", "all ranks of a node see all its GPUs"))
    for name in ("partition", "account", "qos", "constraint", "reservation", "mem"):
        if (value := getattr(s, name)) is not None:
            found.append((f"--{name}={shlex.quote(value)}", ""))
    if s.cpus_per_task:
        found.append((f"--cpus-per-task={s.cpus_per_task}", ""))
    if s.time is not None:
        found.append((f"--time={_time(s.time.seconds or 0.0)}", ""))
        why = "so long before the limit, ranks are told to save"
        found.append((f"--signal=B:USR1@{order.lead}", why))
    if s.exclusive:
        found.append(("--exclusive", ""))
    if s.exclude:
        found.append((f"--exclude={','.join(s.exclude)}", ""))
    if s.after:
        found.append((f"--dependency=afterok:{':'.join(s.after)}", ""))
        found.append(("--kill-on-invalid-dep=yes", "what can never start doesn't wait for ever"))
    found.append(("--requeue" if s.requeue else "--no-requeue", ""))
    return found + [(option, "") for option in s.options]


def _time(seconds: float) -> str:
    """As sbatch writes it: days-hours:minutes:seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}-{hours:02d}:{minutes:02d}:{rest:02d}"


def _escaped(path: Path) -> str:
    """A file name for sbatch, which takes % for its own, but for the %a of an array."""
    directory = str(path.parent).replace("%", "%%")
    return shlex.quote(f"{directory}/{path.name}")
