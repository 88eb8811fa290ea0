"""The job of a command line that trains: new, or that of the existing run that it names.

Invariant: in the job of an existing run, what the command doesn't set has the value of the run's
frozen config, never a default of today.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from forescale.config.compose import compose
from forescale.config.frozen import thaw
from forescale.config.schema import plain
from forescale.config.train import TrainJob
from forescale.run.directory import Run

J = TypeVar("J", bound=TrainJob)
Sections = Callable[[Path], dict[str, Any]]


def job_of(
    schema: type[J],
    overrides: Sequence[str],
    sections: Sections | None = None,
    notes: list[str] | None = None,
) -> J:
    """Return the job that `key=value` overrides describe. If run.name is one of them and the run
    exists, they are laid over its frozen config, and over what `sections` returns for the
    directory of the run.

    notes: takes a sentence for each thing that the job has from an existing run. Raises ConfigError
    with all problems; and UserError if the frozen config can't be read, or names a class of the
    user's own that this user has named in no command (unless trust=true).
    """
    directories: list[Path] = []

    def frozen(directory: Path) -> dict[str, Any] | None:
        run = Run(directory)
        if not run.config.exists():
            return None
        directories.append(directory)
        config = plain(thaw(TrainJob, run.config, trust=True))
        return config | (sections(directory) if sections else {})

    # What is typed now is trusted now; nothing stored says so.
    job = replace(compose(schema, overrides, find=frozen), trust=False)
    if notes is not None:
        is_named = any(word.startswith("run.name=") for word in overrides)
        for directory in dict.fromkeys(directories):
            is_own = directory == job.run.directory
            if schema.RESUMES and is_named and is_own and not Run(directory).attempts():
                continue  # another verb has just made it
            note = f"precision={job.precision.kind} is that of {directory}, which this command "
            note += "continues."
            if not is_own:
                note = f"The model is that of {directory}, where this run branches off."
            elif is_named:
                note = f"{directory} exists: keys that this command does not set are as in its "
                note += "config.yaml."
            notes.append(note)
    return job
