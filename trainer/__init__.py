"""Pretraining of transformers from Python:

    import forescale

    forescale.plan("experiment=quick")              # before it costs anything: memory, time
    run = forescale.train("experiment=quick", run={"name": "mine"})
    run = forescale.open_run("runs/mine")           # or "mine", under runs/
    run.metrics().plot("tokens", "loss")            # a DataFrame with one row a step
    run.metrics("validation")[["step", "bits_per_byte"]]
    run.generate("def main(", num_tokens=50)
    model = run.model()                             # a torch module: fp32, eval mode
    ids = run.tokenizer.encode("def main(").ids
    run.evaluate()["data"].bits_per_byte            # of its held-out text, or of data=DIR
    chat = forescale.finetune(run, "questions.jsonl")
    path = forescale.export(chat, dtype="bf16")     # for transformers
    run = forescale.import_hf("SmolLM2-135M", "smol")
    dataset = forescale.open_dataset("data/books")  # .split("train").num_tokens, .tokenizer
    for batch in dataset.stream(sequence_length=256, batch=8, epochs=1): ...
    study = forescale.open_study("mine")            # or a table, or runs: "runs/small-*"
    study.predict(flops=1e18).loss

Functions with the name of a verb are its command: `words` are those of the command line, such as
"experiment=quick" or "train.tokens=5e6"; `keys` are the same as values and dicts, such as
train={"tokens": 5e6}; `show` is called with each line that the command prints for people, which are
printed by default. They raise UserError for what the user can correct, CommandFailed if the command
fails, and KeyboardInterrupt after an interrupt; the same call then goes on.

Importing this package is fast: torch is imported with the first model. DataFrames need pandas,
which `pip install "forescale[study]"` brings.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from forescale.ground.errors import CommandFailed, UserError

if TYPE_CHECKING:
    from forescale.data.dataset import Dataset
    from forescale.inference.view import RunView
    from forescale.plan.view import PlanView
    from forescale.resilience.notebook import CommandResult
    from forescale.scaling.view import StudyView

__all__ = [
    "CommandFailed",
    "UserError",
    "export",
    "finetune",
    "import_hf",
    "open_dataset",
    "open_run",
    "open_study",
    "plan",
    "train",
]

Show: TypeAlias = Callable[[str], object] | None
AnyPath: TypeAlias = str | PathLike[str]  # of files, and of runs: a RunView too


def train(*words: str, show: Show = None, **keys: Any) -> "RunView":
    """Train a run to its end, or go on with it, and return it.

    train("experiment=quick", run={"name": "first"}, train={"tokens": 5e6})

    In a notebook the loss is drawn meanwhile, unless `show` is given. An interrupt saves the run.
    model=Model trains a class of your own, also one that a cell defines; so do optimizer=Mine,
    objective=Mine and callbacks=[Mine].
    """
    return _trained(_call("train", {}, words, keys, show))


def finetune(
    run_: AnyPath, data: AnyPath, /, *words: str, show: Show = None, **keys: Any
) -> "RunView":
    """Teach a run, a checkpoint or a Hugging Face directory from the examples in a file, and return
    the new run; or go on with it.

    finetune("first", "questions.jsonl", epochs=2, lora={"rank": 16}, run={"name": "chat"})
    """
    named = {"run.from.run": run_, "data": data}
    return _trained(_call("finetune", named, words, keys, show))


def plan(*words: str, show: Show = None, **keys: Any) -> "PlanView":
    """Return what a training job needs and costs. Its `problems`, of a job that can't work as it
    is, are empty if it can; wrong keys raise UserError.

    plan("recipe=llama-1b", plan={"gpus": 8})["seconds"]
    """
    from forescale.plan.view import PlanView

    ended = _call("plan", {}, words, keys, show)
    return PlanView(ended.facts if "options" in ended.facts else ended.result())


def export(
    run_: AnyPath,
    /,
    *words: str,
    to: AnyPath | None = None,
    step: int | None = None,
    format: Literal["transformers", "gguf"] = "transformers",
    dtype: Literal["fp32", "bf16", "fp16", "q8_0"] = "fp32",
    adapter: bool = False,
    show: Show = None,
    **keys: Any,
) -> Path:
    """Write a checkpoint as a Hugging Face transformers model, and return its directory; or as a
    file for llama.cpp, and return it.

    export("first", to="exports/first", dtype="bf16")

    step: of the checkpoint; None: the newest. to: a directory or, with format="gguf", a file; None:
    exports/RUN-STEP or exports/RUN-STEP.gguf. dtype: "q8_0" only with format="gguf". adapter: write
    only the adapters of a LoRA run. Further keys, for the model card: licence="apache-2.0",
    scores=["scores.jsonl"].
    """
    named = {"target": run_, "to": to, "step": step, "format": format, "dtype": dtype}
    named["adapter"] = adapter
    return Path(_call("export", named, words, keys, show).result()["path"])


def import_hf(
    path: AnyPath,
    name: str,
    /,
    *words: str,
    tokenizer: AnyPath | None = None,
    show: Show = None,
    **keys: Any,
) -> "RunView":
    """Make a run of a Hugging Face directory or a GGUF file, for others to begin with; return it.

    import_hf("Llama-3.2-1B", "llama")

    name: of the run. tokenizer: a tokenizer.json; None: the one beside the weights.
    """
    named = {"path": path, "run.name": name, "tokenizer": tokenizer}
    return open_run(_call("import", named, words, keys, show).result()["path"])


def open_run(path: AnyPath, root: AnyPath = "runs") -> "RunView":
    """Return the run at `path`, or the run of that name under `root`.

    The path of a checkpoint opens its run with that checkpoint chosen. Raises UserError if there is
    no such run.
    """
    from forescale.inference.view import open_view

    return open_view(path, root)


def open_dataset(path: AnyPath) -> "Dataset":
    """Return the dataset that `forescale shards` built in `path`.

    Raises UserError if there is none.
    """
    from forescale.data.dataset import Dataset
    from forescale.ground.storage import path_of

    return Dataset(path_of(path))


def open_study(source: AnyPath, **keys: Any) -> "StudyView":
    """Return the planned study of this name, the table of runs in this file, or these runs: what
    `forescale study` reads.

    keys: of `forescale study`, such as columns={"parameters": "Model Size"}. Raises UserError if
    there is nothing.
    """
    from forescale.ground.storage import path_of
    from forescale.scaling.view import open_view

    path_of(source)  # expect one
    return open_view(fspath(source), **keys)


def _call(
    verb: str,
    named: Mapping[str, Any],
    words: Sequence[str],
    keys: Mapping[str, Any],
    show: Show,
) -> "CommandResult":
    """Run a verb; see resilience/notebook.py."""
    from forescale.monitor.live_loss import LiveLoss
    from forescale.resilience.notebook import arguments, call
    from forescale.verbs import load

    if show is not None and not callable(show):
        raise UserError("show", f"{show!r} is no function", "give one that takes a line of text")
    command = arguments(load(verb).JOB, named, words, keys)
    if show is None:
        return call(verb, command, lambda line: print(line, end="", flush=True), LiveLoss())
    return call(verb, command, show)


def _trained(ended: "CommandResult") -> "RunView":
    return open_run(ended.result()["path"])


class _Package(ModuleType):
    """This package, in which `train` and `plan` are functions, also once the rooms of these names
    are imported: `from forescale.plan.plan import Plan` needs no attribute."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return [*__all__, *(name for name in self.__dict__ if name.startswith("__"))]


sys.modules[__name__].__class__ = _Package
