"""The config of the model, its rules, and `depth`, the one key that sets all sizes.

Invariant: a ModelConfig without problems() can be built; resolved() sets every size and changes no
given value. Imports no torch: a plan reads this file on a login node.
"""

from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal, get_args

from forescale.models import rules
from forescale.models.choices import (
    HEADS,
    NORMS,
    PARAMETRIZATIONS,
    RMS,
    Head,
    LinearHead,
    Norm,
    Standard,
)
from forescale.models.mixers import MIXERS
from forescale.models.mixers.attention import Attention
from forescale.models.mlps import MLPS
from forescale.models.mlps.dense import SwiGLU
from forescale.models.mlps.moe import Experts
from forescale.models.part import Mixer, Mlp, Part, Problem, part_of
from forescale.models.positions.kinds import POSITIONS, Rotary
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


Checkpointing = Literal["none", "selective", "full"]
CHECKPOINTINGS: tuple[Checkpointing, ...] = get_args(Checkpointing)
_CPU_CHUNK = 512  # targets
# Of the size of the table of tokens, that are there at once where the loss is compiled in chunks.
PRODUCTS_AT_ONCE = 4
_NUMERICS = {"kind": "numerics"}  # may change on resume; every other field shapes the trajectory


@dataclass(frozen=True)
class ModelConfig:
    """A transformer: a causal decoder by default.

    Set only `depth`, or `num_layers` and `width`. The rule for each other size that is not set:

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
    6. An expert is mlp_width / (top_k + shared) wide, so that a token's FLOPs are those of the
       dense model (Dai et al. 2024, arXiv 2401.06066, section 3.1). Doubt: Mixtral's experts are
       as wide as a dense MLP.
    """

    depth: int | None = None  # sets num_layers and width (64 * depth); or set these two
    num_layers: int | None = None  # blocks, of an encoder-decoder those of the decoder; None: depth
    width: int | None = None  # of the residual stream; None: 64 * depth
    num_heads: int | None = None  # query heads; None: width / 64
    num_kv_heads: int | None = None  # fewer than num_heads: grouped-query; None: num_heads
    head_dim: int | None = None  # width of a head; None: width / num_heads
    mlp_width: int | None = None  # inside of the MLP; None: 4 * width, or 8/3 * width with a gate
    vocab_size: int | None = None  # None: that of the dataset
    max_sequence_length: int | None = None  # None: the sequence length of the training run

    # How the position of a token enters the model.
    position: Part = field(default_factory=Rotary, metadata={"kinds": POSITIONS})
    # The norms of the residual stream, of queries and of keys.
    norm: Norm = field(default_factory=RMS, metadata={"kinds": NORMS})
    # How tokens exchange information.
    mixer: Mixer = field(default_factory=Attention, metadata={"kinds": MIXERS})
    # Mixers of successive layers, repeated over the depth, such as [mingru, mingru, attention]; a
    # word alone that is the kind of `mixer` has its keys; empty: `mixer` in each layer.
    mixer_pattern: list[Mixer] = field(default_factory=list, metadata={"kinds": MIXERS})
    # What acts on each token alone.
    mlp: Mlp = field(default_factory=SwiGLU, metadata={"kinds": MLPS})
    # What makes the logits.
    head: Head = field(default_factory=LinearHead, metadata={"kinds": HEADS})
    # How initial weights, forward pass and optimizer depend on width and depth.
    parametrization: Part = field(default_factory=Standard, metadata={"kinds": PARAMETRIZATIONS})

    # Layers of an encoder before the num_layers of the decoder (objective=seq2seq or prefix);
    # 0: none.
    encoder_layers: int = 0
    source_length: int | None = None  # columns that the encoder reads; None: by the objective
    causal: bool = True  # a token sees no later one; false: an encoder, for objective=masked
    bias: bool = False  # biases in linear layers and layernorm
    # 1: each layer adds a vector of the token itself to its values, 2: every second layer, counted
    # from the last, and so on; 0: none.
    value_embedding: int = 0
    # Rows of a table of vectors of pairs of tokens, added to the embedding; 0: none.
    bigram_rows: int = 0
    scale_embedding: bool = False  # multiply the embedding by sqrt(width), as Gemma
    tie_embeddings: bool = False  # use one matrix for the token embedding and the output head
    dropout: float = 0.0  # dropout rate after the embedding, in attention and on residual branches
    # Modules that predict the tokens after the next one, in training alone (DeepSeek-V3: 1); 0: no.
    mtp_layers: int = 0
    mtp_weight: float = 0.3  # weight of their mean loss in the objective (DeepSeek-V3: 0.3)
    z_loss: float = 0.0  # coefficient of the log(Z)^2 penalty (PaLM: 1e-4); 0: off
    # Targets per chunk of the loss; None: 512 on a CPU, up to 8192 on a GPU; 0: all.
    loss_chunk: int | None = field(default=None, metadata=_NUMERICS)
    # What the backward pass computes again instead of saving it: of each layer all but matrix
    # products and attention (selective), or all but its input (full).
    activation_checkpointing: Checkpointing = field(default="none", metadata=_NUMERICS)
    # Standard deviation of the initial weights; None: by the parametrization
    init_std: float | None = None

    def __post_init__(self) -> None:
        """Make a part of a word, or of a block such as {"kind": "window", "window": 256}."""
        for f in fields(self):
            if (kinds := f.metadata.get("kinds")) is None:
                continue
            value = getattr(self, f.name)
            is_list = isinstance(value, list)
            part = [part_of(kinds, one) for one in value] if is_list else part_of(kinds, value)
            object.__setattr__(self, f.name, part)
        bare = type(self.mixer)()  # as the word alone of the same kind
        pattern = [self.mixer if mixer == bare else mixer for mixer in self.mixer_pattern]
        object.__setattr__(self, "mixer_pattern", pattern)

    def problems(
        self, vocab_size: int | None = None, sequence_length: int | None = None
    ) -> list[Problem]:
        """Return the broken rules as (field, what, todo); without any, the model can be built.

        Args: `vocab_size` and `sequence_length` of the data, if known; the vocabulary with the ids
        that the objective adds.
        """
        known = self.__dict__.setdefault("_problems", {})  # a plan needs them a thousand times
        if (key := (vocab_size, sequence_length)) not in known:
            known[key] = rules.problems(self, vocab_size, sequence_length)
        return [*known[key]]

    def unread(self) -> list[Problem]:
        """Return the keys that no part of this model reads, as problems() has them."""
        return rules.unread(self)

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
        values: dict[str, int] = {size.name: getattr(full, size.name) for size in fields(Sizes)}
        # Not set by sized(): who takes a config and makes it wider would keep the old heads.
        head_dim = full.head_dim or values["width"] // values["num_heads"]
        return Sizes(**values | {"head_dim": head_dim})

    @property
    def mixers_used(self) -> list[Mixer]:
        """The mixers that some layer has, each once."""
        return list(dict.fromkeys(self.mixer_pattern or [self.mixer]))

    @cached_property
    def mixers(self) -> tuple[Mixer, ...]:
        """The mixer of each block; in an encoder-decoder the pattern runs on from the encoder into
        the decoder. Raises ValueError like resolved()."""
        pattern = self.mixer_pattern or [self.mixer]
        return tuple(pattern[i % len(pattern)] for i in range(self.num_blocks))

    @property
    def shared_values(self) -> float:
        """The share of the first layer's values in those of the later layers; 0: none."""
        return max(mixer.shared_values for mixer in self.mixers_used)

    @property
    def experts(self) -> Experts | None:
        """The mixture of experts, if the MLP is one."""
        return self.mlp if isinstance(self.mlp, Experts) else None

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
    def norms_before(self) -> bool:
        """True if a part of a block reads a norm of the stream."""
        return self.norm.placement in ("pre", "sandwich", "parallel", "shared")

    @property
    def norms_after(self) -> bool:
        """True if a norm follows a part of a block."""
        return self.norm.placement in ("post", "sandwich", "residual")

    @property
    def in_parallel(self) -> bool:
        """True if mixer and MLP read the same stream."""
        return self.norm.placement in ("parallel", "shared")

    @property
    def norms_stream(self) -> bool:
        """True if a stack of blocks ends with a norm of its own, as the stream isn't normed."""
        return self.norm.placement != "residual"

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
        encoder = replace(self, causal=False, encoder_layers=0, source_length=None)
        # The whole has been checked; alone, it may have keys that only the decoder reads.
        encoder.__dict__["sizes"] = replace(self.sizes, num_layers=self.encoder_layers)
        return encoder

    @property
    def rotates(self) -> bool:
        """True if some mixer rotates its queries and keys by their positions."""
        reads = any("position" in mixer.reads for mixer in self.mixers_used)
        return reads and isinstance(self.position, Rotary)

    @property
    def rotary_width(self) -> int:
        """The part of each head that rotates: head_dim * position.fraction."""
        position = self.position
        if isinstance(position, Rotary) and position.fraction is None:
            position = position.sized(self)
        fraction = position.fraction if isinstance(position, Rotary) else None
        return round(self.sizes.head_dim * (fraction or 1))

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
        sized = replace(
            self,
            num_layers=self.num_layers or self.depth,
            width=width,
            num_heads=num_heads,
            num_kv_heads=self.num_kv_heads or num_heads,
            mlp_width=self.mlp_width or (gated if self.mlp.is_gated else 4 * width),
        )
        parts: dict[str, Any] = {
            f.name: getattr(sized, f.name) for f in fields(self) if "kinds" in f.metadata
        }
        for name, part in parts.items():
            is_list = isinstance(part, list)
            parts[name] = [one.sized(sized) for one in part] if is_list else part.sized(sized)
        return replace(sized, **parts)
