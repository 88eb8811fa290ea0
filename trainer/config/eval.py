"""The keys of `forescale eval`: what is scored, and on which windows.

Invariant: what decides a score is a key of ScoreJob, so that a job of SLURM scores as a command by
hand does.
"""

# ruff: noqa: RUF009 (key and section make fields, as dataclasses.field does)

from dataclasses import dataclass
from typing import ClassVar, Literal

from forescale.config.job import RunJob
from forescale.config.schema import key, section
from forescale.config.sections.data import CorpusConfig


@dataclass
class ScoreJob(RunJob):
    """A run and the windows to score it on."""

    target: str | None = key(None, "a run (its name or its directory) or a checkpoint")
    split: Literal["train", "validation"] = key("validation", "part of the dataset")
    windows: int | None = key(
        None, "number of windows, evenly spread over the split; null: all", ge=1
    )
    sequence_length: int | None = key(
        None, "tokens in a window, and a table of loss by position; null: as in training", ge=1
    )
    rope_scaling: Literal["ntk", "yarn"] | None = key(
        None, "scale rotary positions to sequence_length; null: as in training"
    )
    micro_batch: int = key(8, "windows in one forward pass", ge=1)
    trust: bool = key(False, "allow running the model class (_target_) that the run's config names")
    data: CorpusConfig = section(
        CorpusConfig, "the dataset to score on; null: the datasets of the run"
    )


@dataclass
class EvalJob(ScoreJob):
    """The same of one checkpoint."""

    VERB: ClassVar[str] = "eval"

    step: int | None = key(None, "the checkpoint of this step; null: the newest", ge=0)
