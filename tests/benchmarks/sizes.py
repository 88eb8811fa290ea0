"""How much a benchmark that trains does: the default job in turns of some steps, or a toy.

Every benchmark module has its record of sizes, REAL and TOY, and `measure(rounds, sizes)`. A toy
shows in seconds that a benchmark runs; its numbers mean nothing.
"""

from dataclasses import dataclass
from pathlib import Path

_TOY_MODEL = ("model.num_layers=1", "model.width=32", "model.num_heads=2")
_TOY_BATCH = ("train.sequence_length=32", "train.global_batch=4", "train.micro_batch=4")


@dataclass(frozen=True)
class TrainingSizes:
    """steps: a turn. overrides: of the default job. makes_data: train on a tiny dataset, made where
    the job is, instead of the job's own."""

    steps: int = 10
    overrides: tuple[str, ...] = ()
    makes_data: bool = False

    def words(self, folder: Path) -> list[str]:
        """Return the words of a job in `folder`; makes its dataset there if it has none."""
        words = [f"run.root={folder}", *self.overrides]
        if self.makes_data:
            from tests.trainer.small_run import make_dataset

            data = folder / "data"
            if not data.exists():
                make_dataset(data)
            words += ["data=dataset", f"data.path={data}"]
        return words


TOY_TRAINING = TrainingSizes(1, (*_TOY_MODEL, *_TOY_BATCH, "train.compile=off"), makes_data=True)
TOY_COMPILED = TrainingSizes(1, (*_TOY_MODEL, *_TOY_BATCH), makes_data=True)
