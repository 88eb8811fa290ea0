"""`forescale submit`: freeze a training job, or evaluations of its checkpoints, or the build of a
dataset, and submit it to SLURM."""

from forescale.config.job import overrides_of
from forescale.ground.errors import DONE, UserError
from forescale.slurm import evaluations
from forescale.slurm.config import SubmitJob
from forescale.slurm.submit import submit
from forescale.verbs import submit_shards
from forescale.verbs.rehearse import problems_of_job

_TODO = "write forescale submit train [RUN] [KEY=VALUE ...], submit eval RUN or submit shards TEXT"

FIRST = ("train", "eval", "shards")

JOB = SubmitJob
JOBS = {"eval": evaluations.EvaluationsJob, "shards": submit_shards.SubmitShardsJob}
EXAMPLES = (
    "submit train big recipe=llama-7b slurm.nodes=8 slurm.gpus_per_node=8",
    "submit train slurm.gpus_per_node=1 --dry-run   (print the script, write nothing)",
    "submit train machine=cpu slurm.partition=cpu slurm.tasks_per_node=4 train.micro_batch=2",
    "submit train slurm.runs=sweep.txt slurm.at_once=4 slurm.gpus_per_node=1   (a line a run)",
    "submit shards web/ output=/data/web slurm.nodes=8 slurm.exclusive=true   (a dataset)",
    "submit eval big steps=[10000,20000]   (checkpoints, also those that are yet to be saved)",
)


def main(arguments: list[str]) -> int:
    """Return 0. Raises ConfigError with all problems of all runs before anything is written."""
    first = arguments[0] if arguments else "train"
    if first == "eval":
        evaluations.submit(arguments[1:])
        return DONE
    if first == "shards":
        submit_shards.submit(arguments[1:])
        return DONE
    if first != "train" and first not in SubmitJob.FLAGS and "=" not in first:
        raise UserError(first, "can't be submitted", _TODO)
    words = arguments[1:] if first == "train" else arguments
    submit(overrides_of(SubmitJob, words), rehearse=problems_of_job)
    return DONE
