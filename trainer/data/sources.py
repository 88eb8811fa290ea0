"""The datasets that a job reads, opened: one, or several of one tokenizer under a name each.

Invariant: all sources have the same tokenizer, to the byte: an id means the same text in each.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from forescale.data.dataset import Dataset, Split
from forescale.errors import UserError


class Sources:
    """`datasets` by name; what they have in common are attributes here.

    Raises UserError where tokenizers differ.
    """

    def __init__(self, datasets: Mapping[str, Dataset]):
        self.datasets = dict(datasets)
        (_, self.first), *rest = self.datasets.items()
        for name, dataset in rest:
            if _tokenizer(dataset) != _tokenizer(self.first):
                raise UserError(
                    f"data.sources.{name}",
                    f"{dataset.where} has another tokenizer than {self.first.where}",
                    "build both with one: forescale shards ... tokenizer=DIR/tokenizer.json",
                )

    @property
    def names(self) -> list[str]:
        return list(self.datasets)

    @property
    def is_mixture(self) -> bool:
        return len(self.datasets) > 1

    @property
    def vocab_size(self) -> int:
        return self.first.vocab_size

    @property
    def end_of_text(self) -> int:
        """The id that follows every document."""
        return self.first.end_of_text

    @property
    def tokenizer(self) -> Tokenizer:
        return self.first.tokenizer

    @property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of each token id, int64 of shape (vocab_size,); special tokens 0."""
        return self.first.token_bytes

    @property
    def where(self) -> str:
        """Paths, as a message names them."""
        return ", ".join(d.where for d in self.datasets.values())

    @property
    def identity(self) -> str:
        """sha256 over what decides the tokens; of one source its own."""
        return self._joined({name: d.identity for name, d in self.datasets.items()})

    @property
    def corpus_hash(self) -> str:
        return self._joined({name: d.corpus_hash for name, d in self.datasets.items()})

    def _joined(self, hashes: dict[str, str]) -> str:
        if not self.is_mixture:
            return next(iter(hashes.values()))
        return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()

    def split(self, name: str) -> dict[str, Split]:
        """The split of every source."""
        return {source: d.split(name) for source, d in self.datasets.items()}

    def default_weights(self) -> dict[str, float]:
        """Shares by size: training tokens of each source."""
        return {name: split.num_tokens for name, split in self.split("train").items()}

    def describe(self) -> dict[str, Any]:
        """What a run remembers of its data."""
        return {
            name: {
                "path": d.where if "://" in d.where else str(Path(d.where).resolve()),
                "identity": d.identity,
                "corpus_hash": d.corpus_hash,
            }
            for name, d in self.datasets.items()
        }


def _tokenizer(dataset: Dataset) -> tuple[str, int]:
    described = dataset.manifest["tokenizer"]
    return described["sha256"], described["end_of_text"]
