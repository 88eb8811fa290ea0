"""Multi-head latent attention as a mixer; its module is in latent_module.py."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from forescale.models.mixers.attention import Softmax
from forescale.models.part import Problem, Rows, Shapes, below_1, by_output, linear
from forescale.models.positions.kinds import Rotary

if TYPE_CHECKING:
    from forescale.models.config import ModelConfig


@dataclass(frozen=True)
class Latent(Softmax):
    """Attention whose keys and values are made of one narrow latent of each token."""

    rank: int | None = None  # width of the latent, which is cached; None: 4 heads, at most half
    query_rank: int | None = None  # width of the queries' latent; None: no latent

    kind = "latent"
    module = "forescale.models.mixers.latent_module.LatentAttention"
    per_head = ("latent_norm", "query_norm")
    heads = ("num_heads", "key.num_heads", "value.num_heads")
    reads = ("num_heads", "head_dim", "position")
    turning = 0.5

    def problems(self) -> list[Problem]:
        return below_1(self, "rank", "query_rank")

    def problems_in(self, sized: "ModelConfig", longest: int | None) -> list[Problem]:
        problems: list[Problem] = []
        heads = sized.num_heads or 1
        queries = heads * (sized.head_dim or (sized.width or 0) // heads)
        if (self.rank or 0) >= 2 * queries:
            problem = f"{self.rank} does not compress keys and values, {2 * queries} a token"
            problems.append(("rank", problem, "give less, or leave it out"))
        if (self.query_rank or 0) > queries:
            problem = f"{self.query_rank} does not compress queries, {queries} a token"
            problems.append(("query_rank", problem, "give less, or leave it out"))
        return problems

    def sized(self, sized: "ModelConfig") -> "Latent":
        """Return the part with its rank.

        Rule: 4 * head_dim (DeepSeek-V2, arXiv 2405.04434, section 2.1.4: d_c = 4 d_h), but at most
        half of all heads. Doubt: that is for 128 heads; the second part, for models of fewer than 8
        heads, where 4 * head_dim would hardly compress, is ours.
        """
        heads = sized.num_heads or 1
        head_dim = sized.head_dim or (sized.width or 0) // heads
        return replace(self, rank=self.rank or max(1, min(4 * head_dim, heads * head_dim // 2)))

    def ranks(self, config: "ModelConfig") -> tuple[int, int]:
        """Return the widths of the latent of keys and values, and of that of queries (0: none)."""
        rank = self.rank or self.sized(config.sized()).rank
        assert rank is not None
        return rank, self.query_rank or 0

    def turning_width(self, config: "ModelConfig") -> int:
        """Return the width of the part of a head that rotates, whose key all heads share."""
        return config.rotary_width if isinstance(config.position, Rotary) else 0

    def shapes(self, config: "ModelConfig") -> Shapes:
        s, bias, shapes = config.sizes, config.bias, Shapes()
        (rank, query_rank), turning = self.ranks(config), self.turning_width(config)
        if query_rank:
            shapes |= linear("query_latent", s.width, query_rank, bias)
            shapes["query_norm.weight"] = (query_rank,)
        shapes |= linear("query", query_rank or s.width, s.heads_width, bias)
        shapes |= linear("latent", s.width, rank, bias)
        shapes["latent_norm.weight"] = (rank,)
        if turning:
            shapes |= linear("rope_key", s.width, turning, bias)
        shapes |= linear("key", rank, s.num_heads * (s.head_dim - turning), bias)
        shapes |= linear("value", rank, s.heads_width, bias)
        return shapes | linear("output", s.heads_width, s.width, bias)

    def activation_bytes(self, config: "ModelConfig", bytes_per_value: int, norm_bytes: int) -> int:
        """Return the bytes of queries, keys, values and output, of the output's normaliser in fp32,
        and of the latents before and after their norms."""
        s = config.sizes
        return (
            4 * bytes_per_value * s.heads_width
            + 4 * s.num_heads
            + sum(self.ranks(config)) * (norm_bytes + bytes_per_value)
        )

    def cache_bytes(self, config: "ModelConfig", length: int, bytes_per_value: int) -> int:
        """Return the bytes of the latents and the keys that rotate, of all tokens."""
        return (self.ranks(config)[0] + self.turning_width(config)) * length * bytes_per_value

    def exchanged(self, config: "ModelConfig", ranks: int) -> int:
        """Return the values of queries, keys, values and output of all heads."""
        return 4 * config.sizes.heads_width

    def plain_bytes(self, config: "ModelConfig", rows: Rows) -> tuple[int, int]:
        """Return what attention saves; each head has keys and values before it too."""
        s, (inside, view) = config.sizes, super().plain_bytes(config, rows)
        counted = 2 * rows.bytes_per_value * (s.heads_width - s.kv_width)
        return inside - counted * rows.micro_batch * rows.length if inside else 0, view

    def folds(self, config: "ModelConfig", scores: float) -> dict[str, float]:
        return {"query": scores}

    def divided(self, config: "ModelConfig") -> dict[str, int]:
        """Return the matrices of the heads; latents and the keys that rotate are of all heads."""
        return by_output(self.shapes(config), ("query", "key", "value"), "output")
