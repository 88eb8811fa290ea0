"""Pretraining of transformers, and read access to runs and datasets from Python:

    import forescale

    run = forescale.open_run("runs/first")          # or "first", under runs/
    run.metrics().plot("tokens", "loss")            # a DataFrame with one row a step
    run.metrics("validation")[["step", "bits_per_byte"]]
    model = run.model()                             # a torch module: fp32, eval mode
    ids = run.tokenizer.encode("def main(").ids
    dataset = forescale.open_dataset("data/books")  # .split("train").num_tokens, .tokenizer

Importing this package is fast: torch is imported with the first model. DataFrames need pandas,
which `pip install "forescale[study]"` brings.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forescale.data.dataset import Dataset
    from forescale.inference.view import RunView

__all__ = ["open_dataset", "open_run"]


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
