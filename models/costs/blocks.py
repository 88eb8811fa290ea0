"""The costs of attention to few keys; its module is models/mixers/block_attention.py.

causal=True counts exactly the pairs of query and key that see each other. causal=False counts what
the plain form multiplies, as models/mixers/patterns.py cuts it into blocks: some of it is hidden by
masks. Both are rounded to whole FLOPs a token.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from forescale.models.costs.attention import ATTENTION, shift_values
from forescale.models.costs.record import Part, Problem, matrix_flops
from forescale.models.mixers.patterns import Sparse, Window

if TYPE_CHECKING:
    from forescale.models.config import ModelConfig

PATTERNS = ("strided", "fixed", "bigbird")
_SPARSE = ("sparse_pattern", "sparse_block", "sparse_local", "sparse_global", "sparse_random")
_MODULE = "forescale.models.mixers.block_attention"
_Pattern = Callable[["ModelConfig"], Window | Sparse]


def _flops(of: _Pattern) -> Callable[["ModelConfig", int, bool], int]:
    def flops(config: "ModelConfig", sequence_length: int, causal: bool) -> int:
        """Scores and their product with the values take 2 * heads_width FLOPs per pair each."""
        pattern = of(config)
        pairs = pattern.pairs(sequence_length)
        if not causal:
            layout = pattern.layout(sequence_length)
            pairs = layout.num_blocks * layout.size * layout.reads
        scored = round(4 * config.sizes.heads_width * pairs / sequence_length)
        return matrix_flops(ATTENTION.shapes(config)) + scored

    return flops


def _plain_bytes(
    of: _Pattern,
) -> Callable[["ModelConfig", int, int, int, bool], tuple[int, int]]:
    def plain_bytes(
        config: "ModelConfig", micro_batch: int, length: int, bytes_per_value: int, masked: bool
    ) -> tuple[int, int]:
        """Padding around keys, or a copy of all that blocks read where some come from elsewhere;
        the output, in blocks and in rows; and the mask."""
        s, layout = config.sizes, of(config).layout(length, aligned=not masked)
        N, padded = layout.num_blocks, layout.num_blocks * layout.size
        read = N * layout.reads if layout.extra else layout.left + padded
        queries = 2 * padded - 2 * length if N > 1 else 0  # their padding, and the output's
        output = padded if N > 1 else 0
        values = 2 * s.kv_width * (read - length) + s.heads_width * (queries + output)
        mask = (micro_batch if masked else 1) * padded * layout.reads
        return micro_batch * bytes_per_value * values, bytes_per_value * mask

    return plain_bytes


def _window_cache(config: "ModelConfig", length: int, bytes_per_value: int) -> int:
    """Return the bytes of the keys and values that later queries can see."""
    pattern = Window.of(config)
    tokens = min(length, pattern.tokens - 1) + pattern.first
    return (2 * config.sizes.kv_width * tokens + shift_values(config)) * bytes_per_value


def _of_window(c: "ModelConfig", full: "ModelConfig", longest: int | None) -> list[Problem]:
    found: list[Problem] = []
    if c.window is None:
        found.append(("window", "mixer window has no width", "give how many tokens one sees"))
    elif c.window < 1:
        found.append(("window", f"{c.window} tokens are no window", "give at least 1"))
    elif longest and c.window > longest:
        problem = f"{c.window} tokens are more than the context's {longest}"
        found.append(("window", problem, "give fewer, or choose mixer attention"))
    if c.global_tokens < 0:
        found.append(("global_tokens", "must not be negative", "give 0 for none"))
    elif longest and c.global_tokens > longest:
        problem = f"{c.global_tokens} tokens are more than the context's {longest}"
        found.append(("global_tokens", problem, "give fewer"))
    return found


def _of_sparse(c: "ModelConfig", full: "ModelConfig", longest: int | None) -> list[Problem]:
    if c.sparse_pattern not in PATTERNS:
        problem, todo = f"unknown value {c.sparse_pattern!r}", ", ".join(PATTERNS)
        return [("sparse_pattern", problem, f"choose from {todo}")]
    if c.sparse_block < 1:
        return [("sparse_block", f"{c.sparse_block} is not a size", "give at least 1")]
    found: list[Problem] = []
    least = 1 if c.sparse_pattern == "bigbird" else 2
    if c.sparse_local < least:
        problem = f"{c.sparse_local} is too little for pattern {c.sparse_pattern}"
        found.append(("sparse_local", problem, f"give at least {least} blocks"))
    for name in ("sparse_global", "sparse_random"):
        if getattr(c, name) < 0:
            found.append((name, "must not be negative", "give 0 for none"))
        elif c.sparse_pattern != "bigbird" and getattr(c, name) != getattr(type(c), name):
            problem = f"has no effect on pattern {c.sparse_pattern}"
            found.append((name, problem, "leave it out, or choose sparse_pattern=bigbird"))
    if longest and c.sparse_pattern == "bigbird":
        blocks = -(-longest // c.sparse_block)
        for name in ("sparse_global", "sparse_random"):
            if getattr(c, name) > blocks:
                problem = f"{getattr(c, name)} are more than the context's {blocks} blocks"
                found.append((name, problem, "give fewer"))
    if longest and c.sparse_block * c.sparse_local > longest:
        problem = (
            f"{c.sparse_local} blocks of {c.sparse_block} are more than the context's {longest}"
        )
        found.append(("sparse_local", problem, "give smaller or fewer blocks, or mixer attention"))
    return found


def _part(of: _Pattern, module: str, view: str) -> Part:
    return replace(
        ATTENTION,
        module=f"{_MODULE}.{module}",
        flops=_flops(of),
        plain_bytes=_plain_bytes(of),
        viewer=f"{_MODULE}.{view}",
        takes_mask=False,
        takes_future=False,
        takes_biases=False,
    )


WINDOW = replace(
    _part(Window.of, "WindowAttention", "window_viewer"),
    cache_bytes=_window_cache,
    keys=(*ATTENTION.keys, "window", "global_tokens"),
    problems=_of_window,
)
BLOCK_SPARSE = replace(
    _part(Sparse.of, "BlockSparseAttention", "sparse_viewer"),
    varies=lambda config: bool(Sparse.of(config).random),
    keys=(*ATTENTION.keys, *_SPARSE),
    problems=_of_sparse,
)
