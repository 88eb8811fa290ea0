"""The cache of decoding, with which a model reads each token once.

Invariant: a row that is read in pieces with a cache has the same logits as one that is read whole,
whatever the pieces. Only mixers write to a Memory, each to its own.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Memory:
    """The cache of one layer: tensors by name, whose first dimension is the rows of the batch."""

    def __init__(self) -> None:
        self._states: dict[str, Tensor] = {}
        self._lengths: dict[str, int] = {}
        self.room = 0  # tokens for which the first `extend` makes room

    @property
    def is_empty(self) -> bool:
        """True until the layer has read its first token."""
        return not self._states

    def get(self, name: str) -> Tensor | None:
        """Return a state by its name; None: there is none."""
        return self._states.get(name)

    def __setitem__(self, name: str, state: Tensor) -> None:
        """Replace a state of fixed size, such as a recurrence's."""
        self._states[name] = state

    def extend(self, name: str, new: Tensor) -> Tensor:
        """Append `new`, (B, L, ...), to a state; return all of it, (B, S, ...).

        Beyond `room` the allocation doubles when it is full, so S tokens cost O(S) copies in all.
        """
        before = self._lengths.get(name, 0)
        length = before + new.shape[1]
        held = self._states.get(name)
        if held is None or held.shape[1] < length:
            columns = max(length, 2 * before, self.room)
            room = new.new_empty(new.shape[0], columns, *new.shape[2:])
            if held is not None:
                room[:, :before] = held[:, :before]
            self._states[name] = held = room
        held[:, before:length] = new
        self._lengths[name] = length
        return held[:, :length]

    def keep_last(self, name: str, new: Tensor, count: int) -> Tensor:
        """Append `new`, (B, L, ...), to a state of which the last `count` tokens are kept, as a
        window needs; return the state before, with `new` after it."""
        held = self._states.get(name)
        whole = new if held is None else torch.cat([held, new], 1)
        self._states[name] = whole[:, max(0, whole.shape[1] - count) :].clone()
        return whole

    def keep(self, rows: Tensor) -> None:
        """Keep these rows, (R,) int64, in this order."""
        self._states = {name: state[rows] for name, state in self._states.items()}

    def drop_first(self, count: int) -> None:
        """Drop the first columns of the states that grow."""
        for name, length in self._lengths.items():
            self._states[name] = self._states[name][:, count:]
            self._lengths[name] = length - count

    def join(self, other: "Memory") -> None:
        """Append the rows of another Memory of the same layer. The one with fewer columns gets
        zeros on the left, which must count as padding."""
        for name, state in [*self._states.items()]:
            added, length = other._states[name], None
            if name in self._lengths:
                lengths = self._lengths[name], other._lengths[name]
                state, added = state[:, : lengths[0]], added[:, : lengths[1]]
                length = max(lengths)
            self._states[name] = _joined(state, added, 0 if length is None else self.room)
            if length is not None:
                self._lengths[name] = length

    @property
    def num_bytes(self) -> int:
        """Allocated bytes."""
        return sum(state.nbytes for state in self._states.values())


class Cache:
    """A Memory for each layer, the number of columns read so far, and their padding mask.

    Start with an empty one for a batch of rows, and pass it to each call of the model with the next
    columns. Rows of different lengths are padded on the left. In an encoder-decoder, layers and
    columns are the decoder's; source is the encoder's output, (B, S, D), and source_mask is added
    to the scores of its tokens, (B, 1, 1, S), or None.
    """

    def __init__(
        self, num_layers: int, source: Tensor | None = None, source_mask: Tensor | None = None
    ):
        self.source, self.source_mask = source, source_mask
        self.layers = [Memory() for _ in range(num_layers)]
        self.constants: dict[str, Any] = {}  # computed once from the config
        self.length = 0
        self.real: Tensor | None = None  # (B, length) bool; None: no padding so far
        self.last: Tensor | None = None  # (B, 1) int64, the tokens of the last column

    def advance(self, tokens_BL: Tensor, padding_mask_BL: Tensor | None) -> Tensor | None:
        """Count the new columns; return the mask of all columns, (B, S), or None without
        padding."""
        if padding_mask_BL is not None or self.real is not None:
            device, columns = tokens_BL.device, self.length + tokens_BL.shape[1]
            ones = torch.ones(len(tokens_BL), columns, dtype=torch.bool, device=device)
            old = ones[:, : self.length] if self.real is None else self.real
            new = ones[:, self.length :] if padding_mask_BL is None else padding_mask_BL.bool()
            self.real = torch.cat([old, new], 1)
        self.length += tokens_BL.shape[1]
        self.last = tokens_BL[:, -1:]
        return self.real

    def reserve(self, columns: int) -> None:
        """Reserve room for this many columns in the layers that keep them all."""
        for memory in self.layers:
            memory.room = columns

    def keep(self, rows: Tensor) -> "Cache":
        """Keep these rows, (R,) int64, in this order; return the cache."""
        for memory in self.layers:
            memory.keep(rows)
        self.real = None if self.real is None else self.real[rows]
        self.last = None if self.last is None else self.last[rows]
        self.source = None if self.source is None else self.source[rows]
        self.source_mask = None if self.source_mask is None else self.source_mask[rows]
        return self

    def drop_first(self, count: int) -> None:
        """Drop the first columns, which are padding in all rows."""
        for memory in self.layers:
            memory.drop_first(count)
        self.length -= count
        self.real = None if self.real is None else self.real[:, count:]

    def join(self, other: "Cache", real_BS: Tensor | None) -> None:
        """Append the rows of another cache of the same model. The shorter one, and the shorter
        source, is padded on the left. real: the padding mask of the joined rows."""
        for memory, added in zip(self.layers, other.layers, strict=True):
            memory.join(added)
        self.length, self.real = max(self.length, other.length), real_BS
        if self.last is not None and other.last is not None:
            self.last = torch.cat((self.last, other.last))
        if self.source is not None and other.source is not None:
            masks = [
                source.new_zeros(len(source), 1, 1, source.shape[1]) if mask is None else mask
                for source, mask in ((c.source, c.source_mask) for c in (self, other))
                if source is not None
            ]
            longest = max(mask.shape[-1] for mask in masks)
            padded = [F.pad(m, (longest - m.shape[-1], 0), value=-torch.inf) for m in masks]
            self.source, self.source_mask = _joined(self.source, other.source), torch.cat(padded)

    @property
    def num_bytes(self) -> int:
        """Allocated bytes of all layers and of the source."""
        source = 0 if self.source is None else self.source.nbytes
        return source + sum(memory.num_bytes for memory in self.layers)


def _joined(a: Tensor, b: Tensor, columns: int = 0) -> Tensor:
    """Return the rows of both, (A + B, S or more, ...). The one with fewer columns gets zeros on
    the left. Both have room for `columns`."""
    length = max(a.shape[1], b.shape[1])
    rows = a.new_zeros(len(a) + len(b), max(length, columns), *a.shape[2:])
    rows[: len(a), length - a.shape[1] : length] = a
    rows[len(a) :, length - b.shape[1] : length] = b
    return rows
