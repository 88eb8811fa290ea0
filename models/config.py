"""The config of the model, its rules, and `depth`, the one key that sets all sizes.

Invariant: a ModelConfig without problems() can be built; resolved() sets every size and changes no
given value. Imports no torch: a plan reads this file on a login node.
"""

import math
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

from forescale.models.costs import MIXERS, MLPS
from forescale.models.costs.moe import problems_of_sizes as problems_of_experts
from forescale.models.costs.record import Problem

POSITIONS = ("rotary", "alibi", "learned", "sinusoidal", "none")
ROPE_SCALINGS = ("none", "ntk", "yarn")
NORMS = ("rmsnorm", "layernorm")
NORM_PLACEMENTS = ("pre", "post", "sandwich")
QK_NORM_OVER = ("head", "layer")
ATTENTION_GATES = ("none", "head", "channel")
PARAMETRIZATIONS = ("standard", "mup", "completep")

HEAD_DIM = 64
MOST_LAYERS = 2048  # of a plan that takes seconds; trained models have some hundred
WIDTH_PER_LAYER = 64


@dataclass(frozen=True)
class Sizes:
    """The sizes of a config, all of them set."""

    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    mlp_width: int
    vocab_size: int
    max_sequence_length: int

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.width // self.num_heads

    @property
    def kv_width(self) -> int:
        """Width of all keys (or values) of a token: num_kv_heads * head_dim."""
        return self.num_kv_heads * self.head_dim


_NUMERICS = {"kind": "numerics"}  # may change on resume; every other field shapes the trajectory


@dataclass(frozen=True)
class ModelConfig:
    """A transformer: a causal decoder unless told otherwise.

    Give only `depth`, or `num_layers` and `width`. Other given sizes override the rule.
    The rule for a size that is not given:

    1. num_layers = depth.
    2. width = 64 * depth. nanochat's dial (base_train.py, aspect ratio 64), and GPT-2 small's 12
       by 768. Doubt: Kaplan et al. 2020 (arXiv 2001.08361, figure 5) find that the ratio of width
       to depth can vary by a factor of 40 with little change of the loss, so 64 is a habit, not
       an optimum; large published models are wider (Llama 7B: 128).
    3. num_heads = width / 64: heads of 64, as in Vaswani et al. 2017 and all of GPT-2. A width
       that 64 doesn't divide needs num_heads.
    4. num_kv_heads = num_heads: plain multi-head attention.
    5. mlp_width = 4 * width (Vaswani et al. 2017, section 3.3); for swiglu 8/3 * width, which with
       its third matrix holds as many parameters (Shazeer 2020, arXiv 2002.05202, section 2),
       rounded up to a multiple of 64 for the matrix units; moe as swiglu.
    6. moe_width = mlp_width / (moe_top_k + moe_shared), so that a token's FLOPs are those of the
       dense model (Dai et al. 2024, arXiv 2401.06066, section 3.1). Doubt: Mixtral's experts are
       as wide as a dense MLP.
    """

    depth: int | None = None  # sets num_layers and width (64 * depth); or give both
    num_layers: int | None = None  # None: depth
    width: int | None = None  # None: 64 * depth
    num_heads: int | None = None  # None: width / 64
    num_kv_heads: int | None = None  # fewer than num_heads: grouped-query; None: num_heads
    mlp_width: int | None = None  # None: 4 * width, or 8/3 * width for swiglu
    vocab_size: int | None = None  # None: the dataset's
    max_sequence_length: int | None = None  # None: the training's

    position: str = "rotary"  # rotary | alibi | learned | sinusoidal | none
    rope_theta: float = 10_000.0  # Su et al. 2021, arXiv 2104.09864
    rope_scaling: str = "none"  # none | ntk | yarn: models/positions/rope_scaling.py
    rope_factor: float = 1.0  # ntk, yarn: new length / original length
    rope_original_length: int | None = None  # yarn; None: max_sequence_length / rope_factor
    # The part of each head that rotates; the rest has no position. None: all, with latent half.
    rope_fraction: float | None = None
    norm: str = "rmsnorm"  # rmsnorm | layernorm
    norm_placement: str = "pre"  # pre | post | sandwich: before a part, after it (OLMo 2), or both
    norm_eps: float = 1e-6  # added to the variance in norms
    # How tokens exchange information: attention | gated_deltanet | latent | lstm | mingru
    mixer: str = "attention"
    # Mixers of successive layers, repeated over the depth, such as [mingru, mingru, attention];
    # empty: `mixer` in each layer.
    mixer_pattern: list[str] = field(default_factory=list)
    delta_value_dim: int | None = None  # gated_deltanet: width of a value head; None: head width
    delta_conv: int = 4  # gated_deltanet: tokens that its short convolution reads
    latent_rank: int | None = None  # latent: width of what is cached; None: 4 heads, half the width
    latent_query_rank: int | None = None  # latent: width of the queries' latent; None: no latent
    # Layers of an encoder before the num_layers of the decoder (objective.kind=seq2seq); 0: none.
    encoder_layers: int = 0
    source_length: int | None = None  # columns that the encoder reads; None: as the objective says
    causal: bool = True  # a token sees no later one; false: an encoder, for objective.kind=masked
    mlp: str = "swiglu"  # swiglu | geglu | gelu | relu2 | moe: experts, models/moe.py
    moe_experts: int = 8  # moe: experts of a layer (Mixtral: 8)
    moe_top_k: int = 2  # moe: experts that a token uses (GShard, Mixtral: 2)
    moe_width: int | None = None  # of an expert; None: mlp_width / (moe_top_k + moe_shared)
    moe_shared: int = 0  # moe: experts that every token uses too
    moe_dense_layers: int = 0  # moe: first layers that keep a dense swiglu of mlp_width
    moe_scores: str = "softmax"  # softmax | sigmoid: the router's scores
    moe_renormalise: bool = True  # divide a token's scores by the sum of those of its experts
    moe_balance_loss: float = 0.01  # coefficient of the load-balancing loss (Switch: 0.01); 0: off
    moe_z_loss: float = 0.001  # coefficient of the router's z-loss (ST-MoE: 0.001); 0: off
    moe_bias_speed: float = 0.0  # loss-free balance: bias step (DeepSeek-V3: 0.001); 0: off
    moe_capacity: float = 0.0  # places of an expert / mean load (Switch: 1.25); 0: drop no token
    bias: bool = False  # use biases in linear layers and layernorm
    qk_norm: bool = True  # RMS norm of each query and key head, as in Qwen3; stabilises training
    qk_norm_over: str = "head"  # head | layer: over each head alone, or over all of them (OLMo 2)
    # none | head | channel: a sigmoid of the input gates what each head (or channel) gives.
    attention_gate: str = "none"
    scale_embedding: bool = False  # multiply the embedding by sqrt(width), as Gemma
    logit_softcap: float = 0.0  # logits = cap * tanh(logits / cap), as Gemma 2 (30); 0: off
    tie_embeddings: bool = False  # use one matrix for the token embedding and the output head
    dropout: float = 0.0  # dropout rate after the embedding, in attention and on residual branches
    z_loss: float = 0.0  # coefficient of the log(Z)^2 penalty (PaLM: 1e-4); 0: off
    loss_chunk: int = field(default=512, metadata=_NUMERICS)  # targets per loss chunk; 0: all
    # Keep only the input of each layer, and compute the rest again in the backward pass.
    activation_checkpointing: bool = field(default=False, metadata=_NUMERICS)
    init_std: float | None = None  # None: see models/parametrization.py
    parametrization: str = "standard"  # standard | mup | completep
    base_width: int = 256  # mup, completep: width for which optimizer.learning_rate was tuned
    base_depth: int = 4  # completep: num_layers for which optimizer.learning_rate was tuned

    def problems(
        self, vocab_size: int | None = None, sequence_length: int | None = None
    ) -> list[Problem]:
        """Return the broken rules as (field, what, todo); without any, the model can be built.

        Args: `vocab_size` and `sequence_length` of the data, if known; the vocabulary with the ids
        that the objective adds.
        """
        found = self._problems_of_values() or self._problems_of_scaling()
        found = found or MLPS[self.mlp].problems(self) or self._problems_without_experts()
        if found:
            return found
        if self.depth is None and (self.num_layers is None or self.width is None):
            return [("depth", "the model has no size", "give depth, or num_layers and width")]
        full = self._sized()
        width, num_heads, num_kv_heads = full.width, full.num_heads, full.num_kv_heads
        assert width is not None
        assert num_heads is not None
        assert num_kv_heads is not None
        if self.num_heads is None and width % HEAD_DIM:
            found.append(
                ("num_heads", f"{HEAD_DIM} does not divide width {width}", "give num_heads")
            )
        elif width % num_heads:
            what = f"{num_heads} heads do not divide width {width}"
            found.append(("num_heads", what, "choose a divisor of width"))
        elif full.position == "rotary" and width // num_heads % 2:
            what = f"rotary position needs even heads, not {width // num_heads} wide"
            found.append(("num_heads", what, "choose another num_heads or position"))
        elif full.position == "rotary" and width // num_heads * (full.rope_fraction or 1) % 2:
            what = f"{full.rope_fraction:g} of {width // num_heads} is not an even number"
            found.append(("rope_fraction", what, "choose one that gives an even part of a head"))
        elif full.rope_scaling == "ntk" and width // num_heads < 4:
            found.append(("num_heads", "ntk needs heads of at least 4", "choose fewer heads"))
        if self._halves_rotation and self.rope_fraction == 1:
            what = "mixer latent needs a part of each head that does not rotate"
            found.append(("rope_fraction", what, "give less than 1, or leave it out"))
        if self._has_latent and (self.latent_rank or 0) >= 2 * width:
            what = f"{self.latent_rank} does not compress keys and values, {2 * width} a token"
            found.append(("latent_rank", what, "give less, or leave it out"))
        if num_heads % num_kv_heads:
            what = f"{num_kv_heads} do not divide {num_heads} heads"
            found.append(("num_kv_heads", what, "choose a divisor of num_heads"))
        if self.mlp == "moe":
            found += problems_of_experts(self, full)
        if full.position == "sinusoidal" and width % 2:
            found.append(("width", "sinusoidal position needs an even width", "make it even"))
        if len(self.mixer_pattern) > (full.num_layers or 0):
            what = f"{len(self.mixer_pattern)} mixers for {full.num_layers} layers"
            found.append(("mixer_pattern", what, "give at most one a layer"))
        if self.vocab_size and vocab_size and self.vocab_size < vocab_size:
            what = f"{self.vocab_size} is less than the {vocab_size} of tokenizer and objective"
            found.append(("vocab_size", what, "leave it out, or give at least as many"))
        if self.source_length and sequence_length and self.source_length >= sequence_length:
            what = f"{self.source_length} leaves the decoder none of {sequence_length} columns"
            found.append(("source_length", what, "leave it out"))
        longest = self.max_sequence_length
        if longest and sequence_length and longest < sequence_length:
            what = f"{longest} is less than the sequence length {sequence_length}"
            found.append(("max_sequence_length", what, "leave it out, or raise it"))
        return found

    def _problems_of_values(self) -> list[Problem]:
        found: list[Problem] = []
        sizes = ("depth", "num_layers", "width", "num_heads", "num_kv_heads", "mlp_width")
        bases = ("base_width", "base_depth", "delta_value_dim", "delta_conv")
        ranks = ("latent_rank", "latent_query_rank")
        lengths = ("max_sequence_length", "rope_original_length", "source_length")
        for name in (*sizes, "vocab_size", *lengths, *bases, *ranks):
            value = getattr(self, name)
            if value is not None and value < 1:
                found.append((name, f"{value} is not a size", "give at least 1"))
        for name in ("depth", "num_layers"):
            if (getattr(self, name) or 0) > MOST_LAYERS:
                what = f"{getattr(self, name)} layers are too many"
                found.append((name, what, f"give at most {MOST_LAYERS:,}"))
        choices = [("position", POSITIONS), ("norm", NORMS), ("mixer", tuple(MIXERS))]
        choices += [("mlp", tuple(MLPS)), ("rope_scaling", ROPE_SCALINGS)]
        choices += [("norm_placement", NORM_PLACEMENTS), ("qk_norm_over", QK_NORM_OVER)]
        choices += [("attention_gate", ATTENTION_GATES)]
        choices += [("mixer_pattern", tuple(MIXERS)), ("parametrization", PARAMETRIZATIONS)]
        for name, known in choices:
            given = getattr(self, name)
            for value in given if isinstance(given, list) else [given]:
                if value not in known:
                    todo = f"choose from {', '.join(known)}"
                    found.append((name, f"unknown value {value!r}", todo))
        for name in ("rope_theta", "norm_eps"):
            if not getattr(self, name) > 0:
                found.append((name, "must be above 0", "give a positive number"))
        for name in ("z_loss", "loss_chunk", "logit_softcap"):
            if not getattr(self, name) >= 0:
                found.append((name, "must not be negative", "give 0 to switch it off"))
        if self.rope_fraction is not None and not 0 < self.rope_fraction <= 1:
            found.append(("rope_fraction", "is not a part of a head", "give above 0 to 1"))
        if not 0 <= self.dropout < 1:
            found.append(("dropout", f"{self.dropout} is not a probability below 1", "give 0 to 1"))
        if self.init_std is not None and not self.init_std > 0:
            found.append(("init_std", "must be above 0", "leave it out for the rule"))
        return found

    def _problems_without_experts(self) -> list[Problem]:
        """Return the keys moe_* that are set though there are no experts."""
        if self.mlp == "moe":
            return []
        keys = [f for f in fields(self) if f.name.startswith("moe_")]
        given = [key.name for key in keys if getattr(self, key.name) != key.default]
        todo = "leave it out, or choose mlp=moe"
        return [(name, f"has no effect with mlp={self.mlp}", todo) for name in given]

    def _problems_of_scaling(self) -> list[Problem]:
        """Return the broken rules of positions among values that are each allowed."""
        found = self._problems_of_encoder()
        kind, factor = self.rope_scaling, self.rope_factor
        for mixer in dict.fromkeys(self.mixer_pattern or [self.mixer]):
            if self.position == "alibi" and not MIXERS[mixer].takes_alibi:
                what = f"mixer {mixer} does not add alibi's biases to scores"
                found.append(("position", what, "choose another position"))
            if not self.causal and not MIXERS[mixer].takes_future:
                what = f"mixer {mixer} can't let a token see later ones"
                found.append(("causal", what, "choose another mixer, or leave it out"))
        if self.position == "alibi" and not self.causal:
            todo = "choose another position"
            found.append(("position", "alibi's biases are for causal models", todo))
        if self.rope_fraction not in (None, 1) and self.position != "rotary":
            todo = "leave it out, or choose position=rotary"
            found.append(("rope_fraction", f"{self.position} positions don't rotate", todo))
        if self.scale_embedding and self.position == "sinusoidal":
            what = "sinusoidal positions scale the embedding already"
            found.append(("scale_embedding", what, "leave it out"))
        if kind != "none" and self.position != "rotary":
            what = f"{kind} scales rotary positions, not {self.position}"
            found.append(("rope_scaling", what, "leave it out, or choose position=rotary"))
        elif kind == "none" and factor != 1:
            todo = "choose rope_scaling=ntk or yarn, or leave it out"
            found.append(("rope_factor", "has no effect without rope_scaling", todo))
        elif kind != "none" and not 1 < factor < math.inf:
            what = f"{factor} does not lengthen the context"
            found.append(("rope_factor", what, "give new length / original length, above 1"))
        elif kind == "yarn" and self.rope_theta <= 1:
            found.append(("rope_theta", "yarn needs more than 1", "give more, such as 10000"))
        if kind != "yarn" and self.rope_original_length:
            todo = "leave it out, or choose rope_scaling=yarn"
            found.append(("rope_original_length", "only yarn depends on it", todo))
        return found

    def _problems_of_encoder(self) -> list[Problem]:
        """Return the broken rules of an encoder-decoder."""
        if not self.encoder_layers:
            if self.source_length:
                return [("source_length", "there is no encoder", "leave it out")]
            return []
        if not 0 < self.encoder_layers <= MOST_LAYERS:
            what = f"{self.encoder_layers} is not a number of layers"
            return [("encoder_layers", what, f"give 0 to {MOST_LAYERS:,}")]
        found: list[Problem] = []
        if not self.causal:
            what = "the decoder of an encoder-decoder sees no later token"
            found.append(("causal", what, "leave it out"))
        if self.position == "alibi":
            todo = "choose another position"
            found.append(("position", "alibi's biases are for causal models", todo))
        if self.mlp == "moe":
            what = "an encoder-decoder has no experts"
            found.append(("mlp", what, "choose another mlp, or leave out encoder_layers"))
        if self.parametrization == "completep":
            what = "completep has a rule for one stack of layers, not for encoder and decoder"
            found.append(("parametrization", what, "choose mup or standard"))
        for mixer in dict.fromkeys(self.mixer_pattern or [self.mixer]):
            if not MIXERS[mixer].takes_future:
                what = f"mixer {mixer} can't let a token of the encoder see later ones"
                found.append(("encoder_layers", what, "choose another mixer"))
        return found

    def resolved(
        self, vocab_size: int | None = None, sequence_length: int | None = None
    ) -> "ModelConfig":
        """Return the same model with every size set, by the rule or from the data.

        Raises ValueError with one sentence if there are problems() or a size is still unknown.
        """
        for name, what, todo in self.problems(vocab_size, sequence_length):
            raise ValueError(f"model.{name}: {what}; {todo}.")
        full = replace(
            self._sized(),
            vocab_size=self.vocab_size or vocab_size,
            max_sequence_length=self.max_sequence_length or sequence_length,
        )
        for name in ("vocab_size", "max_sequence_length", *["source_length"] * self.has_encoder):
            if getattr(full, name) is None:
                raise ValueError(f"model.{name}: not known from the data; give it.")
        return full

    @cached_property
    def sizes(self) -> Sizes:
        """All sizes as plain numbers. Raises ValueError like resolved()."""
        full = self.resolved()
        return Sizes(**{size.name: getattr(full, size.name) for size in fields(Sizes)})

    @cached_property
    def mixers(self) -> tuple[str, ...]:
        """The mixer of each layer. Raises ValueError like resolved()."""
        pattern = self.mixer_pattern or [self.mixer]
        return tuple(pattern[i % len(pattern)] for i in range(self.num_blocks))

    @property
    def has_encoder(self) -> bool:
        """True for an encoder-decoder."""
        return self.encoder_layers > 0

    @property
    def num_blocks(self) -> int:
        """The layers of encoder and decoder. Raises ValueError like resolved()."""
        return self.encoder_layers + self.sizes.num_layers

    def of_block(self, index: int) -> "ModelConfig":
        """Return the config of a block: in the encoder of an encoder-decoder, an encoder's."""
        if index >= self.encoder_layers:
            return self
        return replace(self, causal=False, encoder_layers=0, source_length=None)

    @property
    def rotary_width(self) -> int:
        """The part of each head that rotates: head_dim * rope_fraction."""
        return round(self.sizes.head_dim * (self._sized().rope_fraction or 1))

    @property
    def expert_width(self) -> int:
        """The width of an expert of a mixture. Raises ValueError like resolved()."""
        width = self.resolved().moe_width
        assert width is not None, "a config without experts"
        return width

    @property
    def original_length(self) -> float:
        """The sequence length before scaling, for yarn. Raises ValueError like resolved()."""
        return self.rope_original_length or self.sizes.max_sequence_length / self.rope_factor

    @property
    def _has_latent(self) -> bool:
        return "latent" in (self.mixer_pattern or [self.mixer])

    @property
    def _halves_rotation(self) -> bool:
        return self._has_latent and self.position == "rotary"

    def _sized(self) -> "ModelConfig":
        """Apply the rule of the class docstring; needs depth, or num_layers and width."""
        width = self.width or WIDTH_PER_LAYER * (self.depth or 0)
        num_heads = self.num_heads or max(1, width // HEAD_DIM)
        gated = -(-8 * width // (3 * 64)) * 64
        mlp_width = self.mlp_width or (gated if MLPS[self.mlp].is_gated else 4 * width)
        active = self.moe_top_k + self.moe_shared
        return replace(
            self,
            num_layers=self.num_layers or self.depth,
            width=width,
            num_heads=num_heads,
            num_kv_heads=self.num_kv_heads or num_heads,
            mlp_width=mlp_width,
            rope_fraction=self.rope_fraction or (0.5 if self._halves_rotation else 1.0),
            moe_width=self.moe_width or (mlp_width // active if self.mlp == "moe" else None),
        )
