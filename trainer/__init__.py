"""Pretraining of transformers from Python:

    import forescale

    run = forescale.train_run("experiment=quick", run={"name": "first"})
    run = forescale.open_run("runs/first")          # or "first", under runs/
    run.metrics().plot("tokens", "loss")            # a DataFrame with one row a step
    run.metrics("validation")[["step", "bits_per_byte"]]
    model = run.model()                             # a torch module: fp32, eval mode
    ids = run.tokenizer.encode("def main(").ids
    run.evaluate()["data"].bits_per_byte            # of its held-out text, or of data=DIR
    dataset = forescale.open_dataset("data/books")  # .split("train").num_tokens, .tokenizer
    for batch in dataset.stream(sequence_length=256, batch=8, epochs=1): ...
    study = forescale.open_study("mine")            # or a table, or runs: "runs/small-*"
    study.predict(flops=1e18).loss

Importing this package is fast: torch is imported with the first model. DataFrames need pandas,
which `pip install "forescale[study]"` brings.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forescale.data.dataset import Dataset
    from forescale.inference.view import RunView
    from forescale.scaling.view import StudyView

__all__ = ["open_dataset", "open_run", "open_study", "train_run"]


# Not `train`: importing forescale.train, a room of this package, would put itself there.
def train_run(*words: str, show: Callable[[str], None] | None = None, **keys: Any) -> "RunView":
    """Train a run to its end, or go on with it, and return it; see resilience/notebook.py.

    Raises UserError for wrong keys, TrainingFailed if the run fails, KeyboardInterrupt when it was
    interrupted and has saved.
    """
    from forescale.inference.view import open_view
    from forescale.resilience import notebook

    return open_view(notebook.train_run(*words, show=show, **keys))


def open_run(path: str | Path, root: str | Path = "runs") -> "RunView":
    """Return the run at `path`, or the run of that name under `root`.

    The path of a checkpoint opens its run with that checkpoint chosen. Raises UserError if there is
    no such run.
    """
    from forescale.inference.view import open_view

    return open_view(path, root)


def open_dataset(path: str | Path) -> "Dataset":
    """Return the dataset that `forescale shards` built in `path`.

    Raises UserError if there is none.
    """
    from forescale.data.dataset import Dataset

    return Dataset(Path(path).expanduser())


def open_study(source: str | Path, **keys: Any) -> "StudyView":
    """Return the planned study of this name, the table of runs in this file, or these runs: what
    `forescale study` reads.

    keys: of `forescale study`, such as columns={"parameters": "Model Size"}. Raises UserError if
    there is nothing.
    """
    from forescale.scaling.view import open_view

    return open_view(source, **keys)
