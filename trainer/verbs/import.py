"""`forescale import`: make a run directory of a Hugging Face model, or of a GGUF file."""

# ruff: noqa: N999 (the file has the name of its verb)

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from forescale.config.compose import parse
from forescale.config.job import Job, Problems
from forescale.config.schema import section
from forescale.config.sections.training import RunConfig
from forescale.ground.console import progress_display
from forescale.ground.document import tell
from forescale.ground.errors import DONE, UserError
from forescale.run.directory import GGUF, Run

_TODO = "write forescale import hf DIR NAME, or forescale import FILE.gguf NAME"


@dataclass
class ImportedRunConfig:
    """The new run."""

    name: str | None = None  # the run's name; the second word after hf sets it too
    root: str = "runs"  # the directory that holds the runs

    def problems(self) -> Problems:
        if self.name is None:
            return [("name", "is missing", _TODO)]
        return RunConfig(self.name).problems()


@dataclass
class ImportJob(Job):
    """A model, and the run that will hold it."""

    VERB: ClassVar[str] = "import"
    TARGET: ClassVar[str] = "run.name"
    PRINTS: ClassVar = {"name": str, "path": str, "checkpoint": str, "architecture": str}

    # the Hugging Face directory: config.json, model.safetensors (or several with an index) and
    # tokenizer.json; the first word after hf sets it too; or a GGUF file, which is dequantised
    path: str | None = None
    # a tokenizer.json, or a directory with one; null: the one beside the weights
    tokenizer: str | None = None
    # the token that ends a document; null: the one that its files declare, else a common one
    end_of_text: str | None = None
    run: ImportedRunConfig = section(ImportedRunConfig)  # the new run

    def problems(self) -> Problems:
        return [] if self.path else [("path", "is missing", _TODO)]


FIRST = ("hf",)
JOB = ImportJob
EXAMPLES = (
    "import hf Llama-2-7b llama   (the directory Llama-2-7b becomes the run runs/llama)",
    "import Llama-3.2-1B-Q8_0.gguf llama   (pip install 'forescale[gguf]')",
    "import hf gpt2 gpt2 tokenizer=other/tokenizer.json",
    "import hf OLMo-2-1B olmo --json",
)


def main(arguments: list[str]) -> int:
    """Make the run, and print how to go on from it."""
    words = arguments[1:] if arguments[:1] == [*FIRST] else arguments
    is_word = bool(words) and "=" not in words[0] and not words[0].startswith("-")
    if words == arguments and is_word and not words[0].endswith(GGUF):
        raise UserError(words[0], "is no kind of model that can be imported", _TODO)
    if is_word:
        words = [f"path={words[0]}", *words[1:]]
    job = parse(ImportJob, words)
    assert job.path is not None  # ImportJob.problems asks for it
    assert job.run.name is not None
    from forescale.inference.importing import import_hf

    run = Run(Path(job.run.root).expanduser() / job.run.name)
    source = Path(job.path).expanduser()
    with progress_display() as progress:
        imported = import_hf(source, run, job.tokenizer, job.end_of_text, progress)
    tell({
        "name": run.name, "path": run.path, "checkpoint": run.checkpoint_path(0),
        "architecture": imported.architecture, "parameters": imported.parameters,
        "bytes": imported.bytes,
    })  # fmt: skip
    writes, is_scored = imported.reads != "both sides", imported.reads != "source"
    objective = "objective=masked " * (imported.reads == "both sides")
    train = f"train run.name=NEW run.from.run={run.path} run.from.load=weights {objective}"
    train += "data=dataset data.path=DATA"
    left_out = imported.left_out
    lines = [
        f"{imported.architecture} in {source} is the run {run.path} now: {imported.parameters:,} "
        f"parameters, {imported.bytes / 2**20:,.1f} MiB.\n",
        *[f"Left out, as it serves whole sentences: {', '.join(left_out)}.\n"] * bool(left_out),
        f"Next (text becomes data with forescale shards TEXT tokenizer={run.tokenizer}):",
        *[f"  forescale generate {run.path} prompt=TEXT"] * writes,
        *[f"  forescale eval {run.path} data.path=DATA"] * is_scored,
        f"  forescale {train if is_scored else f'finetune {run.path} data=FILE.jsonl'}",
    ]
    print("\n".join(lines))
    return DONE
