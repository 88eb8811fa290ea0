"""The registry of verbs. The code of each verb is one file.

A verb NAME is a line of VERBS and the file verbs/NAME.py, which defines

    JOB       a dataclass derived from config.job.Job: VERB is the verb's name, the fields are its
              keys, with their defaults, help and rules; PRINTS: what it tells programs
    EXAMPLES  command lines without the word forescale, for --help
    FIRST     optional: words that the first argument may be, such as `train` in `submit train`
    JOBS      optional: by such a word, the job with its keys, where that isn't JOB
    main      takes the arguments after the verb, prints, and returns the exit code

The command line, `--help` and shell completion read nothing else, and a test compares the README's
table with it. Invariant: a verb's file is thin (it reads its job, calls the rooms that
tests/test_walls.py allows, prints), and no verb imports another.
"""

import importlib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from types import ModuleType
from typing import Protocol, cast

from forescale.config.job import Job
from forescale.config.suggest import nearest_first
from forescale.ground.errors import UserError

VERBS = {
    "train": "Train a model. Without any key: a small one on Python source, in minutes.",
    "finetune": "Teach a run from prompts and responses, or preferences; all weights or LoRA.",
    "plan": "Check a training job before the queue: problems, memory, traffic, hours, price.",
    "rehearse": "Make a job's own steps on pretended GPUs: crashes, memory, waits, kernels.",
    "submit": "Submit to SLURM: a job that trains until its run is complete, evaluations, or a "
    "dataset's build.",
    "status": "Show the state, the progress and the time use of runs.",
    "report": "Draw the curves of runs, and all about them, as one HTML file; or the loss as SVG.",
    "logs": "Follow the output of a run's ranks; of a failed run, the rank that failed first.",
    "stop": "Let a run save and end, wherever it runs; SLURM does not start it again.",
    "generate": "Write text with a trained model, or chat with it.",
    "serve": "Serve a trained model: a page to chat with it, and OpenAI's API.",
    "eval": "Score a trained model: loss on held-out text, tasks of lm-evaluation-harness.",
    "inspect": "Draw what a model does while it reads a text: attention, layers, ablations.",
    "export": "Write a checkpoint as a Hugging Face transformers model.",
    "import": "Make a run of a Hugging Face transformers model, for others to begin with.",
    "average": "Average the weights of a run's checkpoints, as a new run.",
    "shards": "Turn your own text into tokenised, checksummed webdataset shards.",
    "check": "Verify a dataset, a checkpoint or a run, byte for byte.",
    "pin": "Keep a checkpoint for good; nothing deletes it.",
    "prune": "List the checkpoints that are no longer needed, and delete them.",
    "study": "Plan runs, launch them, fit a scaling law, predict a larger run, score predictions.",
    "try": "Is a change better than the base? Pairs of runs, and a test that luck rarely fools.",
    "doctor": "Show what this machine offers for training, and how to fix what is missing.",
    "drill": "Inject faults into a tiny run, and show what it survives and at what cost.",
    "help": "Show a page of the manual, offline, or the list of its pages.",
    "schema": "Print JSON Schema of all verbs: their keys, and what they print with --json.",
    "completion": "Print the shell completion script for bash, zsh or fish.",
}

# What other programs call it: the words, and what to type here.
SYNONYMS = {
    "run launch pretrain": "train",
    "resume continue": "train RUN",
    "sft dpo lora tune": "finetune RUN data=FILE.jsonl",
    "chat talk": "generate RUN --chat --interactive",
    "complete infer sample": "generate RUN",
    "score test": "eval RUN",
    "prepare tokenize preprocess data": "shards TEXT",
    "convert save": "export RUN",
    "kill cancel": "stop RUN",
    "list ls monitor top": "status",
    "show plot": "report RUN",
    "delete rm clean": "prune",
    "estimate cost price": "plan",
    "simulate": "rehearse",
    "ablate ab": "try NAME",
    "fit predict forecast sweep": "study --help",
    "verify validate": "check",
    "version": "-V",
}


def schema_of(verb: "Verb", words: Sequence[str]) -> type[Job]:
    """Return the job of a verb that is followed by `words`: their first one may have its own."""
    jobs: Mapping[str, type[Job]] = getattr(verb, "JOBS", {})
    return jobs.get(words[0] if words else "", verb.JOB)


def help_page(name: str, words: Sequence[str], section: str = "") -> str:
    """Return the page of `forescale NAME WORDS --help SECTION`. Raises UserError."""
    from forescale.config.help import explain

    verb, first = load(name), words[0] if words else ""
    schema = schema_of(verb, words)
    known = [*schema.ACTIONS, *getattr(verb, "FIRST", ())]
    takes_any = not known or "=" in first or (schema.TARGET == "input" and not schema.ACTIONS)
    if first and not takes_any and first not in known and not first.startswith("-"):
        near = nearest_first(first, known)[0]
        todo = f"did you mean forescale {name} {near}?"
        raise UserError(first, f"is not what forescale {name} takes first", todo)
    purpose = VERBS[name] if schema is verb.JOB else str(schema.__doc__)
    examples = [line for line in verb.EXAMPLES if line.startswith(schema.VERB)]
    return explain(schema, purpose, examples, action=first, section=section)


class Verb(Protocol):
    """What the file of a verb defines."""

    JOB: type[Job]
    EXAMPLES: Sequence[str]

    def main(self, arguments: list[str], /) -> int:
        """Run the verb with these arguments and return the exit code."""


def load(name: str) -> Verb:
    """Return the imported file of a verb. Raises UserError if there is no verb of this name."""
    if name not in VERBS:
        near = [typed for words, typed in SYNONYMS.items() if name in words.split()]
        near = near or get_close_matches(name, VERBS, 1)
        todo = f"did you mean forescale {near[0]}?" if near else "forescale --help lists them all"
        raise UserError(name, "no such verb", todo)
    module: ModuleType = importlib.import_module(f"{__name__}.{name}")
    return cast(Verb, module)
