"""Random draws of a window: a pure function of the seed and the window's number.

Invariant: they come from the bits of Philox (Salmon et al. 2011) with the key (seed, number). numpy
promises that these bits never change (unlike the methods of Generator), so every world size,
micro-batch, resume point and version of numpy draws the same.
"""

import numpy as np


class Draws:
    """The draws of one window, one after another."""

    def __init__(self, seed: int, number: int):
        self._bits = np.random.Philox(key=np.array([seed, number], np.uint64))

    def shares(self, count: int) -> np.ndarray:
        """Return `count` numbers from 0 to below 1, float64."""
        return (self._bits.random_raw(count) >> np.uint64(11)) * 2.0**-53

    def below(self, limit: int, count: int) -> np.ndarray:
        """Return `count` whole numbers from 0 to limit - 1, int64; their bias is below
        limit / 2^64."""
        return (self._bits.random_raw(count) % np.uint64(limit)).astype(np.int64)

    def chosen(self, size: int, count: int) -> np.ndarray:
        """Return `count` different numbers from 0 to size - 1, in random order, int64."""
        return np.argsort(self._bits.random_raw(size), kind="stable")[:count]
