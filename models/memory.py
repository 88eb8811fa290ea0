"""The bytes that a model keeps beside its weights: activations in training, a cache in decoding.

The only such formulas in the project; those of a mixer or MLP are its methods (part.py).
Tests compare them with what autograd keeps and what a cache allocates. Imports no torch. A config
whose vocabulary or longest sequence is unknown raises ValueError.
"""

from dataclasses import dataclass, replace

from forescale.models.config import ModelConfig
from forescale.models.flops import columns_of, in_chunks, layers_of
from forescale.models.part import BlockPart, Mixer, Mlp, Rows, copies

_DIVIDED = ("width", "num_heads", "num_kv_heads", "mlp_width")


@dataclass(frozen=True)
class Activations:
    """Bytes that the forward pass of a micro-batch keeps, and those that the backward pass adds."""

    layers: int  # of all layers; with activation checkpointing their inputs, and kept products
    again: int  # what is recomputed at a time: at most a layer, or a chunk of an MLP
    head: int  # input and output of the final norm, and what a dense head keeps
    logits: int  # of a chunk of the loss: logits, fp32 gradient, rounded gradient; kept_logits
    mask: int  # of documents, padding, alibi or a mixer's view, shared by layers
    kept_logits: int  # the part of `logits` kept by the forward pass, if all fit one chunk

    @property
    def total(self) -> int:
        """Maximum of a step."""
        return self.layers + self.again + self.head + self.logits + self.mask

    @property
    def saved(self) -> int:
        """Bytes that autograd keeps at the end of the forward pass."""
        return self.layers + self.head + self.kept_logits + self.mask


def activations(
    config: ModelConfig,
    micro_batch: int,
    sequence_length: int,
    bytes_per_value: int = 2,
    masked: bool = False,
    fused_norms: bool = True,
    ranks: int = 1,
    tensor: int = 1,
    budget: float | None = None,
) -> Activations:
    """Return an estimate of the activation memory of one micro-batch, by kind.

    Counts the tensors that autograd keeps (as Korthikanti et al. 2022, arXiv 2205.05198, section
    4, for this architecture with flash attention), per token and layer, in values of
    `bytes_per_value` unless marked fp32: inputs (fp32) and outputs of both norms, and those of the
    mixer and the MLP (BlockPart.activation_bytes). If RMSNorm is not one kernel (fused_norms=False:
    a CPU), its input is saved a second time. The final norm and the logits of one chunk, with their
    gradients, are added. There, mixers that have a plain form besides a GPU's kernels run in it,
    and keep Mixer.plain_bytes more, and a chunk of the loss has fewer targets. Dropout adds a byte
    per value. A masked forward pass (documents or padding) has one mask for all layers, and so has
    alibi, with a square for each head. ranks: that divide the columns; then a rank has its own, and
    in attention all columns of its heads, whose output it keeps a second time, as its own columns.
    tensor: ranks that divide the matrices; then a rank has what is inside a part of its heads and
    channels alone, and the logits of its tokens of the vocabulary.
    budget: the part of what the layers keep beside their inputs, if a compiler chooses it.
    Not included: parameters, gradients, the allocator's fragmentation. torch.compile keeps less.
    Attention with dropout keeps more if no flash kernel supports dropout (CPU).
    """
    config = in_chunks(config, sequence_length // ranks)
    s, b, inner = config.sizes, bytes_per_value, of_tensor(config, tensor)
    rows = s.vocab_size if s.vocab_size % tensor else s.vocab_size // tensor
    rms = 8 if not fused_norms else 4  # bytes of a norm's input
    norm = rms if config.norm.kind == "rmsnorm" else 4
    # The part's input, which is a norm's output or the stream itself, and the input of each norm.
    norms = b + norm * (2 if config.norm.placement == "sandwich" else 1)
    plain = [(0, 0)] * config.num_blocks
    if not fused_norms:
        plain = _plain_forms(of_rank(inner, ranks), Rows(micro_batch, sequence_length, b, masked))
    source = micro_batch * columns_of(config, 0, sequence_length)
    # The blocks of modules for later tokens are as the last one.
    blocks = [*range(config.num_blocks), *[config.num_blocks - 1] * config.mtp_layers]
    columns = [micro_batch * columns_of(config, i, sequence_length) // ranks for i in blocks]
    every = layers_of(config)
    layers = [
        count * norms * s.width * len(parts)
        + sum(_inside(p, count, config, tensor, b, rms) for p in parts.values())
        + count * (len(parts) * s.width if config.dropout else 0)
        + source * sum(p.source_bytes(inner, b, rms) for p in parts.values())
        + count * b * _exchanged(inner, parts.mixer, ranks)
        + inside
        for count, parts, (inside, _) in zip(
            columns, [every[i] for i in blocks], [plain[i] for i in blocks], strict=True
        )
    ]
    again = config.activation_checkpointing != "none"
    saved = b * s.width * sum(columns) if again else sum(layers)
    if config.activation_checkpointing == "selective":
        for count, i in zip(columns, blocks, strict=True):
            saved += count * sum(p.selected_bytes(inner, b) for p in every[i].values())
            # What a part writes is as wide as the stream.
            writes = sum(len(p.writes) for p in every[i].values())
            saved += count * b * writes * (s.width - inner.sizes.width)
            saved += source * sum(p.selected_source(inner, b) for p in every[i].values())
    # An input of the later layers; as the result of a matrix it is counted already.
    if config.activation_checkpointing == "full" and config.shared_values:
        saved += b * inner.sizes.kv_width * columns[0]
    if again:  # an input of the layers that have them
        saved += sum(b * inner.sizes.kv_width * columns[i] for i in config.value_layers)
    recomputed = max(layers) if again else 0
    if budget is not None:
        inputs = b * s.width * sum(columns)
        saved, recomputed = (
            inputs + round(budget * (saved - inputs)),
            round((1 - budget) * max(layers)),
        )
    if config.norm.embedding:
        saved += norm * s.width * micro_batch * sequence_length // ranks
    if config.has_encoder:  # its output, and the norm before it
        is_saved = config.norms_stream and not again
        saved += source * s.width * (b + norm * is_saved)
    tokens, dense, heads = columns[-1], config.head.kind == "dense", 1 + config.mtp_layers
    # Both inputs of a module for later tokens before their norms, and joined behind them.
    saved += config.mtp_layers * tokens * s.width * (2 * norm + 2 * b)
    chunk = min(tokens, config.targets_at_once(fused_norms) or tokens)
    kept_logits = b * tokens * rows if chunk == tokens else 0  # of one head
    squares = _squares(config, sequence_length)
    mask = b * squares * _masks(of_rank(inner, ranks), micro_batch, masked, fused_norms)
    if config.position.kind == "relative":  # buckets in int64, and who sees whom
        mask += 9 * squares * (micro_batch if masked else 1)
    return Activations(
        layers=saved,
        again=recomputed + _chunk(inner, micro_batch, b),
        head=heads * tokens * s.width * (b + norm * config.norms_stream + (norm + 2 * b) * dense),
        logits=chunk * rows * (2 * b + 4) + (heads - 1) * kept_logits,
        mask=mask + sum(view for _, view in plain),
        kept_logits=heads * kept_logits,
    )


def of_rank(config: ModelConfig, ranks: int) -> ModelConfig:
    """Return the config with the heads that one of the ranks attends with that divide rows."""
    if ranks == 1:
        return config
    s, divided = config.sizes, replace(config)
    kv_heads = s.num_kv_heads * copies(s.num_heads, s.num_kv_heads, ranks) // ranks
    heads = s.num_heads // ranks
    divided.__dict__["sizes"] = replace(s, num_heads=heads, num_kv_heads=kv_heads)
    return divided


def of_tensor(config: ModelConfig, tensor: int) -> ModelConfig:
    """Return the config with the heads and channels that one of the ranks has that divide the
    matrices; what is as wide as the residual stream is not of this config."""
    if tensor == 1:
        return config
    s = config.sizes
    divided = config.sized()  # latents and experts are as wide as without the division
    parts = {name: getattr(s, name) // tensor for name in _DIVIDED}
    divided.__dict__["sizes"] = replace(s, **parts)
    return divided


def _inside(
    part: BlockPart, columns: int, config: ModelConfig, tensor: int, bytes_per_value: int, rms: int
) -> int:
    """Return the bytes that a part keeps of so many columns: of its heads and channels, and with
    experts, where each rank has tokens of its own, as much of those."""
    if isinstance(part, Mlp) and part.is_routed:
        return columns * part.activation_bytes(config, bytes_per_value, rms) // tensor
    return columns * part.activation_bytes(of_tensor(config, tensor), bytes_per_value, rms)


def _chunk(config: ModelConfig, micro_batch: int, bytes_per_value: int) -> int:
    """Return the most that the backward pass keeps of a chunk of an MLP."""
    layers = (parts.mlp.chunk_bytes(config, bytes_per_value) for parts in layers_of(config))
    return micro_batch * (config.mlp.columns or 0) * max(layers)


def _exchanged(config: ModelConfig, mixer: Mixer, ranks: int) -> int:
    """Return the values of a token in a layer that are kept because ranks divide rows: the output
    as it came back, and copies of keys and values."""
    if ranks == 1 or not mixer.splits_columns:
        return 0
    copied = mixer.exchanged(config, ranks) - mixer.exchanged(config, 1)
    return config.sizes.heads_width + copied


def _squares(config: ModelConfig, columns: int) -> int:
    """Return the values of a mask: L^2, or of an encoder-decoder one for each of its parts."""
    if not config.has_encoder:
        return columns**2
    source, decoder = (columns_of(config, i, columns) for i in (0, config.encoder_layers))
    return source**2 + decoder**2 + source


def _plain_forms(config: ModelConfig, rows: Rows) -> list[tuple[int, int]]:
    """Return Mixer.plain_bytes of the mixer of each block, a view only where it is made."""
    layers: list[tuple[int, int]] = []
    for i, mixer in enumerate(config.mixers):
        of_block = replace(rows, length=columns_of(config, i, rows.length))
        inside, view = mixer.plain_bytes(config, of_block)
        layers.append((inside, 0 if mixer in config.mixers[:i] else view))
    return layers


def _masks(config: ModelConfig, micro_batch: int, masked: bool, is_fused: bool) -> int:
    """Return the number of (L, L) squares in the mask: one per row, and with biases per head; none
    where relative ones are added outside of a kernel, nor on a GPU, whose kernel takes a list of
    the blocks that are seen instead (masks.block_mask), a thousandth of a square in bf16."""
    if not any(parts.mixer.takes_mask for parts in layers_of(config)):
        return 0
    if config.position.kind == "alibi" or (config.position.kind == "relative" and is_fused):
        return config.sizes.num_heads * (micro_batch if masked else 1)
    is_dense = not is_fused or config.dropout or config.sizes.head_dim < 16
    return micro_batch if masked and is_dense and config.position.kind != "relative" else 0


def cache_bytes(config: ModelConfig, length: int, bytes_per_value: int = 2) -> int:
    """Return the bytes that decoding keeps for one sequence of `length` tokens, in all layers; of
    an encoder-decoder for a row, with the encoder's output."""
    source = columns_of(config, 0, length) if config.has_encoder else 0
    total = source * config.sizes.width * bytes_per_value
    for parts in layers_of(config)[config.encoder_layers :]:
        total += parts.mixer.cache_bytes(config, length - source, bytes_per_value)
        if parts.cross is not None:
            total += parts.cross.cache_bytes(config, source, bytes_per_value)
    return total
