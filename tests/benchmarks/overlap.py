"""Print the share of a dataset's held-out tokens that lie in n-grams of its training text.

    python tests/benchmarks/overlap.py DATASET [N]

DATASET: a directory that `forescale shards` built, or the embedded corpus, whose directory
`forescale doctor` prints. N: tokens of an n-gram, 50 by default. N-grams lie inside a document.
"""

import sys
from collections.abc import Iterator

import numpy as np

from forescale.data.curate.words import mixed, ngram_hashes
from forescale.data.dataset import Dataset


def documents(dataset: Dataset, split: str) -> Iterator[np.ndarray]:
    """Yield the tokens of each document, hashed, without the end of text."""
    part = dataset.split(split)
    for shard, count in enumerate(part.shard_tokens):
        tokens = mixed(np.asarray(part.read(shard, 0, count)).astype(np.uint64))
        start = 0
        for end in part.document_ends(shard, 0, count).tolist():
            yield tokens[start : end - 1]
            start = end


def overlap(dataset: Dataset, n: int = 50) -> float:
    """Return the share of held-out tokens that lie in an n-gram that the training text has too."""
    trained = np.sort(np.concatenate([ngram_hashes(d, n) for d in documents(dataset, "train")]))
    inside = total = 0
    for tokens in documents(dataset, "validation"):
        hashes = ngram_hashes(tokens, n)
        entry = np.minimum(np.searchsorted(trained, hashes), len(trained) - 1)
        covers = np.zeros(len(tokens) + 1, np.int64)
        place = np.flatnonzero(trained[entry] == hashes)
        np.add.at(covers, place, 1)
        np.add.at(covers, place + n, -1)
        inside += int((np.cumsum(covers)[:-1] > 0).sum())
        total += len(tokens)
    return inside / total


if __name__ == "__main__":
    n = int(sys.argv[2]) if len(sys.argv) > 2 else 50
    share = overlap(Dataset(sys.argv[1]), n)
    print(f"{100 * share:.2f} % of the held-out tokens lie in {n}-grams of the training text")
