"""`forescale pin`: keep a checkpoint for good, or undo that."""

from dataclasses import dataclass
from typing import ClassVar

from forescale.checkpoint.retention import pin
from forescale.config.compose import parse
from forescale.config.job import Problems, RunJob
from forescale.config.schema import key
from forescale.ground.document import tell
from forescale.ground.errors import DONE
from forescale.run.directory import Run


@dataclass
class PinJob(RunJob):
    VERB: ClassVar[str] = "pin"
    PRINTS: ClassVar = {"checkpoint": str, "pinned": bool, "changed": bool}

    step: int | None = key(None, ge=0)  # step of the checkpoint
    off: bool = False  # unpin: treat it like the others again

    def problems(self) -> Problems:
        problems = super().problems()
        if self.step is None:
            problems.append(
                ("step", "is missing", "write step=500; forescale status lists the checkpoints")
            )
        return problems


JOB = PinJob
EXAMPLES = ("pin first step=500", "pin first step=500 off=true")


def main(words: list[str]) -> int:
    job = parse(PinJob, words)
    run = Run.existing(job.target or "", job.run.root)
    assert job.step is not None  # PinJob.problems asks for it
    changed = pin(run, job.step, job.off)
    checkpoint = run.checkpoint_path(job.step)
    tell({"checkpoint": checkpoint, "pinned": not job.off, "changed": changed})
    state = "not pinned" if job.off else "pinned"
    print(f"Checkpoint {checkpoint} is {state}{'' if changed else ' already'}.")
    return DONE
