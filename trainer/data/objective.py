"""Objectives: how a window becomes inputs and targets, and which positions count as targets.

Invariant: an objective is a pure function of a window and its number, so that every world size,
micro-batch and resume point gives the same tensors; and the number of targets of a window depends
on its length alone, because a step's loss is divided by the targets of all ranks, which each rank
computes without reading their windows.
"""

from typing import Protocol

import numpy as np

IGNORED = -100  # marks positions without a target; the default of torch.nn.functional.cross_entropy


class Objective(Protocol):
    """The interface of an objective. It is created with the keyword arguments of the config; a
    class whose signature has `seed`, `vocab_size` (the tokenizer's) or `sequence_length` gets these
    of the run. For held-out text the seed is 0, so that all runs are scored on the same examples.

    Optional members. padding_mask(sizes): bool of (n, L), False where a row has no token, or None
    if no mask is needed; required if the model sees later tokens. window_length: the tokens of a
    window, less one, if not the run's sequence_length, which is the L of the examples. extra_ids:
    the number of ids in the examples beyond the tokenizer's vocabulary; the model gets embeddings
    for them. split: the number of columns at the start of a row that are its source, which the
    encoder of an encoder-decoder reads (model.encoder_layers); they have no targets. rows: the rows
    that a window becomes, if not 1; examples are then (2, n * rows, L), and the run must combine
    their losses (objective=preferences).
    """

    def num_targets(self, sizes: np.ndarray) -> np.ndarray:
        """Return the number of targets of windows of `sizes` tokens, int64 of the same shape."""

    def examples(self, tokens: np.ndarray, sizes: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Return inputs and targets, int64 of shape (2, n, L).

        tokens: (n, L + 1), of which the first sizes[i] of row i are real; sizes: (n,); numbers:
        (n,), the number of each window in the order of training, from which random choices must be
        drawn (for held-out text, its number in the split). Positions without a target are IGNORED;
        inputs beyond a window's end are 0.
        """


def window_length(objective: Objective, sequence_length: int) -> int:
    """Return the L of the windows of L + 1 tokens that an objective takes."""
    return getattr(objective, "window_length", sequence_length)


def extra_ids(objective: Objective) -> int:
    """Return the number of ids that an objective adds beyond the tokenizer's vocabulary."""
    return getattr(objective, "extra_ids", 0)


def rows_of(objective: Objective) -> int:
    """Return the number of rows that a window becomes."""
    return getattr(objective, "rows", 1)


class NextToken:
    """Predict each next token: every token but a window's first is a target."""

    def num_targets(self, sizes: np.ndarray) -> np.ndarray:
        return np.asarray(sizes, np.int64) - 1

    def examples(self, tokens: np.ndarray, sizes: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        # One allocation: two would be mapped and unmapped again every step, at ten times the cost.
        pair = np.empty((2, len(tokens), tokens.shape[1] - 1), np.int64)
        pair[0], pair[1] = tokens[:, :-1], tokens[:, 1:]
        for i in np.flatnonzero(sizes < tokens.shape[1]).tolist():
            pair[0, i, sizes[i] - 1 :] = 0
            pair[1, i, sizes[i] - 1 :] = IGNORED
        return pair


NEXT_TOKEN = NextToken()


class Draws:
    """The random draws of one window: a pure function of the seed and the window's number.

    They are the bits of Philox (Salmon et al. 2011) with the key (seed, number). numpy promises
    that these never change (unlike the methods of Generator), so every world size, micro-batch,
    resume point and version of numpy draws the same.
    """

    def __init__(self, seed: int, number: int):
        self._bits = np.random.Philox(key=np.array([seed, number], np.uint64))

    def shares(self, count: int) -> np.ndarray:
        """Return `count` numbers from 0 to below 1, float64."""
        return (self._bits.random_raw(count) >> np.uint64(11)) * 2.0**-53

    def below(self, limit: int, count: int) -> np.ndarray:
        """Return `count` integers from 0 to limit - 1, int64; the bias is below limit / 2^64."""
        return (self._bits.random_raw(count) % np.uint64(limit)).astype(np.int64)

    def chosen(self, size: int, count: int) -> np.ndarray:
        """Return `count` different numbers from 0 to size - 1, in random order, int64."""
        return np.argsort(self._bits.random_raw(size), kind="stable")[:count]
