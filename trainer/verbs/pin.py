"""`forescale pin`: keep a checkpoint for good, or no longer."""

from pathlib import Path

from trainer.cli import overrides_of
from trainer.compose import compose
from trainer.errors import DONE
from trainer.jobs import PinJob
from trainer.retention import pin
from trainer.run import Run


def main(words: list[str]) -> int:
    job: PinJob = compose("pin", overrides_of("pin", words))
    run = Run.existing(Path(job.target or "").expanduser(), Path(job.run.root).expanduser())
    assert job.step is not None  # PinJob.problems asks for it
    changed = pin(run, job.step, job.off)
    state = "not pinned" if job.off else "pinned"
    print(f"Checkpoint {run.checkpoint_path(job.step)} is {state}{'' if changed else ' already'}.")
    return DONE
