"""`forescale submit train`: plans a job, freezes it, and puts it into SLURM's queue."""

from forescale.config.compose import overrides_of
from forescale.errors import DONE, UserError
from forescale.slurm.config import SubmitJob
from forescale.slurm.submit import submit

_TODO = "write forescale submit train [RUN] [key=value ...]"


JOB = SubmitJob
EXAMPLES = (
    "submit train big slurm.nodes=8 slurm.gpus_per_node=8 model=llama-7b engine=zero3",
    "submit train big --dry-run   (the script; nothing is written)",
    "submit train machine=cpu slurm.partition=cpu slurm.tasks_per_node=4 slurm.time='2 h'",
    "submit train slurm.runs=sweep.txt slurm.at_once=4   (a line a run, as one array)",
    "submit train big   (the same again goes on where the run was)",
)


def main(words: list[str]) -> int:
    """Returns 0; raises ConfigError with all problems of all runs before anything is written."""
    words = ["submit.dry_run=true" if word == "--dry-run" else word for word in words]
    if words and words[0] != "train" and "=" not in words[0]:
        raise UserError(words[0], "is nothing that can be submitted", _TODO)
    submit(overrides_of(SubmitJob, words[1:] if words[:1] == ["train"] else words))
    return DONE
