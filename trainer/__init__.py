"""From a config to a trained model; and the Python door to what was trained.

    import forescale

    run = trainer.open_run("runs/first")            # or "first", under runs/
    run.metrics().plot("tokens", "loss")            # a DataFrame, a row a step
    run.metrics("validation")[["step", "bits_per_byte"]]
    model = run.model()                             # a torch module: fp32, eval mode
    ids = run.tokenizer.encode("def main(").ids
    dataset = trainer.open_dataset("data/books")    # .split("train").num_tokens, .tokenizer

Importing this imports nothing heavy: torch comes with the first model.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forescale.data.dataset import Dataset
    from forescale.inference.view import RunView

__all__ = ["open_dataset", "open_run"]


def open_run(path: str | Path, root: str | Path = "runs") -> "RunView":
    """The run in the directory `path`, or of that name under `root`; or the run of a checkpoint,
    with that checkpoint chosen. Raises UserError where there is none."""
    from forescale.inference.view import open_view

    return open_view(path, root)


def open_dataset(path: str | Path) -> "Dataset":
    """The dataset that `forescale shards` built in `path`. Raises UserError where there is none."""
    from forescale.data.dataset import Dataset

    return Dataset(Path(path).expanduser())
