"""The reference of a run of preferences: minus the log-probability of each response, computed once
with the weights that the run begins with (train/preferences.py).

    references.json    made: the data, columns and checkpoint that they were computed from;
                       values: split -> source -> the preferences in the order of the split,
                       float32 of (n, 2), base64

So training holds no second model, and needs the origin no more.
Invariant: the file is written whole, with its checksum, before the first step, and never changed
after it.
"""

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np

from forescale.config.train import TrainJob
from forescale.data.dataset import Sources
from forescale.ground.storage import read_typed, write_checked_json
from forescale.run.directory import Run
from forescale.run.stored import StoredReferences

_DTYPE = np.dtype("<f4")


@dataclass(frozen=True)
class References:
    """Nats of each preference's chosen and rejected response: for each split and source float32 of
    shape (preferences, 2). source: the data, columns and checkpoint that they were computed
    from."""

    source: dict[str, Any]
    values: dict[str, dict[str, np.ndarray]]

    def of(self, identity: str, split: str) -> np.ndarray | None:
        """Return the nats of the dataset with an identity; None if it isn't one of the run's."""
        for name, known in self.source["data"].items():
            if known == identity and name in self.values.get(split, {}):
                return self.values[split][name]
        return None

    def write(self, run: Run) -> None:
        encoded: dict[str, dict[str, str]] = {}
        for split, sources in self.values.items():
            raw = {n: np.ascontiguousarray(array, _DTYPE).tobytes() for n, array in sources.items()}
            encoded[split] = {n: base64.b64encode(data).decode() for n, data in raw.items()}
        write_checked_json(run.references, {"made": self.source, "values": encoded})

    @classmethod
    def from_stored(cls, stored: dict[str, Any]) -> "References":
        """Return the references in the JSON that `stored_references` returns."""
        values: dict[str, dict[str, np.ndarray]] = {}
        for split, sources in stored["values"].items():
            raw = {name: base64.b64decode(text, validate=True) for name, text in sources.items()}
            values[split] = {n: np.frombuffer(b, _DTYPE).reshape(-1, 2) for n, b in raw.items()}
        return cls(stored["made"], values)


def stored_references(run: Run) -> dict[str, Any] | None:
    """Return the JSON of a run's references.json, which rank 0 can send to the others; None if
    there is none. Raises UserError if it is damaged."""
    path = run.references
    return {**read_typed(StoredReferences, path)} if path.is_file() else None


def read_references(run: Run) -> References | None:
    """Return the references of a run; None if they are not computed yet. Errors as above."""
    stored = stored_references(run)
    return None if stored is None else References.from_stored(stored)


def identities(sources: Sources) -> dict[str, str]:
    """Return the identity of each source, which references record."""
    return {name: dataset.identity for name, dataset in sources.datasets.items()}


def misfit(source: dict[str, Any], job: TrainJob, sources: Sources) -> str | None:
    """Return why references with this source are not those of a job, as the rest of a sentence;
    None if they are."""
    old, new = source["data"], identities(sources)
    if sorted(old.values()) != sorted(new.values()):
        return f"is of other data than {sources.where}"
    if old != new:
        return f"is of data.sources {', '.join(old)}, and this job names the same {', '.join(new)}"
    columns, length = source["columns"], job.train.sequence_length
    if columns != length:
        return f"is of rows of {columns:,} columns, and train.sequence_length is {length:,}"
    return None
