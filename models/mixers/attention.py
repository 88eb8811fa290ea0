"""Softmax attention, and attention to an encoder's output; their modules are in
attention_module.py."""

import math
from dataclasses import dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Literal

from forescale.models.part import (
    Mixer,
    Part,
    Problem,
    Rows,
    Shapes,
    by_output,
    copies,
    linear,
    matrix_flops,
    outputs,
)

if TYPE_CHECKING:
    from forescale.models.config import ModelConfig


@dataclass(frozen=True)
class Softmax(Mixer):
    """A mixer whose heads, heads_width wide together, attend to all keys by a softmax of scores."""

    writes = ("output",)
    takes_future = True
    takes_biases = True
    splits_columns = True

    def scores_flops(self, config: "ModelConfig", keys: int, causal: bool = False) -> int:
        """Return the FLOPs of one token's scores, and of their product with the values.

        Each takes 2 * heads_width FLOPs per key. A token attends to all keys, or in a causal model
        to exactly (keys + 1) / 2 on average.
        """
        doubled_keys = keys + 1 if causal and config.causal else 2 * keys
        return 2 * config.sizes.heads_width * doubled_keys

    def flops(self, config: "ModelConfig", sequence_length: int, causal: bool) -> int:
        scores = self.scores_flops(config, sequence_length, causal)
        return matrix_flops(self.shapes(config)) + scores

    def kernel_bytes(self, config: "ModelConfig", bytes_per_value: int) -> int:
        """Return the bytes of the output and its normaliser; none with dropout, because attention
        is then computed again (models/block.py, kept_operations)."""
        s = config.sizes
        return 0 if config.dropout else bytes_per_value * s.heads_width + 4 * s.num_heads

    def selective_flops(self, config: "ModelConfig", sequence_length: int) -> int:
        """Return the FLOPs of the scores where they have dropout."""
        return self.scores_flops(config, sequence_length) if config.dropout else 0

    def plain_bytes(self, config: "ModelConfig", rows: Rows) -> tuple[int, int]:
        """Return the bytes where scores have biases with a gradient, which no flash kernel of a CPU
        takes: fp32 weights, queries, keys and values of all heads in place of a kernel's."""
        s = config.sizes
        if config.position.kind != "relative":
            return 0, 0
        kernel = rows.bytes_per_value * (s.heads_width + 2 * s.kv_width) + 4 * s.num_heads
        plain = 4 * (3 * s.heads_width + s.num_heads * rows.length)
        return rows.micro_batch * rows.length * (plain - kernel), 0


@dataclass(frozen=True)
class Attention(Softmax):
    """Attention to all tokens, multi-head or grouped-query."""

    # RMS norm of queries and keys, of each head alone as in Qwen3, or of all heads together as in
    # OLMo 2; it stabilises training.
    qk_norm: Literal["none", "head", "layer"] = "head"
    qkv_bias: bool = False  # biases of queries, keys and values alone, as in Qwen2
    # A sigmoid of the layer's input multiplies the output of each head, or of each channel.
    gate: Literal["none", "head", "channel"] = "none"
    # Mix a learned part of the previous token's queries, keys and values into those of each token.
    token_shift: bool = False
    # Share of the first layer's values in the values of each later layer (ResFormer: 0.5); 0: none.
    value_residual: float = 0.0
    # Base of the rotations in the layers of this mixer, without scaling, where it is not that of
    # the position (Gemma 3: 10000 in its windows); 0: no rotation (SmolLM3); None: the position's.
    theta: float | None = None
    # Scores are divided by the square root of this instead of head_dim's (Gemma 2); None: head_dim.
    score_dim: float | None = None

    kind = "attention"
    module = "forescale.models.mixers.attention_module.Attention"
    gates = ("gate",)
    per_head = ("query_norm", "key_norm")
    heads = ("num_heads", "num_kv_heads")
    reads = ("num_heads", "num_kv_heads", "head_dim", "position")
    takes_values = True

    @property
    def shifts(self) -> bool:
        return self.token_shift

    @property
    def shared_values(self) -> float:
        return self.value_residual

    def problems(self) -> list[Problem]:
        problems: list[Problem] = []
        if not 0 <= self.value_residual < 1:
            problem = f"{self.value_residual} is no part of a layer's values"
            problems.append(("value_residual", problem, "give above 0 and below 1, or 0 for none"))
        if self.theta is not None and not 0 <= self.theta < math.inf:
            problems.append(("theta", f"{self.theta} is no base", "give 0 for no rotation"))
        if self.score_dim is not None and not 0 < self.score_dim < math.inf:
            problems.append(("score_dim", "must be above 0", "leave it out for head_dim"))
        return problems

    def problems_in(self, sized: "ModelConfig", longest: int | None) -> list[Problem]:
        problems: list[Problem] = []
        if self.qkv_bias and sized.bias:
            problems.append(("qkv_bias", "bias=true has these biases already", "leave one out"))
        if self.theta is not None and (sized.has_encoder or sized.position.kind != "rotary"):
            problem = "is for rotary positions of a decoder or an encoder alone"
            problems.append(("theta", problem, "leave it out"))
        if self.token_shift and sized.has_encoder:
            problem = "is for a decoder or an encoder alone"
            problems.append(("token_shift", problem, "leave it out, or leave out encoder_layers"))
        if self.value_residual and sized.has_encoder:
            problem = "an encoder and a decoder have no first layer in common"
            todo = "leave it out, or leave out encoder_layers"
            problems.append(("value_residual", problem, todo))
        elif self.value_residual and sized.num_layers == 1:
            problem = "the only layer has no earlier one, whose values it could take"
            problems.append(("value_residual", problem, "leave it out, or give more layers"))
        return problems

    def num_gates(self, config: "ModelConfig") -> int:
        """Return the number of gates of a token."""
        counts = {"head": config.sizes.num_heads, "channel": config.sizes.heads_width}
        return counts.get(self.gate, 0)

    def shapes(self, config: "ModelConfig") -> Shapes:
        s, shapes = config.sizes, Shapes()
        for name, width in (("query", s.heads_width), ("key", s.kv_width), ("value", s.kv_width)):
            shapes |= linear(name, s.width, width, config.bias or self.qkv_bias)
        shapes |= linear("output", s.heads_width, s.width, config.bias)
        if self.token_shift:
            shapes["query_shift.weight"] = (s.heads_width,)
            shapes |= {f"{name}_shift.weight": (s.kv_width,) for name in ("key", "value")}
        if self.gate != "none":
            shapes |= linear("gate", s.width, self.num_gates(config), config.bias)
        if self.qk_norm != "none":
            over_layer = self.qk_norm == "layer"
            widths = (s.heads_width, s.kv_width) if over_layer else (s.head_dim, s.head_dim)
            names = ("query_norm.weight", "key_norm.weight")
            shapes |= {name: (width,) for name, width in zip(names, widths, strict=True)}
        return shapes

    def activation_bytes(self, config: "ModelConfig", bytes_per_value: int, norm_bytes: int) -> int:
        """Return the bytes of queries and keys (kernel inputs, and inputs of QK-norm), values,
        output.

        Also the normaliser of the output in fp32, one per head, and what a gate multiplies. Flash
        attention saves no scores.
        """
        s = config.sizes
        heads = s.heads_width + s.kv_width
        kernel = bytes_per_value * (heads + s.kv_width + s.heads_width) + 4 * s.num_heads
        if self.gate != "none":  # the gated output, and the gates
            kernel += bytes_per_value * (s.heads_width + self.num_gates(config))
        if self.token_shift:
            kernel += bytes_per_value * (heads + s.kv_width)  # those of the previous token
        return kernel + (norm_bytes * heads if self.qk_norm != "none" else 0)

    def cache_bytes(self, config: "ModelConfig", length: int, bytes_per_value: int) -> int:
        """Return the bytes of the keys and values of all tokens, and of a shift's last token."""
        values = 2 * config.sizes.kv_width * length + self.shift_values(config)
        return values * bytes_per_value

    def shift_values(self, config: "ModelConfig") -> int:
        """Return the values of the last token that a cache holds for token_shift."""
        s = config.sizes
        return s.heads_width + 2 * s.kv_width if self.token_shift else 0

    def folds(self, config: "ModelConfig", scores: float) -> dict[str, float]:
        """Return the factor of the module that the scores are linear in.

        It is the gain of the queries' norm; without a norm, the queries' matrix and bias. A
        rotation does not change this.
        """
        return {"query" if self.qk_norm == "none" else "query_norm": scores}

    def divided(self, config: "ModelConfig") -> dict[str, int]:
        """Return the matrices of the heads. A norm over all heads can't be divided."""
        if self.qk_norm == "layer":
            return {}
        reading = ("query", "key", "value")
        shifts = (f"{name}_shift" for name in reading)
        return by_output(self.shapes(config), (*reading, *shifts, "gate"), "output")

    def exchanged(self, config: "ModelConfig", ranks: int) -> int:
        """Return the values of queries, keys and values, as often as they are sent, and output."""
        s = config.sizes
        return 2 * s.heads_width + 2 * s.kv_width * copies(s.num_heads, s.num_kv_heads, ranks)


_OF_SOURCE = ("key.", "value.", "key_norm.")  # parameters that act on source tokens


@dataclass(frozen=True)
class Cross(Attention):
    """Attention of the decoder's tokens to the encoder's output, between mixer and MLP."""

    kind = "cross"
    module = "forescale.models.mixers.attention_module.CrossAttention"

    def _split(self, config: "ModelConfig") -> tuple[Shapes, Shapes]:
        """Return the parameters that act on the decoder's tokens, and those on the source's."""
        shapes = self.shapes(config)
        source = {name: shape for name, shape in shapes.items() if name.startswith(_OF_SOURCE)}
        return {name: shape for name, shape in shapes.items() if name not in source}, source

    def flops(self, config: "ModelConfig", source_length: int, causal: bool) -> int:
        """Return the FLOPs of a decoder's token, which attends to all tokens of the source."""
        return matrix_flops(self._split(config)[0]) + self.scores_flops(config, source_length)

    def source_flops(self, config: "ModelConfig") -> int:
        """Return the forward FLOPs of one token of the encoder's output."""
        return matrix_flops(self._split(config)[1])

    def activation_bytes(self, config: "ModelConfig", bytes_per_value: int, norm_bytes: int) -> int:
        """Return the bytes of a decoder's token: the queries (and the input of their norm), the
        output and its normaliser."""
        s = config.sizes
        total = 2 * bytes_per_value * s.heads_width + 4 * s.num_heads
        if self.gate != "none":
            total += bytes_per_value * (s.heads_width + self.num_gates(config))
        return total + (norm_bytes * s.heads_width if self.qk_norm != "none" else 0)

    def source_bytes(self, config: "ModelConfig", bytes_per_value: int, norm_bytes: int) -> int:
        """Return the bytes that autograd saves of one token of the encoder's output: keys (and the
        input of their norm), values."""
        norm = norm_bytes if self.qk_norm != "none" else 0
        return config.sizes.kv_width * (2 * bytes_per_value + norm)

    def selected_bytes(self, config: "ModelConfig", bytes_per_value: int) -> int:
        results = bytes_per_value * outputs(self._split(config)[0])
        return results + self.kernel_bytes(config, bytes_per_value)

    def selected_source(self, config: "ModelConfig", bytes_per_value: int) -> int:
        """Return the bytes that selective checkpointing saves of such a token."""
        return bytes_per_value * outputs(self._split(config)[1])

    def plain_bytes(self, config: "ModelConfig", rows: Rows) -> tuple[int, int]:
        """Return nothing: its scores have no biases."""
        return 0, 0


@cache
def cross_of(mixer: Part) -> Cross:
    """Return the attention to an encoder beside a mixer, with the keys of the mixer if this is
    attention too."""
    keys = fields(Attention) if isinstance(mixer, Attention) else ()
    return Cross(**{f.name: getattr(mixer, f.name) for f in keys})
