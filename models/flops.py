"""What a model costs: parameters, FLOPs, activation bytes. The only such formulas in the project.

A FLOP here is one multiplication or addition inside a matrix product, as in PaLM's appendix B
(arXiv 2204.02311) and torch.utils.flop_counter; norms, softmax and the like are left out. The
backward pass is twice the forward. Nothing is counted twice for recomputation (activation
checkpointing, the chunks of the loss, flash attention's scores): MFU, not HFU. Tests hold these
numbers against torch's counter to the last FLOP. Imports no torch. A config whose
vocabulary or longest sequence is unknown raises ValueError.
"""

from dataclasses import dataclass

from forescale.models.config import ModelConfig


@dataclass(frozen=True)
class Counts:
    """Parameters. total = embedding + position + non_embedding + (head, unless it is tied)."""

    total: int  # every trainable parameter, once
    embedding: int  # the token table
    position: int  # the learned position table, else 0
    blocks: int  # all layers
    non_embedding: int  # blocks and final norm: Kaplan's N
    head: int  # the matrix that makes logits, also where it is the token table (tied)

    @property
    def blocks_and_head(self) -> int:
        """What a token is multiplied with: the N whose 6N is nearest to the FLOPs."""
        return self.blocks + self.head


def count(config: ModelConfig) -> Counts:
    """Parameters of a Transformer of this config."""
    s = config.sizes
    norm = s.width * (2 if config.norm == "layernorm" and config.bias else 1)
    mlp_wide = s.mlp_width * (2 if config.mlp == "swiglu" else 1)
    biases = 3 * s.width + 2 * s.kv_width + mlp_wide
    heads_norm = 2 * s.head_dim if config.qk_norm else 0
    layer = _layer_matrices(config) + 2 * norm + heads_norm + (biases if config.bias else 0)
    table = s.vocab_size * s.width
    position = s.max_sequence_length * s.width if config.position == "learned" else 0
    blocks = s.num_layers * layer
    tables = table if config.tie_embeddings else 2 * table
    return Counts(
        total=tables + position + blocks + norm,
        embedding=table,
        position=position,
        blocks=blocks,
        non_embedding=blocks + norm,
        head=table,
    )


def flops_per_token(config: ModelConfig, sequence_length: int, causal: bool = False) -> int:
    """Forward and backward FLOPs of one token in a sequence of this length, head included.

    causal=False counts attention over the whole square (PaLM's convention, for MFU): a token meets
    L keys. causal=True counts what a causal model needs, exactly: (L + 1) / 2 keys on average.
    Attention within documents needs fewer; that is not taken off, so that the price of a token does
    not depend on the data. Evaluation and generation (forward only) cost a third.
    """
    s = config.sizes
    matmul = s.num_layers * _layer_matrices(config) + s.vocab_size * s.width
    doubled_keys = sequence_length + 1 if causal else 2 * sequence_length
    # scores and their product with the values: 2 * width FLOPs each for every key that is met
    attention = s.num_layers * 2 * s.width * doubled_keys
    return 3 * (2 * matmul + attention)


def flops_6n(config: ModelConfig) -> int:
    """6N FLOPs of one token, N = blocks + head (Kaplan et al. 2020, section 2.1): no attention."""
    return 6 * count(config).blocks_and_head


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter's name and shape, in the order of Transformer.named_parameters()."""
    s = config.sizes

    def norm(name: str) -> dict[str, tuple[int, ...]]:
        has_bias = config.norm == "layernorm" and config.bias
        return {f"{name}.{kind}": (s.width,) for kind in ("weight", "bias")[: 1 + has_bias]}

    def linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        bias = {f"{name}.bias": (outputs,)} if config.bias else {}
        return {f"{name}.weight": (outputs, inputs), **bias}

    found: dict[str, tuple[int, ...]] = {"embedding.weight": (s.vocab_size, s.width)}
    if config.position == "learned":
        found["position.weight"] = (s.max_sequence_length, s.width)
    for i in range(s.num_layers):
        at = f"blocks.{i}."
        found |= norm(at + "attention_norm")
        for name, outputs in (("query", s.width), ("key", s.kv_width), ("value", s.kv_width)):
            found |= linear(f"{at}attention.{name}", s.width, outputs)
        found |= linear(at + "attention.output", s.width, s.width)
        if config.qk_norm:
            for name in ("query", "key"):
                found[f"{at}attention.{name}_norm.weight"] = (s.head_dim,)
        found |= norm(at + "mlp_norm")
        for name in ("gate", "up") if config.mlp == "swiglu" else ("up",):
            found |= linear(f"{at}mlp.{name}", s.width, s.mlp_width)
        found |= linear(at + "mlp.down", s.mlp_width, s.width)
    found |= norm("norm")
    if not config.tie_embeddings:
        found["head.weight"] = (s.vocab_size, s.width)
    return found


def matrices(config: ModelConfig) -> set[str]:
    """Names of the hidden matrices, which Muon takes; Transformer.muon_parameters() without it."""
    every = shapes(config).items()
    return {name for name, shape in every if len(shape) == 2 and name.startswith("blocks.")}


def flops_recomputed(config: ModelConfig, sequence_length: int) -> int:
    """FLOPs of one token that a step makes twice, beyond `flops_per_token`: the head's forward for
    a loss in chunks; with activation checkpointing the forward of every layer."""
    s = config.sizes
    head = 2 * s.vocab_size * s.width if config.loss_chunk else 0
    layers = flops_per_token(config, sequence_length) // 3 - 2 * s.vocab_size * s.width
    return head + (layers if config.activation_checkpointing else 0)


@dataclass(frozen=True)
class Activations:
    """Bytes that a micro-batch's forward leaves for its backward, and what the backward adds."""

    layers: int  # of every layer; with activation checkpointing, each layer's input alone
    again: int  # with activation checkpointing: the one layer that is made again at a time
    head: int  # the final norm's input and output
    logits: int  # of a chunk of the loss: as they come, their fp32 gradient, and that rounded
    mask: int  # of documents or padding, one for all layers
    kept_logits: int  # of `logits`, what the forward leaves: where all targets fit one chunk

    @property
    def total(self) -> int:
        """The most that stands at a time."""
        return self.layers + self.again + self.head + self.logits + self.mask

    @property
    def saved(self) -> int:
        """What autograd keeps when the forward is through."""
        return self.layers + self.head + self.kept_logits + self.mask


def activations(
    config: ModelConfig,
    micro_batch: int,
    sequence_length: int,
    bytes_per_value: int = 2,
    masked: bool = False,
    fused_norms: bool = True,
) -> Activations:
    """An estimate of the memory of one micro-batch's activations, by kind.

    Counts the tensors that autograd keeps (as Korthikanti et al. 2022, arXiv 2205.05198, section
    4, for this architecture with flash attention), per token and layer, in values of
    `bytes_per_value` unless fp32 is said: both norms' inputs (fp32) and outputs; queries and keys
    before QK-norm (fp32) and as they enter attention; values; attention's output and its
    normaliser (fp32, one a head); and in the MLP four tensors of its width for swiglu, two for gelu
    and relu2. Where RMSNorm is not one kernel (fused_norms=False: a CPU), its input is kept once
    more. At the end the final norm, and the logits of one chunk, as they come and as fp32
    gradients. Dropout adds a byte a value. A masked forward (documents or padding) has its mask
    beside it, one for all layers.
    Not in it: parameters, gradients, the allocator's slack. torch.compile keeps less. Attention
    with dropout keeps more where no flash kernel does dropout (CPU).
    """
    s, b = config.sizes, bytes_per_value
    tokens = micro_batch * sequence_length
    heads = s.width + s.kv_width
    rms = 8 if not fused_norms else 4  # bytes of a norm's input
    norm = rms if config.norm == "rmsnorm" else 4
    layer = 2 * (norm + b) * s.width  # norms
    layer += b * (heads + s.kv_width + s.width)  # queries and keys, values, output
    layer += 4 * s.num_heads
    layer += rms * heads if config.qk_norm else 0
    layer += b * s.mlp_width * (4 if config.mlp == "swiglu" else 2)
    layer += 2 * s.width if config.dropout else 0
    kept = b * s.width if config.activation_checkpointing else layer
    chunk = min(tokens, config.loss_chunk or tokens)
    return Activations(
        layers=tokens * s.num_layers * kept,
        again=tokens * layer if config.activation_checkpointing else 0,
        head=tokens * (norm + b) * s.width,
        logits=chunk * s.vocab_size * (2 * b + 4),
        mask=b * tokens * sequence_length if masked else 0,
        kept_logits=b * tokens * s.vocab_size if chunk == tokens else 0,
    )


def activation_bytes(
    config: ModelConfig,
    micro_batch: int,
    sequence_length: int,
    bytes_per_value: int = 2,
    masked: bool = False,
) -> int:
    """The most that one micro-batch's activations take at a time; see `activations`."""
    return activations(config, micro_batch, sequence_length, bytes_per_value, masked).total


def _layer_matrices(config: ModelConfig) -> int:
    """Values in the matrices of one layer."""
    s = config.sizes
    mlp = (3 if config.mlp == "swiglu" else 2) * s.width * s.mlp_width
    return 2 * s.width**2 + 2 * s.width * s.kv_width + mlp
