"""`forescale submit shards`: a dataset built on nodes of SLURM, which share its work.

    .NAME.jobs/jobs/0001/    beside the output NAME: script, code and log of a submission

Invariant: the dataset is that of `forescale shards`, byte for byte, on any number of nodes and
after any end of its jobs.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from forescale.config.compose import compose
from forescale.config.job import overrides_of
from forescale.config.schema import ConfigError, Problem, section
from forescale.ground.document import tell
from forescale.ground.errors import UserError
from forescale.run.directory import Run
from forescale.slurm import queue
from forescale.slurm.config import SUBMITTED, SlurmConfig, SubmitConfig
from forescale.slurm.limits import limit_problems
from forescale.slurm.script import Command, CommandArray, submit_arrays
from forescale.slurm.submission import Submission
from forescale.verbs.shards import ShardsJob, are_tokenised, output_of, source_of

# Keys of slurm that say how many ranks of a run there are, or how it starts again.
_OF_RUNS = (
    *("spares", "grow", "tasks_per_node", "runs", "pack"),
    *("requeue", "max_requeues"),
)
# Seconds before the time limit at which processes end; SLURM's signal may come a minute earlier.
_LEAD = 30


@dataclass
class SubmitShardsJob(ShardsJob):
    """Build a dataset on nodes of SLURM, which share its work."""

    VERB: ClassVar[str] = "submit shards"
    FLAGS: ClassVar = {"--dry-run": "submit.dry_run"}
    PRINTS: ClassVar = SUBMITTED

    slurm: SlurmConfig = section(SlurmConfig)  # the nodes, and what each gets of the cluster
    submit: SubmitConfig = section(SubmitConfig)  # how to submit


def submit(arguments: list[str]) -> None:
    """Submit the build that a command line describes; with submit.dry_run, only print the script.
    The tasks of an array share the build as nodes do, whenever each of them starts.

    A job that ends early continues with its finished units when it is submitted again.
    """
    words = overrides_of(SubmitShardsJob, arguments)
    job = compose(SubmitShardsJob, words)
    if are_tokenised(job.input):
        problem = "is tokenised already, and is indexed in place by one process"
        raise UserError(job.input[0], problem, "write forescale shards, without submit")
    typed = {word.split("=")[0] for word in words}
    if wrong := [f"slurm.{name}" for name in _OF_RUNS if f"slurm.{name}" in typed]:
        problem = "is for jobs that train; a node has one task, and the job is always requeued"
        raise ConfigError(Problem(name, problem, "leave it out") for name in wrong)
    output, of_slurm = output_of(job).resolve(), ("slurm", "submit")
    command = [word for word in words if re.split("[.=]", word)[0] not in of_slurm]
    profile = next((w.partition("=")[2] for w in words if w.startswith("slurm=")), "plain")
    jobs = output.with_name(f".{output.name}.jobs")

    size, lead = job.slurm.array or 1, int((job.slurm.lead and job.slurm.lead.seconds) or _LEAD)
    limit = job.slurm.time.seconds if job.slurm.time else None
    if limit and limit <= lead:
        problem = f"{job.slurm.time} is not longer than the {lead} s in which processes end"
        raise ConfigError([Problem("slurm.time", problem, "set a longer time")])

    def array(folder: Path) -> CommandArray:
        names = ["shards"] if size == 1 else [f"shards-{i}" for i in range(size)]
        return CommandArray(
            title=f"Dataset {output}",
            job_name=f"{output.name}-shards",
            commands=[Command(name, ["shards", *command]) for name in names],
            submission=Submission(folder),
            settings=job.slurm,
            profile=profile,
            lead=lead,
        )

    if job.submit.dry_run:
        script = array(jobs / "NNNN").script()
        tell({"scripts": [script]})
        print(script, end="")
        return
    source_of(job)  # what is missing is said now, not in the queue
    job.curate.describe()
    queue.must_be_here()
    if problems := limit_problems(job.slurm):
        raise ConfigError(problems)
    if (largest := queue.largest_array() or size) < size:
        print(f"Note: the cluster allows {largest} tasks of an array (MaxArraySize), not {size}.")
        size = largest
    queue.expect_accepted(array(jobs / "NNNN").script())
    submitted = array(Run(jobs).new_job())
    (id,) = submit_arrays([submitted], job.input, [])
    tell({"jobs": [{"id": id, "path": output}]})
    nodes = "a node" if str(job.slurm.nodes) == "1" else f"{job.slurm.nodes} nodes"
    tasks = f"{size} tasks, each on " if size > 1 else ""
    print(f"Submitted job {id}: {output} on {tasks}{nodes}.")
    print(f"  Script: {submitted.submission.script}")
    print(f"Follow it: forescale status {output}, forescale logs {output}. Stop it: scancel {id}")
    print("If it ends early, the same command continues with what is finished.")
