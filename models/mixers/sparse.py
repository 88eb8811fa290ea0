"""Attention to few keys; its modules are in sparse_module.py, the keys of a query in patterns.py.

causal=True counts exactly the pairs of query and key that see each other. causal=False counts what
the plain form multiplies, as patterns.py cuts it into blocks: masks hide some of it. Both are
rounded to whole FLOPs a token.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from forescale.models.mixers.attention import Attention
from forescale.models.mixers.patterns import Sparse, Stretch
from forescale.models.part import Problem, below_1, matrix_flops

if TYPE_CHECKING:
    from forescale.models.config import ModelConfig


@dataclass(frozen=True)
class FewKeys(Attention):
    """Attention whose queries see the keys of a pattern."""

    viewer = "forescale.models.mixers.sparse_module.viewer"
    takes_mask = False
    takes_future = False
    takes_biases = False

    def pattern_of(self, layer: int = 0) -> Stretch | Sparse:
        """Return which keys a query of a layer sees."""
        raise NotImplementedError

    def flops(self, config: "ModelConfig", sequence_length: int, causal: bool) -> int:
        """Scores and their product with the values take 2 * heads_width FLOPs per pair each."""
        pattern = self.pattern_of()
        pairs = pattern.pairs(sequence_length)
        if not causal:
            layout = pattern.layout(sequence_length)
            pairs = layout.num_blocks * layout.size * layout.reads
        scores = round(4 * config.sizes.heads_width * pairs / sequence_length)
        return matrix_flops(self.shapes(config)) + scores

    def plain_bytes(
        self,
        config: "ModelConfig",
        micro_batch: int,
        length: int,
        bytes_per_value: int,
        masked: bool,
    ) -> tuple[int, int]:
        """Return the bytes of padding around keys, or of a copy of all that blocks read if some
        keys come from elsewhere; of the output, in blocks and in rows; and of the mask."""
        s, layout = config.sizes, self.pattern_of().layout(length, aligned=not masked)
        N, padded = layout.num_blocks, layout.num_blocks * layout.size
        read = N * layout.reads if layout.extra else layout.left + padded
        queries = 2 * padded - 2 * length if N > 1 else 0  # their padding, and the output's
        output = padded if N > 1 else 0
        values = 2 * s.kv_width * (read - length) + s.heads_width * (queries + output)
        mask = (micro_batch if masked else 1) * padded * layout.reads
        return micro_batch * bytes_per_value * values, bytes_per_value * mask


@dataclass(frozen=True)
class Window(FewKeys):
    """Attention to the last tokens, and to the first ones of the document."""

    window: int | None = None  # tokens that a token sees, itself included; must be set
    global_tokens: int = 0  # first tokens of a document that all its tokens see

    kind = "window"
    module = "forescale.models.mixers.sparse_module.WindowAttention"

    def pattern_of(self, layer: int = 0) -> Stretch:
        assert self.window is not None
        return Stretch(self.window, self.global_tokens)

    def cache_bytes(self, config: "ModelConfig", length: int, bytes_per_value: int) -> int:
        """Return the bytes of the keys and values that later queries can see."""
        pattern = self.pattern_of()
        tokens = min(length, pattern.tokens - 1) + pattern.first
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
        if longest and (self.window or 0) > longest:
            problem = f"{self.window} tokens are more than the context's {longest}"
            problems.append(("window", problem, "give fewer, or choose mixer=attention"))
        if longest and self.global_tokens > longest:
            problem = f"{self.global_tokens} tokens are more than the context's {longest}"
            problems.append(("global_tokens", problem, "give fewer"))
        return problems


@dataclass(frozen=True)
class BlockSparse(FewKeys):
    """Attention of blocks of tokens to the blocks of a pattern."""

    pattern: Literal["strided", "fixed", "bigbird"] = "strided"  # which blocks a block sees
    block: int = 64  # tokens per block
    local: int = 4  # blocks of the neighbourhood; strided and fixed: the stride
    global_blocks: int = 1  # bigbird: first blocks of a document that all its tokens see
    random_blocks: int = 2  # bigbird: random blocks that a block sees

    kind = "block_sparse"
    module = "forescale.models.mixers.sparse_module.BlockSparseAttention"

    def pattern_of(self, layer: int = 0) -> Sparse:
        if self.pattern != "bigbird":
            return Sparse(self.pattern, self.block, self.local)
        blocks = self.global_blocks, self.random_blocks
        return Sparse("bigbird", self.block, self.local, *blocks, layer)

    @property
    def varies(self) -> bool:
        """True with random blocks, which each layer draws for itself."""
        return bool(self.pattern_of().random)

    def problems(self) -> list[Problem]:
        problems = super().problems() + below_1(self, "block")
        least = 1 if self.pattern == "bigbird" else 2
        if self.local < least:
            problem = f"{self.local} is too little for pattern {self.pattern}"
            problems.append(("local", problem, f"give at least {least} blocks"))
        for name in ("global_blocks", "random_blocks"):
            if getattr(self, name) < 0:
                problems.append((name, "must not be negative", "give 0 for none"))
            elif self.pattern != "bigbird" and getattr(self, name) != getattr(BlockSparse, name):
                problem = f"has no effect on pattern {self.pattern}"
                problems.append((name, problem, "leave it out, or choose pattern=bigbird"))
        return problems

    def problems_in(self, sized: "ModelConfig", longest: int | None) -> list[Problem]:
        problems = super().problems_in(sized, longest)
        if longest and self.pattern == "bigbird":
            blocks = -(-longest // self.block)
            for name in ("global_blocks", "random_blocks"):
                if getattr(self, name) > blocks:
                    problem = f"{getattr(self, name)} are more than the context's {blocks} blocks"
                    problems.append((name, problem, "give fewer"))
        if longest and self.block * self.local > longest:
            problem = f"{self.local} blocks of {self.block} are more than the context's {longest}"
            todo = "give smaller or fewer blocks, or choose mixer=attention"
            problems.append(("local", problem, todo))
        return problems
