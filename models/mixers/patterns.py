"""Which keys the mixers `window` and `block_sparse` let a query see, and how their plain form reads
them in blocks. Imports no torch: the costs of a mixer read this file too.

Queries are cut into blocks of C. A block reads its own keys, `left` keys before them, which are one
stretch, and `extra` keys from elsewhere: the first of the document, or blocks far before. Some of
what it reads a query may not see: a mask hides that. Invariant: who sees whom depends on positions
within the document alone, so a document has the same outputs wherever it stands in a row.
"""

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Layout:
    """How a block form reads keys: `num_blocks` blocks of `size` queries, each of which reads the
    block's own keys, `left` keys before them and `extra` keys from elsewhere."""

    num_blocks: int
    size: int
    left: int
    extra: int

    @property
    def reads(self) -> int:
        """Keys that one block reads; each of its queries is multiplied by all of them."""
        return self.extra + self.left + self.size


@dataclass(frozen=True)
class Stretch:
    """A query sees the last `tokens` tokens, itself included (Mistral 7B: Jiang et al. 2023, arXiv
    2310.06825; Child et al. 2019), and the first `first` of its document (Longformer's global
    tokens: Beltagy et al. 2020, arXiv 2004.05150; attention sinks: Xiao et al. 2023, arXiv
    2309.17453), though these see no later token, as the model is causal.
    """

    tokens: int
    first: int = 0

    def layout(self, length: int, columns: int | None = None, aligned: bool = True) -> Layout:
        """Return how `length` queries are read, the last of `columns` (None: there are no others).

        Blocks have from 16 to 128 queries: with C queries a block reads C + window - 1 keys. With
        global tokens they have up to 512, because keys from elsewhere are copied together with the
        block's own.
        """
        size = min(length, max(16, min(self.tokens, 512 if self.first else 128)))
        blocks = -(-length // size)
        before = (columns or length) - length + (blocks - 1) * size
        left = min(self.tokens - 1, before)
        return Layout(blocks, size, left, self.first if left < before else 0)

    def pairs(self, length: int) -> int:
        """Return how many pairs of query and key see each other in a document of `length`."""
        near = sum_to(min(length, self.tokens)) + max(0, length - self.tokens) * self.tokens
        # Query t sees min(first, t + 1 - tokens) keys that are no longer in its window.
        outside = max(0, length - self.tokens)
        rising = min(outside, self.first)
        return near + sum_to(rising) + (outside - rising) * self.first


@dataclass(frozen=True)
class Sparse:
    """Blocks of `size` tokens see whole blocks, up to the query itself. Block b sees block j of:

    `strided`: the last `local` blocks, and each `local`-th before them (Child et al. 2019, arXiv
    1904.10509, section 4.3, at the level of blocks, both parts in each head).
    `fixed`: the blocks of its own stretch of `local` blocks, and the last of each earlier stretch
    (the same section, with c one block).
    `bigbird`: the last `local` blocks, the first `anchors` of the document, and `random` others
    (Zaheer et al. 2020, arXiv 2007.14062, section 2), drawn by a fixed function of layer and b.
    """

    kind: str
    size: int
    local: int
    anchors: int = 0
    random: int = 0
    layer: int = 0

    def layout(self, length: int, columns: int | None = None, aligned: bool = True) -> Layout:
        """Return how `length` queries are read, the last of `columns` (None: there are no others).

        aligned: the row is one document that begins in column 0. Otherwise the queries of a block
        may belong to two blocks of their document, and the far keys of both are read.
        """
        columns = columns or length
        size = min(length, self.size)
        blocks = -(-length // size)
        before = columns - length + (blocks - 1) * size
        on_edge = aligned and (columns - length) % self.size == 0
        left = min((self.local - on_edge) * self.size - (not on_edge), before)
        rows, spans = -(-columns // self.size), self.spans(length, columns, aligned)
        most = max(map(len, self.table(rows, spans)))
        return Layout(blocks, size, left, most * self.size if left < before else 0)

    def spans(self, length: int, columns: int, aligned: bool) -> int:
        """Return to how many blocks of a document the queries of one block may belong: 1 or 2."""
        on_edge = aligned and (columns - length) % self.size == 0
        return 1 if on_edge or length == 1 else 2

    def far(self, block: int) -> list[int]:
        """Return the blocks that `block` sees besides its neighbourhood, in rising order."""
        near = max(0, block - self.local + 1)  # the first block of the neighbourhood
        if self.kind == "strided":
            return list(range(block % self.local, near, self.local))
        if self.kind == "fixed":
            return list(range(self.local - 1, near, self.local))
        anchors = min(self.anchors, near)
        return [*range(anchors), *sorted(self.drawn(block))]

    def drawn(self, block: int) -> list[int]:
        """Return the random blocks that `block` sees, all distinct, none seen by another rule."""
        choices = block - self.local + 1 - self.anchors
        if choices <= self.random:
            return list(range(self.anchors, self.anchors + max(0, choices)))
        blocks: list[int] = []
        state = _mixed(_mixed(self.layer) + block)
        while len(blocks) < self.random:
            state = _mixed(state)
            if (j := self.anchors + state % choices) not in blocks:
                blocks.append(j)
        return blocks

    def random_table(self, rows: int) -> tuple[tuple[int, ...], ...]:
        """Return the random blocks of each of `rows` blocks."""
        return _random_table(self, rows)

    def table(self, rows: int, spans: int = 1) -> tuple[tuple[int, ...], ...]:
        """Return for each of `rows` blocks the far blocks of it and, with spans=2, of the next."""
        return _table(self, rows, spans)

    def pairs(self, length: int) -> int:
        """Return how many pairs of query and key see each other in a document of `length`."""
        return _pairs(self, length)


@lru_cache(maxsize=64)
def _random_table(sparse: Sparse, rows: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(sparse.drawn(b)) for b in range(rows))


@lru_cache(maxsize=64)
def _table(sparse: Sparse, rows: int, spans: int) -> tuple[tuple[int, ...], ...]:
    far = [sparse.far(b) for b in range(rows + spans - 1)]
    return tuple(tuple(sorted({j for f in far[b : b + spans] for j in f})) for b in range(rows))


@lru_cache(maxsize=64)
def _pairs(sparse: Sparse, length: int) -> int:
    total = 0
    for block, far in enumerate(_table(sparse, -(-length // sparse.size), 1)):
        queries = min(sparse.size, length - block * sparse.size)
        stretch = block % sparse.local if sparse.kind == "fixed" else sparse.local - 1
        near = min(block, stretch)
        # `fixed` sees the last block of the stretch before, though that may be a neighbour.
        lists = len(far) + (sparse.kind == "fixed" and _is_near(sparse, block))
        total += queries * (near + lists) * sparse.size + sum_to(queries)
    return total


def _is_near(sparse: Sparse, block: int) -> bool:
    """True if the last block of the stretch before `block` is in its neighbourhood, so not far."""
    last = block // sparse.local * sparse.local - 1
    return last >= max(0, block - sparse.local + 1)


def sum_to(n: int) -> int:
    """Return 1 + 2 + ... + n."""
    return n * (n + 1) // 2


def _mixed(x: int) -> int:
    """Return 64 bits that look random, a fixed function of x (splitmix64: Steele et al. 2014)."""
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)
