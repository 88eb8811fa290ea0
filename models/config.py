"""The config of the model, its rules, and `depth`, the one key that sets all sizes.

Invariant: a ModelConfig without problems() can be built; resolved() sets every size and changes no
given value. Imports no torch: a plan reads this file on a login node.
"""

from dataclasses import dataclass, field, fields, replace
from functools import cached_property

from forescale.models import effects, rules
from forescale.models.costs import MIXERS, MLPS
from forescale.models.costs.record import Problem
from forescale.models.rules import HEAD_DIM

_WIDTH_PER_LAYER = 64


@dataclass(frozen=True)
class Sizes:
    """The sizes of a config, all of them set."""

    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int  # width of one head
    mlp_width: int
    vocab_size: int
    max_sequence_length: int

    @property
    def heads_width(self) -> int:
        """Width of all query heads of a token: num_heads * head_dim; most models choose it to be
        `width`."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all keys (or values) of a token: num_kv_heads * head_dim."""
        return self.num_kv_heads * self.head_dim


_CPU_CHUNK = 512  # targets
_NUMERICS = {"kind": "numerics"}  # may change on resume; every other field shapes the trajectory


@dataclass(frozen=True)
class ModelConfig:
    """A transformer: a causal decoder by default.

    Give only `depth`, or `num_layers` and `width`. Other given sizes override the rule.
    The rule for a size that is not given:

    1. num_layers = depth.
    2. width = 64 * depth. nanochat's dial (base_train.py, aspect ratio 64), and GPT-2 small's 12
       by 768. Doubt: Kaplan et al. 2020 (arXiv 2001.08361, figure 5) find that the ratio of width
       to depth can vary by a factor of 40 with little change of the loss, so 64 is a habit, not
       an optimum; large published models are wider (Llama 7B: 128).
    3. num_heads = width / 64: heads of 64, as in Vaswani et al. 2017 and all of GPT-2. A width
       that 64 doesn't divide needs num_heads. With head_dim, heads of this width instead.
    4. num_kv_heads = num_heads: plain multi-head attention.
    5. mlp_width = 4 * width (Vaswani et al. 2017, section 3.3); for swiglu and geglu 8/3 * width,
       which with its third matrix holds as many parameters (Shazeer 2020, arXiv 2002.05202, section
       2), rounded up to a multiple of 64 for the matrix units; moe as swiglu.
    6. moe_width = mlp_width / (moe_top_k + moe_shared), so that a token's FLOPs are those of the
       dense model (Dai et al. 2024, arXiv 2401.06066, section 3.1). Doubt: Mixtral's experts are
       as wide as a dense MLP.
    """

    depth: int | None = None  # sets num_layers and width (64 * depth); or give both
    num_layers: int | None = None  # None: depth
    width: int | None = None  # None: 64 * depth
    num_heads: int | None = None  # None: width / 64
    num_kv_heads: int | None = None  # fewer than num_heads: grouped-query; None: num_heads
    head_dim: int | None = None  # width of a head; None: width / num_heads
    mlp_width: int | None = None  # None: 4 * width, or 8/3 * width with a gate
    vocab_size: int | None = None  # None: the dataset's
    max_sequence_length: int | None = None  # of a row; None: the training's

    position: str = "rotary"  # rotary | alibi | relative (T5) | learned | sinusoidal | none
    rope_theta: float = 10_000.0  # Su et al. 2021, arXiv 2104.09864
    rope_scaling: str = "none"  # none | ntk | yarn | llama3: models/positions/rope_scaling.py
    rope_factor: float = 1.0  # of a scaling: new length / original length
    # Of yarn and llama3; None: max_sequence_length / rope_factor.
    rope_original_length: int | None = None
    relative_buckets: int = 32  # relative: entries of a head's table of distances (T5: 32)
    relative_distance: int = 128  # relative: from here on all distances share an entry (T5: 128)
    # The part of each head that rotates; the rest has no position. None: all, with latent half.
    rope_fraction: float | None = None
    norm: str = "rmsnorm"  # rmsnorm | layernorm
    # pre | post | sandwich: before a part, after it (OLMo 2), or both; residual: after its sum with
    # the residual stream (Vaswani et al. 2017, BERT), and so no norm at the end.
    norm_placement: str = "pre"
    embedding_norm: bool = False  # a norm after the embedding and its positions, as BERT
    norm_eps: float = 1e-6  # added to the variance in norms
    # How tokens exchange information:
    # attention | window | block_sparse | gated_deltanet | latent | lstm | mingru
    mixer: str = "attention"
    # Mixers of successive layers, repeated over the depth, such as [mingru, mingru, attention];
    # empty: `mixer` in each layer.
    mixer_pattern: list[str] = field(default_factory=list)
    delta_value_dim: int | None = None  # gated_deltanet: width of a value head; None: head width
    delta_conv: int = 4  # gated_deltanet: tokens that its short convolution reads
    latent_rank: int | None = None  # latent: width of what is cached; None: 4 heads, half of all
    latent_query_rank: int | None = None  # latent: width of the queries' latent; None: no latent
    # Layers of an encoder before the num_layers of the decoder (objective=seq2seq or prefix);
    # 0: none.
    encoder_layers: int = 0
    source_length: int | None = None  # columns that the encoder reads; None: as the objective says
    window: int | None = None  # mixer=window: tokens that a token sees, itself included
    global_tokens: int = 0  # mixer=window: first tokens of a document that all its tokens see
    sparse_pattern: str = "strided"  # mixer=block_sparse: strided | fixed | bigbird
    sparse_block: int = 64  # mixer=block_sparse: tokens per block
    sparse_local: int = 4  # mixer=block_sparse: blocks of the neighbourhood; strided, fixed: stride
    sparse_global: int = 1  # bigbird: first blocks of a document that all its tokens see
    sparse_random: int = 2  # bigbird: random blocks that a block sees
    causal: bool = True  # a token sees no later one; false: an encoder, for objective=masked
    # swiglu | geglu | gelu (tanh) | gelu_exact | relu | relu2 | moe: experts, models/experts/moe.py
    mlp: str = "swiglu"
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
    qkv_bias: bool = False  # use biases of queries, keys and values alone, as Qwen2
    qk_norm: bool = True  # RMS norm of each query and key head, as in Qwen3; stabilises training
    qk_norm_over: str = "head"  # head | layer: over each head alone, or over all of them (OLMo 2)
    # none | head | channel: a sigmoid of the input gates what each head (or channel) gives.
    attention_gate: str = "none"
    token_shift: bool = False  # queries, keys and values have a part of the token's before
    # The part of each later layer's values that are the first layer's (ResFormer: 0.5); 0: none.
    value_residual: float = 0.0
    # 1: each layer adds a vector of the token itself to its values, 2: every second layer, counted
    # from the last, and so on; 0: none (models/embeddings/values.py).
    value_embedding: int = 0
    # Rows of a table of pairs of tokens, which is added to the embedding; 0: none
    # (models/embeddings/bigrams.py).
    bigram_rows: int = 0
    scale_embedding: bool = False  # multiply the embedding by sqrt(width), as Gemma
    logit_softcap: float = 0.0  # logits = cap * tanh(logits / cap), as Gemma 2 (30); 0: off
    head: str = "linear"  # linear | dense: BERT's: dense, GELU and norm first, a bias of each logit
    tie_embeddings: bool = False  # use one matrix for the token embedding and the output head
    dropout: float = 0.0  # dropout rate after the embedding, in attention and on residual branches
    # Modules that predict the tokens after the next one, in training alone (DeepSeek-V3: 1); 0: no.
    mtp_layers: int = 0
    mtp_weight: float = 0.3  # of their mean loss in the objective (DeepSeek-V3: 0.3, then 0.1)
    z_loss: float = 0.0  # coefficient of the log(Z)^2 penalty (PaLM: 1e-4); 0: off
    # Targets per chunk of the loss; None: 512 on a CPU, up to 8192 on a GPU; 0: all.
    loss_chunk: int | None = field(default=None, metadata=_NUMERICS)
    # Columns of a row that an MLP computes at once, and again in the backward pass; None: all, and
    # nothing again.
    mlp_chunk: int | None = field(default=None, metadata=_NUMERICS)
    # none | selective | full: what the backward pass computes again instead of keeping it: of each
    # layer all but matrix products and attention, or all but its input.
    activation_checkpointing: str = field(default="none", metadata=_NUMERICS)
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
        return rules.problems(self, vocab_size, sequence_length)

    def unread(self) -> list[Problem]:
        """Return the keys that have no effect in this model, as problems() has them."""
        return effects.unread(self)

    def resolved(
        self, vocab_size: int | None = None, sequence_length: int | None = None
    ) -> "ModelConfig":
        """Return the same model with every size set, by the rule or from the data.

        Raises ValueError with one sentence if there are problems() or a size is still unknown.
        """
        for name, problem, todo in self.problems(vocab_size, sequence_length):
            raise ValueError(f"model.{name}: {problem}; {todo}.")
        full = replace(
            self.sized(),
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
        given: dict[str, int] = {size.name: getattr(full, size.name) for size in fields(Sizes)}
        # Not set by sized(): who takes a config and makes it wider would keep the old heads.
        return Sizes(**given | {"head_dim": full.head_dim or given["width"] // given["num_heads"]})

    @property
    def mixers_used(self) -> list[str]:
        """The mixers that some layer has, each once."""
        return list(dict.fromkeys(self.mixer_pattern or [self.mixer]))

    @cached_property
    def mixers(self) -> tuple[str, ...]:
        """The mixer of each block; in an encoder-decoder the pattern runs on from the encoder into
        the decoder. Raises ValueError like resolved()."""
        pattern = self.mixer_pattern or [self.mixer]
        return tuple(pattern[i % len(pattern)] for i in range(self.num_blocks))

    @property
    def value_layers(self) -> list[int]:
        """The layers that have a value embedding. Raises ValueError like resolved()."""
        every, last = self.value_embedding, self.num_blocks - 1
        return [i for i in range(last + 1) if every and (last - i) % every == 0]

    @property
    def has_encoder(self) -> bool:
        """True for an encoder-decoder."""
        return self.encoder_layers > 0

    @property
    def has_experts(self) -> bool:
        """True if the MLP of some layer is a mixture of experts."""
        return MLPS[self.mlp].is_routed

    @property
    def norms_before(self) -> bool:
        """True if a part of a block reads a norm of the stream."""
        return self.norm_placement in ("pre", "sandwich")

    @property
    def norms_after(self) -> bool:
        """True if a norm follows a part of a block."""
        return self.norm_placement != "pre"

    @property
    def norms_stream(self) -> bool:
        """True if a stack of blocks ends with a norm of its own, as the stream isn't normed."""
        return self.norm_placement != "residual"

    def targets_at_once(self, on_gpu: bool) -> int:
        """Return the targets of a chunk of the loss; 0: all. Raises ValueError like resolved().

        On a CPU the logits of 512 stay in the cache. A GPU wants large products, and its logits
        shall take at most 1 GiB with their gradients: 4096 of 32,768 tokens, 1024 of 131,072.
        """
        if self.loss_chunk is not None:
            return self.loss_chunk
        if not on_gpu:
            return _CPU_CHUNK
        return max(_CPU_CHUNK, min(8192, 2**27 // self.sizes.vocab_size // 256 * 256))

    @property
    def num_blocks(self) -> int:
        """The layers of encoder and decoder. Raises ValueError like resolved()."""
        return self.encoder_layers + self.sizes.num_layers

    def of_block(self, index: int) -> "ModelConfig":
        """Return the config of a block: in the encoder of an encoder-decoder, an encoder's."""
        return self if index >= self.encoder_layers else self._encoder

    @cached_property
    def _encoder(self) -> "ModelConfig":
        found = replace(self, causal=False, encoder_layers=0, source_length=None)
        # The whole has been checked; alone, it may have keys that only the decoder reads.
        found.__dict__["sizes"] = replace(self.sizes, num_layers=self.encoder_layers)
        return found

    @property
    def rotates(self) -> bool:
        """True if some mixer rotates its queries and keys by their positions."""
        mixers = (MIXERS[name] for name in self.mixers_used)
        return self.position == "rotary" and any("position" in part.reads for part in mixers)

    @property
    def rotary_width(self) -> int:
        """The part of each head that rotates: head_dim * rope_fraction."""
        return round(self.sizes.head_dim * (self.rope_fraction or self.sized().rope_fraction or 1))

    @property
    def expert_width(self) -> int:
        """The width of an expert of a mixture. Raises ValueError like resolved()."""
        width = self.moe_width or self.resolved().moe_width
        assert width is not None, "a config without experts"
        return width

    @property
    def original_length(self) -> float:
        """The sequence length before scaling, for yarn and llama3. Raises ValueError like
        resolved()."""
        return self.rope_original_length or self.sizes.max_sequence_length / self.rope_factor

    @property
    def ruled_width(self) -> int | None:
        """The width, by rule 2 of the class docstring where only depth is given; None with
        neither."""
        return self.width or (_WIDTH_PER_LAYER * self.depth if self.depth else None)

    def sized(self) -> "ModelConfig":
        """Apply the rule of the class docstring; needs depth, or num_layers and width."""
        width = self.ruled_width or 0
        num_heads = self.num_heads or max(1, width // (self.head_dim or HEAD_DIM))
        gated = -(-8 * width // (3 * 64)) * 64
        mlp_width = self.mlp_width or (gated if MLPS[self.mlp].is_gated else 4 * width)
        active = max(1, self.moe_top_k + self.moe_shared)
        turning = min(MIXERS[mixer].turning for mixer in self.mixers_used)
        return replace(
            self,
            num_layers=self.num_layers or self.depth,
            width=width,
            num_heads=num_heads,
            num_kv_heads=self.num_kv_heads or num_heads,
            mlp_width=mlp_width,
            rope_fraction=self.rope_fraction or (turning if self.position == "rotary" else 1.0),
            moe_width=self.moe_width or (mlp_width // active if self.has_experts else None),
        )
