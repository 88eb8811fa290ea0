"""The costs of multi-head latent attention; its module is models/mixers/latent.py."""

from typing import TYPE_CHECKING

from forescale.models.costs.attention import ATTENTION, ROTATION, plain_bytes, scores_flops
from forescale.models.costs.record import (
    Part,
    Problem,
    Shapes,
    below_1,
    by_output,
    linear,
    matrix_flops,
)

if TYPE_CHECKING:
    from forescale.models.config import ModelConfig


def ranks(config: "ModelConfig") -> tuple[int, int]:
    """Return the widths of the latent of keys and values, and of that of queries (0: none).

    Rule for the first: 4 * head_dim (DeepSeek-V2, arXiv 2405.04434, section 2.1.4: d_c = 4 d_h),
    but at most half of all heads. Doubt: that is for 128 heads; the second part, for models of
    fewer than 8 heads, where 4 * head_dim would hardly compress, is ours.
    """
    s = config.sizes
    rank = config.latent_rank or max(1, min(4 * s.head_dim, s.heads_width // 2))
    return rank, config.latent_query_rank or 0


def turning(config: "ModelConfig") -> int:
    """Return the width of the part of a head that rotates, whose key all heads share."""
    return config.rotary_width if config.position == "rotary" else 0


def _shapes(config: "ModelConfig") -> Shapes:
    s, bias, (rank, query_rank), found = config.sizes, config.bias, ranks(config), Shapes()
    if query_rank:
        found |= linear("query_latent", s.width, query_rank, bias)
        found["query_norm.weight"] = (query_rank,)
    found |= linear("query", query_rank or s.width, s.heads_width, bias)
    found |= linear("latent", s.width, rank, bias)
    found["latent_norm.weight"] = (rank,)
    if turning(config):
        found |= linear("rope_key", s.width, turning(config), bias)
    found |= linear("key", rank, s.num_heads * (s.head_dim - turning(config)), bias)
    found |= linear("value", rank, s.heads_width, bias)
    return found | linear("output", s.heads_width, s.width, bias)


def _flops(config: "ModelConfig", sequence_length: int, causal: bool) -> int:
    """Return the FLOPs of the matrices and of the scores: keys and values are expanded."""
    return matrix_flops(_shapes(config)) + scores_flops(config, sequence_length, causal)


def _activation_bytes(config: "ModelConfig", bytes_per_value: int, norm_bytes: int) -> int:
    """Return the bytes of queries, keys, values and output, of the output's normaliser in fp32, and
    of the latents before and after their norms."""
    s = config.sizes
    return (
        4 * bytes_per_value * s.heads_width
        + 4 * s.num_heads
        + sum(ranks(config)) * (norm_bytes + bytes_per_value)
    )


def _cache_bytes(config: "ModelConfig", length: int, bytes_per_value: int) -> int:
    """Return the bytes of the latents and the keys that rotate, of all tokens."""
    return (ranks(config)[0] + turning(config)) * length * bytes_per_value


def _exchanged(config: "ModelConfig", ranks: int) -> int:
    """Return the values of queries, keys, values and output: all heads have their own."""
    return 4 * config.sizes.heads_width


def _plain_bytes(
    config: "ModelConfig", micro_batch: int, length: int, bytes_per_value: int, masked: bool
) -> tuple[int, int]:
    """Return what attention keeps; all heads have keys and values of their own before it too."""
    s = config.sizes
    inside, view = plain_bytes(config, micro_batch, length, bytes_per_value, masked)
    own = 2 * bytes_per_value * (s.heads_width - s.kv_width) * micro_batch * length
    return inside - own if inside else 0, view


def _folds(config: "ModelConfig", scores: float) -> dict[str, float]:
    """Return the factor of the module that the scores are linear in."""
    return {"query": scores}


def _problems(c: "ModelConfig", full: "ModelConfig", longest: int | None) -> list[Problem]:
    found = below_1(c, *_KEYS)
    if c.position == "rotary" and c.rope_fraction == 1:
        problem = "mixer latent needs a part of each head that does not rotate"
        found.append(("rope_fraction", problem, "give less than 1, or leave it out"))
    heads = full.num_heads or 1
    queries = heads * (full.head_dim or (full.width or 0) // heads)
    if (c.latent_rank or 0) >= 2 * queries:
        problem = f"{c.latent_rank} does not compress keys and values, {2 * queries} a token"
        found.append(("latent_rank", problem, "give less, or leave it out"))
    if (c.latent_query_rank or 0) > queries:
        problem = f"{c.latent_query_rank} does not compress queries, {queries} a token"
        found.append(("latent_query_rank", problem, "give less, or leave it out"))
    return found


def _divided(config: "ModelConfig") -> dict[str, int]:
    """Return the matrices of the heads; latents and the keys that rotate are of all heads."""
    return by_output(_shapes(config), ("query", "key", "value"), "output")


_KEYS = ("latent_rank", "latent_query_rank")
LATENT = Part(
    module="forescale.models.mixers.latent.LatentAttention",
    shapes=_shapes,
    flops=_flops,
    activation_bytes=_activation_bytes,
    kernel_bytes=ATTENTION.kernel_bytes,
    made_again=ATTENTION.made_again,
    cache_bytes=_cache_bytes,
    writes=("output",),
    per_head=("latent_norm", "query_norm"),
    folds=_folds,
    divided=_divided,
    heads=("num_heads", "key.num_heads", "value.num_heads"),
    keys=_KEYS,
    reads=("num_heads", "head_dim", *ROTATION),
    problems=_problems,
    plain_bytes=_plain_bytes,
    turning=0.5,
    takes_future=True,
    takes_biases=True,
    exchanged=_exchanged,
)
