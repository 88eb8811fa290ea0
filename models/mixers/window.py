"""Attention to the last tokens; its module is in window_module.py.

A CPU computes it in blocks (Layout): a block of queries reads its own keys, `left` keys before them
and the first keys of the document, and a mask hides what a query may not see. causal=True counts
exactly the pairs of query and key that see each other, causal=False what the blocks multiply; both
are rounded to whole FLOPs a token.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from forescale.models.mixers.attention import Attention
from forescale.models.part import Problem, Rows, matrix_flops

if TYPE_CHECKING:
    from forescale.models.config import ModelConfig


class Layout(NamedTuple):
    """`num_blocks` blocks of `size` queries, each of which reads the block's own keys, `left` keys
    before them and `extra` first keys of the document."""

    num_blocks: int
    size: int
    left: int
    extra: int

    @property
    def reads(self) -> int:
        """Keys that one block reads; each of its queries is multiplied by all of them."""
        return self.extra + self.left + self.size


@dataclass(frozen=True)
class Window(Attention):
    """Attention to the last tokens (Mistral 7B: Jiang et al. 2023, arXiv 2310.06825; Child et al.
    2019), and to the first ones of the document (Longformer's global tokens: Beltagy et al. 2020,
    arXiv 2004.05150; attention sinks: Xiao et al. 2023, arXiv 2309.17453), though these see no
    later token, as the model is causal.

    Who sees whom depends on positions within the document alone, so a document has the same
    outputs wherever it stands in a row.
    """

    window: int | None = None  # tokens that a token sees, itself included; must be set
    global_tokens: int = 0  # first tokens of a document that all its tokens see

    kind = "window"
    module = "forescale.models.mixers.window_module.WindowAttention"
    viewer = "forescale.models.mixers.window_module.view_of"
    takes_mask = False
    takes_future = False
    takes_biases = False

    @property
    def width(self) -> int:
        """The tokens of the window."""
        assert self.window is not None
        return self.window

    def layout(self, length: int, columns: int | None = None) -> Layout:
        """Return how `length` queries are read, the last of `columns` (None: there are no others).

        Blocks have from 16 to 128 queries: with C queries a block reads C + window - 1 keys. With
        global tokens they have up to 512, because keys from elsewhere are copied together with the
        block's own.
        """
        size = min(length, max(16, min(self.width, 512 if self.global_tokens else 128)))
        blocks = -(-length // size)
        before = (columns or length) - length + (blocks - 1) * size
        left = min(self.width - 1, before)
        return Layout(blocks, size, left, self.global_tokens if left < before else 0)

    def pairs(self, length: int) -> int:
        """Return how many pairs of query and key see each other in a document of `length`."""
        outside = max(0, length - self.width)  # queries that don't see all keys before them
        near = _sum_to(length - outside) + outside * self.width
        # Query t sees min(global_tokens, t + 1 - width) keys that are no longer in its window.
        rising = min(outside, self.global_tokens)
        return near + _sum_to(rising) + (outside - rising) * self.global_tokens

    def flops(self, config: "ModelConfig", sequence_length: int, causal: bool) -> int:
        """Scores and their product with the values take 2 * heads_width FLOPs per pair each."""
        pairs = self.pairs(sequence_length)
        if not causal:
            layout = self.layout(sequence_length)
            pairs = layout.num_blocks * layout.size * layout.reads
        scores = round(4 * config.sizes.heads_width * pairs / sequence_length)
        return matrix_flops(self.shapes(config)) + scores

    def plain_bytes(self, config: "ModelConfig", rows: Rows) -> tuple[int, int]:
        """Return the bytes of padding around keys, or of a copy of all that blocks read if some
        keys come from elsewhere; of the output, in blocks and in rows; and of the mask."""
        s, length, layout = config.sizes, rows.length, self.layout(rows.length)
        N, padded = layout.num_blocks, layout.num_blocks * layout.size
        read = N * layout.reads if layout.extra else layout.left + padded
        # In several blocks: the padding of queries and of the output, and the output itself.
        outputs = 3 * padded - 2 * length if N > 1 else 0
        values = 2 * s.kv_width * (read - length) + s.heads_width * outputs
        mask = (rows.micro_batch if rows.masked else 1) * padded * layout.reads
        return rows.micro_batch * rows.bytes_per_value * values, rows.bytes_per_value * mask

    def cache_bytes(self, config: "ModelConfig", length: int, bytes_per_value: int) -> int:
        """Return the bytes of the keys and values that later queries can see."""
        tokens = min(length, self.width - 1) + self.global_tokens
        values = 2 * config.sizes.kv_width * tokens + self.shift_values(config)
        return values * bytes_per_value

    def problems(self) -> list[Problem]:
        problems = super().problems()
        if self.window is None:
            problem = "mixer window has no width"
            problems.append(("window", problem, "give the number of tokens that a token sees"))
        elif self.window < 1:
            problems.append(("window", f"{self.window} tokens are no window", "give at least 1"))
        if self.global_tokens < 0:
            problems.append(("global_tokens", "must not be negative", "give 0 for none"))
        return problems

    def problems_in(self, sized: "ModelConfig", longest: int | None) -> list[Problem]:
        problems = super().problems_in(sized, longest)
        keys = [
            ("window", "give fewer, or choose attention"),
            ("global_tokens", "give fewer"),
        ]
        for name, todo in keys:
            if longest and (tokens := getattr(self, name) or 0) > longest:
                problem = f"{tokens} tokens are more than the context's {longest}"
                problems.append((name, problem, todo))
        return problems


def _sum_to(n: int) -> int:
    """Return 1 + 2 + ... + n."""
    return n * (n + 1) // 2
