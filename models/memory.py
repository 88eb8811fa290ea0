"""The bytes that a model keeps beside its weights: activations in training, a cache in decoding.

The only such formulas in the project; those of a mixer or MLP are its methods (part.py).
Tests compare them with what autograd keeps and what a cache allocates. Imports no torch. A config
whose vocabulary or longest sequence is unknown raises ValueError.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from forescale.models.config import PRODUCTS_AT_ONCE, ModelConfig
from forescale.models.flops import columns_of, in_chunks, layers_of
from forescale.models.part import BlockPart, Mlp, Rows, copies

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
    gradients: int = 0  # of a compiled head: of its table and of what it reads
    within: int | None = None  # what the backward pass of a compiled block adds to `layers`

    @property
    def total(self) -> int:
        """Maximum of a step."""
        return max(self.at_head, self.at_block)

    @property
    def at_head(self) -> int:
        """Bytes in the backward pass of the head; if nothing is compiled, the maximum."""
        again = self.again if self.within is None else 0
        return self.layers + again + self.head + self.logits + self.gradients + self.mask

    @property
    def at_block(self) -> int:
        """Bytes in the backward pass of a compiled block."""
        return self.layers + (self.within or 0) + self.mask

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
    compiled: bool = False,
    experts: int = 1,
    trained: bool = True,
    blocks: Sequence[int] | None = None,
    is_last: bool = True,
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
    compiled: whether torch's compiler has the blocks and the head, each alone, on a GPU. It keeps
    what matrices and kernels take, in its own format, and makes again what is elementwise and so
    costs no memory traffic of its own (torch/_functorch/partitioners.py: solve_min_cut), such as
    fp32 copies for norms; see BlockPart.compiled_bytes.
    A compiled block gives the gradients of its weights at its end, all at once. experts: ranks that
    divide the experts; trained: whether weights have gradients, as they have without adapters.
    blocks: those of a stage of a pipeline, None: all, and one more for each module for later
    tokens; is_last: whether the stage has the head.
    Not included: parameters, gradients, the allocator's fragmentation.
    Attention with dropout keeps more if no flash kernel supports dropout (CPU).
    """
    config = in_chunks(config, sequence_length // ranks)
    s, b, inner = config.sizes, bytes_per_value, of_tensor(config, tensor)
    rows = s.vocab_size if s.vocab_size % tensor else s.vocab_size // tensor
    rms = 8 if not fused_norms else 4  # bytes of a norm's input
    plain = rms if config.norm.kind == "rmsnorm" else 4
    norm = b if compiled else plain
    placement = config.norm.placement
    # The part's input, which is a norm's output or the stream itself, and the input of each norm.
    norms = b + norm * (2 if placement == "sandwich" else 1)
    again = config.activation_checkpointing != "none"
    is_selective = config.activation_checkpointing == "selective"
    source = micro_batch * columns_of(config, 0, sequence_length)
    every, views, attending = layers_of(config), 0, of_rank(inner, ranks)
    mask = _mask_bytes(attending, Rows(micro_batch, sequence_length, b, masked), fused_norms)
    layers: list[int] = []  # bytes of each block that is computed
    inputs: dict[int, int] = {}  # and of its input
    within: list[int] = []  # what its compiled backward pass adds
    products = 0  # of all blocks, which selective checkpointing saves
    alike: dict[tuple[int, ...], tuple[int, int]] = {}  # both, by the parts of a block

    def of_part(part: BlockPart, config: ModelConfig) -> int:
        return part.compiled_bytes(config, b) if compiled else part.activation_bytes(config, b, rms)

    # The blocks of modules for later tokens are as the last one.
    for n in range(config.num_blocks + config.mtp_layers) if blocks is None else blocks:
        i = min(n, config.num_blocks - 1)
        columns = columns_of(config, i, sequence_length)
        parts, count = every[i], micro_batch * columns // ranks
        inputs[n] = b * s.width * count
        if (kind := (*map(id, parts.values()),)) in alike:
            layers.append(alike[kind][0])
            products += alike[kind][1]
            continue
        layer, before = count * len(parts) * s.width * (norms + (config.dropout > 0)), products
        for part in parts.values():
            if isinstance(part, Mlp) and part.is_routed:  # each rank has tokens of its own
                layer += count * of_part(part, config) // tensor
            else:
                layer += count * of_part(part, inner)
            if is_selective:
                # What a part writes is as wide as the stream.
                writes = len(part.writes) * (s.width - inner.sizes.width)
                products += count * (part.selected_bytes(inner, b) + b * writes)
        if compiled and placement == "sandwich":  # the streams between parts are made again
            layer -= count * (len(parts) - 1) * b * s.width
        if placement == "shared":  # one norm for both parts
            layer -= count * s.width * norms
        if compiled and not config.norms_after and is_selective:  # nothing needs the last result
            products -= count * b * s.width * (2 if config.in_parallel else 1)
        mixer, cross = parts.mixer, parts.cross
        if cross is not None:
            layer += source * cross.source_bytes(inner, b, b if compiled else rms)
            products += source * cross.selected_source(inner, b) if is_selective else 0
        if mask and mixer.takes_mask and fused_norms and not compiled:
            # Heads of keys and values, which such a kernel has repeated; a compiler does it again.
            repeats = attending.sizes.heads_width - attending.sizes.kv_width
            layer += count * ranks * 2 * b * repeats
        if ranks > 1 and mixer.splits_columns:
            # The output as it came back, and copies of keys and values.
            copied = mixer.exchanged(inner, ranks) - mixer.exchanged(inner, 1)
            layer += count * b * (inner.sizes.heads_width + copied)
        if not fused_norms:
            of_block = Rows(micro_batch, columns, b, masked)
            inside, view = mixer.plain_bytes(attending, of_block)
            layer += inside
            views += view if mixer not in config.mixers[:n] else 0
        layers.append(layer)
        alike[kind] = layer, products - before
        # At its beginning the gradients of its output, and of the MLP's widest tensor.
        streams = 2 * b * s.width * count
        repeated = 1.0 if again else 0.0 if budget is None else 1 - budget
        chunk = micro_batch * (inner.mlp.columns or 0) * parts.mlp.chunk_bytes(inner, b)
        begin = round(repeated * layer) + chunk + streams + count * of_part(parts.mlp, inner) // 3
        weights = sum(_weights(part, config, tensor, experts) for part in parts.values())
        end = streams + trained * b * weights
        within.append(max(begin, end - round((1 - repeated) * layer)))
    begins = sum(inputs.values())
    saved = begins + products if again else sum(layers)
    # An input of the later layers; as the result of a matrix it is counted already.
    if config.activation_checkpointing == "full" and config.shared_values:
        saved += next(iter(inputs.values())) // s.width * inner.sizes.kv_width
    if again:  # an input of the layers that have them
        values = (inputs.get(i, 0) for i in config.value_layers)
        saved += sum(size // s.width * inner.sizes.kv_width for size in values)
    recomputed = max(layers) if again else 0
    if budget is not None:
        saved = begins + round(budget * (saved - begins))
        recomputed = round((1 - budget) * max(layers))
    if config.norm.embedding:
        saved += norm * s.width * micro_batch * sequence_length // ranks
    if config.has_encoder:  # its output, and the norm before it
        is_saved = config.norms_stream and not again
        saved += source * s.width * (b + norm * is_saved)
    tokens, dense, heads = count, config.head.kind == "dense", 1 + config.mtp_layers
    # Both inputs of a module for later tokens before their norms, of which one is a head's input,
    # and joined behind them.
    joined = config.mtp_layers * tokens * s.width * ((1 if compiled else 2) * norm + 2 * b)
    saved += joined * is_last
    chunk = min(tokens, config.targets_at_once(fused_norms) or tokens)
    kept_logits = b * tokens * rows if chunk == tokens else 0  # of one head
    logits, gradients = (2 * b + 4) * chunk * rows, 0
    if compiled:
        # The gradient of a chunk's logits takes their place. Beside it are products for the table's
        # gradient, and of many chunks their sum in fp32; of one chunk, after the logits have ended.
        chunks, hidden = -(-tokens // chunk), b * tokens * s.width
        table = (
            (b * min(chunks, PRODUCTS_AT_ONCE) + 4 * (chunks > PRODUCTS_AT_ONCE))
            * rows
            * s.width
            * trained
        )
        logits = (1 + (chunks == 1)) * b * chunk * rows
        gradients = hidden + (table if chunks > 1 else max(0, table - logits))
    chunk_bytes = max(parts.mlp.chunk_bytes(inner, b) for parts in layers_of(inner))
    if not is_last:
        heads = logits = gradients = kept_logits = 0
    return Activations(
        layers=saved,
        again=recomputed + micro_batch * (inner.mlp.columns or 0) * chunk_bytes,
        head=heads * tokens * s.width * (b + norm * config.norms_stream + (plain + 2 * b) * dense),
        logits=logits + max(0, heads - 1) * kept_logits,
        gradients=gradients,
        within=max(within) if compiled else None,
        mask=mask + views,
        kept_logits=heads * kept_logits,
    )


def _weights(part: BlockPart, config: ModelConfig, tensor: int, experts: int) -> int:
    """Return the parameters of a part that a rank has."""
    cut = part.divided(config) if tensor > 1 else {}
    ranks = {name: tensor for name in cut} | {name: experts for name in part.stacked}
    return sum(prod(shape) // ranks.get(name, 1) for name, shape in part.shapes(config).items())


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
    divided = replace(config.sized())  # latents and experts are as wide as without the division
    parts = {name: getattr(s, name) // tensor for name in _DIVIDED}
    divided.__dict__["sizes"] = replace(s, **parts)
    return divided


def _mask_bytes(config: ModelConfig, rows: Rows, is_fused: bool) -> int:
    """Return the bytes of the mask: an (L, L) square per row, and with biases per head; none where
    relative ones are added outside of a kernel, nor on a GPU, whose kernel takes a list of the
    blocks that are seen instead, a thousandth of a square in bf16, and slopes (masks.full_mask)."""
    square = rows.length**2
    if config.has_encoder:  # one for each of its parts
        source, decoder = (columns_of(config, i, rows.length) for i in (0, config.encoder_layers))
        square = source**2 + decoder**2 + source
    batch, kind, squares = rows.micro_batch if rows.masked else 1, config.position.kind, 0
    if any(parts.mixer.takes_mask for parts in layers_of(config)):
        is_dense = not is_fused or config.dropout or config.sizes.head_dim < 16
        if (kind == "alibi" and is_dense) or (kind == "relative" and is_fused):
            squares = config.sizes.num_heads * batch
        elif rows.masked and kind not in ("relative", "alibi"):
            squares = batch if is_dense else 0
    # Of relative positions the buckets in int64, and who sees whom.
    return square * (rows.bytes_per_value * squares + (9 * batch if kind == "relative" else 0))


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
