"""`forescale plan`: print what a training job needs and costs; as text, JSON or an HTML page."""

from forescale.checkpoint.choice import newest_step
from forescale.config.job import overrides_of
from forescale.config.schema import ConfigError
from forescale.ground.document import is_json, tell
from forescale.ground.errors import DONE
from forescale.ground.storage import write_output
from forescale.plan.config import PlanJob, page_path
from forescale.plan.plan import Plan
from forescale.plan.rows import as_json, page, show
from forescale.run.command import job_of
from forescale.run.directory import Run
from forescale.run.start import check_changes, expect_trainable

JOB = PlanJob
EXAMPLES = (
    "plan recipe=llama-1b data=dataset data.path=/data/books plan.gpus=8",
    "plan model=llama-7b engine=zero3 plan.gpus=64 train.global_batch=1024   (all keys of train)",
    "plan machine=a100-80g plan.nodes=4 model=llama-1b train.global_batch=256 "
    "data=dataset data.path=/data/books",
    "plan plan.from_run=first plan.gpu_hour=2.5   (the measured speed of a run)",
    "plan model=llama-7b plan.gpus=64 train.global_batch=512 plan.deepspeed=true --json",
)


def main(words: list[str]) -> int:
    """Print the plan and return 0.

    Raises ConfigError (exit code 2) with all problems, after the page.
    """
    overrides = overrides_of(PlanJob, words)
    notes: list[str] = []
    job = job_of(PlanJob, overrides, notes=notes)
    is_named = any(word.startswith("run.name=") for word in overrides)
    if is_named:
        expect_trainable(Run(job.run.directory))
    to = page_path(job)
    plan = Plan(job, newest_step)
    plan.notes[:0] = notes
    if is_named:
        plan.check(lambda: check_changes(plan.job.training))
    if is_json():
        tell(as_json(plan))
    else:
        show(plan)
    if to is not None:
        write_output(to, page(plan, ["forescale", "plan", *words]).encode())
    if plan.problems:
        raise ConfigError(plan.problems)
    return DONE
