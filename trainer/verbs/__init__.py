"""The verbs: one file each, and their registry.

A verb NAME is a line of VERBS and the file verbs/NAME.py, which holds

    JOB       a dataclass over config.job.Job: the verb's keys, their defaults, help and rules
    EXAMPLES  command lines without the word forescale, for --help
    main      takes the words after the verb, prints, and returns the exit code

The command line, `--help`, shell completion and the README's table read this and nothing else.
Invariant: a verb file is thin (it reads its job, calls the rooms, prints), and no verb imports
another.
"""

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Protocol, cast

from forescale.config.job import Job
from forescale.config.suggest import nearest_first
from forescale.errors import UserError

VERBS = {
    "train": "Train a model; without any key a small one on Python source, in minutes.",
    "plan": "Check a training job before the queue: problems, memory, traffic, hours, price.",
    "submit": "Put a training job into the queue of a SLURM cluster; it requeues itself.",
    "status": "Show what runs are doing, what they have reached and where their time went.",
    "logs": "Follow what the ranks of a run print; of a failed run, the rank that failed first.",
    "stop": "Have a run save and end, wherever it runs; the queue doesn't start it again.",
    "generate": "Let a trained model write text.",
    "eval": "Score a trained model on held-out text: loss, perplexity, bits per byte.",
    "export": "Write a model as Hugging Face transformers reads it.",
    "shards": "Turn your own text into tokenised, checksummed webdataset shards.",
    "check": "Verify a dataset, a checkpoint or a run, byte for byte.",
    "pin": "Keep a checkpoint for good, whatever else is deleted.",
    "prune": "Delete the checkpoints that need not stay; first show them.",
    "study": "Plan runs, launch them, fit a scaling law, predict a bigger run, score predictions.",
    "doctor": "Show what this machine has for training, and how to mend what it lacks.",
    "drill": "Inject faults into a tiny run, and show what it survives and what that costs.",
}


class Verb(Protocol):
    """What a verb's file holds."""

    JOB: type[Job]
    EXAMPLES: Sequence[str]

    def main(self, words: list[str]) -> int: ...


def load(name: str) -> Verb:
    """The file of a verb, imported. Raises UserError for a name that is none, with the nearest."""
    if name not in VERBS:
        near = nearest_first(name, VERBS)[0]
        raise UserError(name, "no such verb", f"the nearest is `forescale {near}`; see --help")
    module: ModuleType = importlib.import_module(f"{__name__}.{name}")
    return cast(Verb, module)
