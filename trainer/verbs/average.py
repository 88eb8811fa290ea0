"""`forescale average`: make a run of the mean of the weights of a run's checkpoints."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from forescale.config.compose import parse
from forescale.config.job import Problems, RootConfig, RunJob
from forescale.config.schema import key, section
from forescale.config.sections.training import RunConfig
from forescale.ground.console import progress_display
from forescale.ground.document import tell
from forescale.ground.errors import DONE
from forescale.run.directory import Run


@dataclass
class AveragedRunConfig(RootConfig):
    """The new run, and the directory of all runs."""

    name: str | None = None  # name of the new run; null: RUN-average

    def problems(self) -> Problems:
        return [] if self.name is None else RunConfig(self.name).problems()


@dataclass
class AverageJob(RunJob):
    """A run, and which of its checkpoints to average."""

    VERB: ClassVar[str] = "average"
    PRINTS: ClassVar = {"name": str, "path": str, "checkpoint": str, "steps": list[int]}

    # number of newest checkpoints to average; null: five, or all if there are fewer
    last: int | None = key(None, ge=1)
    steps: list[int] = key([])  # average the checkpoints of these steps instead
    # the new run, and the directory of all runs
    run: AveragedRunConfig = section(AveragedRunConfig)

    def problems(self) -> Problems:
        problems = super().problems()
        if self.last is not None and self.steps:
            problems.append(("last", "excludes steps", "write one of them"))
        return problems


JOB = AverageJob
EXAMPLES = (
    "average first   (the newest five checkpoints; the run first-average)",
    "average first last=3 run.name=mean",
    "average first 'steps=[800, 900, 1000]'",
)


def main(arguments: list[str]) -> int:
    """Make the run, and print how to go on from it."""
    job = parse(AverageJob, arguments)
    root = Path(job.run.root).expanduser()
    origin = Run.existing(job.target or "", root)
    run = Run(root / (job.run.name or f"{origin.path.resolve().name}-average"))
    from forescale.checkpoint.average import average, chosen_steps

    steps = chosen_steps(origin, job.last, job.steps)
    with progress_display() as progress:
        averaged = average(origin, steps, run, progress)
    run, steps = averaged.run, averaged.steps
    tell({
        "name": run.name, "path": run.path, "checkpoint": run.checkpoint_path(0),
        "steps": steps, "kept": averaged.copied, "parameters": averaged.parameters,
        "bytes": averaged.bytes,
    })  # fmt: skip
    of = f"the mean of the weights of {origin.path} at steps {', '.join(map(str, steps))}"
    if len(steps) == 1:
        of = f"the weights of {origin.path} at step {steps[0]}"
    note = ""
    if averaged.copied:
        others = f" and {len(averaged.copied) - 1} more" if len(averaged.copied) > 1 else ""
        whole = f"whole numbers ({averaged.copied[0]}{others})"
        note = f"Not averaged, but as at step {steps[-1]}: {whole}.\n"
    print(
        f"The run {run.path} is {of}: {averaged.parameters:,} parameters, "
        f"{averaged.bytes / 2**20:,.1f} MiB.\n{note}\n"
        f"Next:\n"
        f"  forescale eval {run.path}\n"
        f"  forescale generate {run.path} prompt=TEXT\n"
        f"  forescale train run.name=NEW run.from.run={run.path} run.from.load=weights"
    )
    return DONE
