"""What a model costs: parameters, FLOPs, activation bytes. The only such formulas in the project.

A FLOP here is one multiplication or addition inside a matrix product, as in PaLM's appendix B
(arXiv 2204.02311) and torch.utils.flop_counter; norms, softmax and the like are left out. The
backward pass is twice the forward. Nothing is counted twice for recomputation (activation
checkpointing, the chunks of the loss, flash attention's scores): MFU, not HFU. Tests hold these
numbers against torch's counter to the last FLOP. Imports no torch. A config whose
vocabulary or longest sequence is unknown raises ValueError.
"""

from dataclasses import dataclass

from models.config import ModelConfig


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


def activation_bytes(
    config: ModelConfig,
    micro_batch: int,
    sequence_length: int,
    bytes_per_value: int = 2,
    masked: bool = False,
) -> int:
    """An estimate of the memory that one micro-batch's forward leaves for its backward.

    Counts the tensors that autograd keeps (as Korthikanti et al. 2022, arXiv 2205.05198, section
    4, for this architecture with fused norms and flash attention), per token and layer, in values
    of `bytes_per_value` unless fp32 is said: both norms' inputs (fp32) and outputs; queries and
    keys before QK-norm (fp32) and as they enter attention; values; attention's output; and in the
    MLP four tensors of its width for swiglu, two for gelu and relu2. At the end the final norm, and
    the logits of one chunk, as they come and as fp32 gradients. Dropout adds a byte a value. A
    masked forward (documents or padding) has its mask beside it, one for all layers.
    Not in it: parameters, gradients, the allocator's slack. torch.compile keeps less. Attention
    with dropout keeps more where no flash kernel does dropout (CPU).
    """
    s, b = config.sizes, bytes_per_value
    tokens = micro_batch * sequence_length
    heads = s.width + s.kv_width
    layer = 2 * (4 + b) * s.width  # norms
    layer += b * (heads + s.kv_width + s.width)  # queries and keys, values, output
    layer += 4 * heads if config.qk_norm else 0
    layer += b * s.mlp_width * (4 if config.mlp == "swiglu" else 2)
    layer += 2 * s.width if config.dropout else 0
    if config.activation_checkpointing:
        kept = s.num_layers * b * s.width + layer
    else:
        kept = s.num_layers * layer
    final = (4 + b) * s.width
    chunk = min(tokens, config.loss_chunk or tokens)
    mask = b * tokens * sequence_length if masked else 0
    return tokens * (kept + final) + chunk * s.vocab_size * (2 * b + 4) + mask


def _layer_matrices(config: ModelConfig) -> int:
    """Values in the matrices of one layer."""
    s = config.sizes
    mlp = (3 if config.mlp == "swiglu" else 2) * s.width * s.mlp_width
    return 2 * s.width**2 + 2 * s.width * s.kv_width + mlp
