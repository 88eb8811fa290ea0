"""A job's steps on pretended GPUs, rank by rank, beside what its plan says of the same steps.

Invariant: the job that is rehearsed differs from the job as given in the number of micro-batches of
a step alone, and the plan beside it is the plan of the same job.
"""

import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any, cast

from forescale.config.frozen import freeze
from forescale.config.schema import Problem
from forescale.ground.errors import UserError, shortened
from forescale.plan.blocks import bytes_text
from forescale.plan.config import PlanJob
from forescale.plan.gpu import gpu_of
from forescale.plan.plan import Plan
from forescale.rehearsal.config import RehearseJob
from forescale.rehearsal.depth import extended, shallow_depths, with_layers
from forescale.rehearsal.library import library
from forescale.rehearsal.rank import PROGRESS, Request

Say = Callable[[str], None]


@dataclass(frozen=True)
class Rehearsed:
    """What was seen of some ranks. plan: of the job with the micro-batches that were rehearsed;
    accumulation: those of a rank in a step of the job as given; depths: the two numbers of layers
    that were rehearsed in place of all; seconds: that it took."""

    plan: Plan
    accumulation: int
    depths: tuple[int, int] | None
    reports: list[dict[str, Any]]
    seconds: float

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a rank in a rehearsed step."""
        return self.plan.job.accumulation(self.plan.world)

    @property
    def problems(self) -> list[Problem]:
        """What would end the job."""
        return [p for report in self.reports for p in problems_of(report)]


def rehearse(plan: Plan, plan_of: Callable[[PlanJob], Plan], say: Say) -> Rehearsed:
    """Return what the ranks of a plan's job do, of which each is a process of its own.

    plan: of a RehearseJob without problems; plan_of: returns the plan of another. say: receives
    sentences about the progress. Raises UserError if this machine can't pretend a GPU.
    """
    began, whole = time.monotonic(), cast(RehearseJob, plan.job)
    built = library()
    short = shortened_job(whole)
    beside = plan_of(short)
    job = cast(RehearseJob, beside.job)
    gpu = gpu_of(job.machine.name, job.machine.memory_bytes or 0, job.per_node)
    assert gpu is not None
    reads = beside.sources is not None
    depths = shallow_depths(job)
    counts = [each.accumulation(each.world_size) for each in (job, whole)]
    request = Request("", plan.vocab_size, 0, counts[0], reads, str(built), asdict(gpu))
    reports = []
    for rank in job.rehearsed_ranks:
        answers = list[dict[str, Any]]()
        for layers in depths or (None,):
            config = freeze(job if layers is None else with_layers(job, layers))
            answers.append(_report(replace(request, rank=rank, config=config), say))
            if "error" in answers[-1]:
                break
        report = answers[-1]
        if depths is not None and "error" not in report:
            further = cast(int, cast(Any, job.model).num_layers) - depths[1]
            report = extended(answers[0], report, further / (depths[1] - depths[0]))
        reports.append(report)
    return Rehearsed(beside, counts[1], depths, reports, time.monotonic() - began)


def shortened_job(job: RehearseJob) -> RehearseJob:
    """Return a job with fewer micro-batches in a step, and gradients of the same number format. In
    a pipeline so many that its stages are full while gradients are there."""
    groups, stages = job.mesh(job.world_size).data, job.engine.pipeline_parallel
    most = max(job.rehearse.micro_batches, 2 * stages if stages > 1 else 1)
    if job.accumulation(job.world_size) <= most or job.batch_ramp.lengths:
        return job
    batch = most * groups * job.train.micro_batch
    in_fp32 = job.adds_in_fp32(job.world_size)
    train = replace(job.train, global_batch=batch)
    engine = replace(job.engine, gradient_dtype="fp32" if in_fp32 else "precision")
    return replace(job, train=train, engine=engine)


def _report(request: Request, say: Say) -> dict[str, Any]:
    """Return the report of a rank, also of one whose process has died: the others' are not lost."""
    try:
        return _rank(request, say)
    except UserError as e:
        error = {"text": e.problem, "todo": e.todo}
        return {"rank": request.rank, "phase": "rehearsal", "error": error}


def _rank(request: Request, say: Say) -> dict[str, Any]:
    """Return the report that a rank's process writes. Raises UserError if it dies."""
    command = [sys.executable, "-P", "-m", "forescale.rehearsal.rank"]
    last = ""
    # A pipe takes 64 KiB, and is read after standard error.
    with TemporaryDirectory(prefix="forescale-") as folder, TemporaryFile("w+") as answer:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=answer, stderr=subprocess.PIPE, errors="replace"
        )
        assert process.stdin is not None
        assert process.stderr is not None
        try:
            with suppress(BrokenPipeError):  # its end says more
                process.stdin.write(json.dumps(asdict(request) | {"folder": folder}))
                process.stdin.close()
            for line in process.stderr:
                if line.startswith(PROGRESS):
                    say(f"rank {request.rank}: {line.removeprefix(PROGRESS).strip()}")
                elif line.strip():
                    last = line.strip()
            code = process.wait()
        finally:
            process.kill()
            process.wait()  # or it may still write into the folder
        answer.seek(0)
        text = answer.read()
    if code == -signal.SIGKILL:
        size = bytes_text(1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
        problem = f"was killed with {size} of memory, as the system does where none is left"
        todo = "give it more memory, or rehearse on another machine"
        raise UserError(f"rank {request.rank}", problem, todo)
    if code:
        problem = f"its process ended with code {code}: {shortened(last, 200)}"
        raise UserError(f"rank {request.rank}", problem, "mend that, or report it")
    report: dict[str, Any] = json.loads(text)
    return report


def problems_of(report: dict[str, Any]) -> list[Problem]:
    """Return what would end the job at a rank."""
    problems, where = [], f"rank {report['rank']}"
    if error := report.get("error"):
        text = shortened(error["text"], 300)
        if "place" in error:
            text = f"in {report['phase']}, at {error['place']}: {error['kind']}: {text}"
        text += f" ({error['doubt']})" if error.get("doubt") else ""
        todo = error.get("todo", "mend the line; --json has the whole traceback")
        problems.append(Problem(where, text, todo))
    if names := report.get("on_host"):
        text = f"{len(names)} tensors of the model stay on the host, such as {names[0]}"
        problems.append(Problem(where, text, "make them parameters or buffers of the model"))
    return problems
