"""`forescale pin`: keep a checkpoint for good, or no longer."""

from pathlib import Path

from forescale.checkpoint.retention import pin
from forescale.cli import overrides_of
from forescale.config.compose import compose
from forescale.errors import DONE
from forescale.run.directory import Run
from forescale.verbs.jobs import PinJob


def main(words: list[str]) -> int:
    job: PinJob = compose("pin", overrides_of("pin", words))
    run = Run.existing(Path(job.target or "").expanduser(), Path(job.run.root).expanduser())
    assert job.step is not None  # PinJob.problems asks for it
    changed = pin(run, job.step, job.off)
    state = "not pinned" if job.off else "pinned"
    print(f"Checkpoint {run.checkpoint_path(job.step)} is {state}{'' if changed else ' already'}.")
    return DONE
