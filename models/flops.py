"""Parameters and FLOPs of a model. The only such formulas in the project.

A FLOP here is one multiplication or addition inside a matrix product, as in PaLM's appendix B
(arXiv 2204.02311) and torch.utils.flop_counter; norms, softmax and the like are left out. The
backward pass takes twice the FLOPs of the forward pass. Recomputation (activation checkpointing,
the chunks of the loss, flash attention's scores) is not counted, as for MFU, unlike HFU. Tests
compare these numbers exactly with torch's counter. Imports no torch. A config whose
vocabulary or longest sequence is unknown raises ValueError.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

from forescale.models.choices import Layer
from forescale.models.config import ModelConfig
from forescale.models.mixers.attention import Cross, cross_of
from forescale.models.mlps.dense import Dense
from forescale.models.part import BlockPart, Mixer, Mlp, Shapes, linear
from forescale.models.positions.kinds import Relative

# The modules before the blocks.
_TABLES = ("bigrams.", "value_embeddings.")
_BEFORE = ("embedding", *_TABLES, "position", "encoder_relative", "relative")
_LOGIT_BIASES = ("embedding.bias", "head.bias")


@dataclass(frozen=True)
class Counts:
    """Parameters. total = embedding + tables + position + non_embedding + mtp + (head, if it isn't
    tied)."""

    total: int  # every trainable parameter, counted once
    embedding: int  # the token table
    tables: int  # further tables: of pairs of tokens, and of values
    position: int  # the tables of learned or relative positions, else 0
    blocks: int  # all layers
    non_embedding: int  # blocks, norms, transform: Kaplan's N
    head: int  # the matrix that makes the logits, even if it is the token table (tied)
    transform: int  # what the head has before and beside that matrix: model.head=dense, biases
    mtp: int  # the modules that predict later tokens, in training alone
    active: int  # total without mtp, and without the experts that a token does not use

    @property
    def blocks_and_head(self) -> int:
        """The hidden matrices and the head: but for experts, what a token is multiplied by."""
        return self.blocks + self.transform + self.head

    @property
    def active_blocks_and_head(self) -> int:
        """The parameters that a token is multiplied by: the N whose 6N is nearest to the FLOPs."""
        return self.blocks_and_head - (self.total - self.mtp - self.active)


def count(config: ModelConfig) -> Counts:
    """Return the numbers of parameters of a Transformer of this config."""
    outer = {name: prod(shape) for name, shape in _outer_shapes(config).items()}
    mtp = config.mtp_layers * sum(map(prod, _mtp_shapes(config).values()))
    layers = ((layer_shapes(config, i), times) for i, times in kinds(config))
    blocks = sum(times * prod(shape) for layer, times in layers for shape in layer.values())
    total, table = sum(outer.values()) + blocks, outer["embedding.weight"]
    position = sum(size for name, size in outer.items() if "position." in name)
    tables = sum(size for name, size in outer.items() if name.startswith(_TABLES))
    biases = sum(size for name, size in outer.items() if name in _LOGIT_BIASES)
    transform = sum(size for name, size in outer.items() if name.startswith("transform."))
    return Counts(
        total=total + mtp,
        embedding=table,
        tables=tables,
        position=position,
        blocks=blocks,
        non_embedding=total - position - tables - table * (1 if config.tie_embeddings else 2),
        head=table,
        transform=transform + biases,
        mtp=mtp,
        active=total - _sum(config, lambda part: part.idle(config)),
    )


def flops_per_token(config: ModelConfig, sequence_length: int, causal: bool = False) -> float:
    """Return forward and backward FLOPs of one token in a sequence of this length, with the head.

    causal=False counts attention over the whole square (PaLM's convention, for MFU): L keys per
    token. causal=True counts what a causal model needs, exactly: (L + 1) / 2 keys on average.
    Attention within documents needs fewer keys. This is not subtracted, so that the cost of a token
    does not depend on the data. Of an encoder-decoder: flops_per_row over all
    columns of the row; otherwise a whole number.
    """
    if config.has_encoder:
        return flops_per_row(config, sequence_length, causal) / sequence_length
    parts = _sum(config, lambda part: part.flops(config, sequence_length, causal))
    head = head_flops(config)
    # A module for later tokens has a block as the last one.
    last = parts_of(config, config.num_blocks - 1).values()
    later = sum(part.flops(config, sequence_length, causal) for part in last)
    later += 4 * config.sizes.width**2 + head
    return 3 * (parts + head + config.mtp_layers * later)


def flops_forward(config: ModelConfig, sequence_length: int) -> float:
    """Return the FLOPs of one token in evaluation: forward alone, and no later tokens."""
    return flops_per_token(replace(config, mtp_layers=0), sequence_length) / 3


def flops_per_row(config: ModelConfig, columns: int, causal: bool = False) -> int:
    """Return forward and backward FLOPs of one row of an encoder-decoder, with the head.

    The encoder's layers act on the first source_length columns, each of which sees them all; the
    decoder's and the head on the others.
    """
    total = head_flops(config) * columns_of(config, config.encoder_layers, columns)
    source = columns_of(config, 0, columns)
    for i, parts in enumerate(layers_of(config)):
        block, length = config.of_block(i), columns_of(config, i, columns)
        for name, part in parts.items():
            keys = source if name == "cross" else length
            total += length * part.flops(block, keys, causal)
        if parts.cross is not None:
            total += source * parts.cross.source_flops(block)
    return 3 * total


def head_flops(config: ModelConfig) -> int:
    """Return the forward FLOPs of the logits of one token."""
    s = config.sizes
    return 2 * s.width * (s.vocab_size + (s.width if config.head.kind == "dense" else 0))


def columns_of(config: ModelConfig, block: int, columns: int) -> int:
    """Return how many columns of a row a block acts on."""
    if not config.has_encoder or config.source_length is None:
        return columns
    is_encoder = block < config.encoder_layers
    return config.source_length if is_encoder else columns - config.source_length


def flops_6n(config: ModelConfig) -> int:
    """Return 6N FLOPs of one token, N = blocks + head (Kaplan et al. 2020, 2.1): no attention, no
    prediction of later tokens, and of a mixture only the experts that a token uses.

    In an encoder-decoder a token is multiplied by only the half that it passes: this is too much.
    """
    return 6 * count(config).active_blocks_and_head


def expansion(config: ModelConfig) -> float:
    """Return the experts of a layer over those that a token uses, the shared ones among both.

    1 of a dense model; the first dense_layers of a mixture don't count.
    """
    e = config.experts
    return 1.0 if e is None else (e.experts + e.shared) / (e.top_k + e.shared)


@dataclass(frozen=True)
class BlockParts:
    """The parts of a block. cross: in the decoder of an encoder-decoder."""

    mixer: Mixer
    cross: Cross | None
    mlp: Mlp

    def __len__(self) -> int:
        return 2 if self.cross is None else 3

    def items(self) -> list[tuple[str, BlockPart]]:
        """Return the parts by name, in the order of the forward pass."""
        cross = [("cross", self.cross)] if self.cross is not None else []
        return [("mixer", self.mixer), *cross, ("mlp", self.mlp)]

    def values(self) -> list[BlockPart]:
        """Return the parts in the order of the forward pass."""
        return [self.mixer, *([self.cross] if self.cross is not None else []), self.mlp]


def parts_of(config: ModelConfig, layer: int) -> BlockParts:
    """Return the parts of a block."""
    mixer = config.mixers[layer]
    is_decoder = config.has_encoder and layer >= config.encoder_layers
    cross = cross_of(mixer) if is_decoder else None
    return BlockParts(mixer, cross, config.mlp.of_layer(layer))


def layers_of(config: ModelConfig) -> list[BlockParts]:
    """Return the parts of each block, from the first to the last."""
    known = config.__dict__  # as of a cached property: a plan reads it ten thousand times
    if "_layers" not in known:
        known["_layers"] = [parts_of(config, i) for i in range(config.num_blocks)]
    return [*known["_layers"]]


def kinds(config: ModelConfig) -> list[tuple[int, int]]:
    """Return the first block of each kind, and how many there are: a plan counts thousands of
    models of a hundred equal layers."""
    last = config.encoder_layers - 1  # it has a norm that the others don't
    layers = enumerate(layers_of(config))
    # By identity: to hash a part takes longer than all else here.
    every = [(*map(id, parts.values()), i == last) for i, parts in layers]
    return [(every.index(kind), times) for kind, times in Counter(every).items()]


def _sum(config: ModelConfig, of: Callable[[BlockPart], int]) -> int:
    """Return the sum over all parts of all layers."""
    return sum(n * of(part) for i, n in kinds(config) for part in parts_of(config, i).values())


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return every parameter's name and shape, in the order of Transformer.named_parameters()."""
    outer = _outer_shapes(config)
    parameters: Shapes = {n: shape for n, shape in outer.items() if n.startswith(_BEFORE)}
    for i in range(config.num_blocks):
        parameters |= {f"blocks.{i}.{n}": shape for n, shape in layer_shapes(config, i).items()}
    parameters |= {name: shape for name, shape in outer.items() if name not in parameters}
    for k in range(config.mtp_layers):
        parameters |= {f"mtp.{k}.{name}": shape for name, shape in _mtp_shapes(config).items()}
    return parameters


def layer_shapes(config: ModelConfig, layer: int) -> Shapes:
    """Return the parameters of one block: name inside the block -> shape."""
    parameters = Shapes()
    for name, part in parts_of(config, layer).items():
        if config.norms_before and (name != "mlp" or config.norm.placement != "shared"):
            parameters |= _norm(config, f"{name}_norm")
        parameters |= {f"{name}.{inner}": shape for inner, shape in part.shapes(config).items()}
        if config.norms_after:
            parameters |= _norm(config, f"{name}_post_norm")
    if layer == config.encoder_layers - 1 and config.norms_stream:
        parameters |= _norm(config, "output_norm")
    return parameters


def _outer_shapes(config: ModelConfig) -> Shapes:
    """Return the parameters outside the blocks."""
    s = config.sizes
    table = (s.vocab_size, s.width)
    parameters: Shapes = {"embedding.weight": table}
    is_dense, has_bias = config.head.kind == "dense", config.head.has_bias
    if has_bias and config.tie_embeddings:
        parameters["embedding.bias"] = (s.vocab_size,)
    if config.bigram_rows:
        parameters["bigrams.weight"] = (config.bigram_rows, s.width)
    values = (s.vocab_size, s.kv_width)
    parameters |= {f"value_embeddings.{i}.weight": values for i in config.value_layers}
    if config.position.kind == "learned":
        parameters["position.weight"] = (s.max_sequence_length, s.width)
    if config.norm.embedding:
        parameters |= _norm(config, "embedding_norm")
    if isinstance(config.position, Relative):
        table_of_scores = (config.position.buckets, s.num_heads)
        halves = ("encoder_", "") if config.has_encoder else ("",)
        parameters |= {f"{half}relative_position.weight": table_of_scores for half in halves}
    if config.norms_stream:
        parameters |= _norm(config, "norm")
    if is_dense:
        parameters |= linear("transform.dense", s.width, s.width, config.bias)
        parameters |= _norm(config, "transform.norm")
    if not config.tie_embeddings:
        parameters["head.weight"] = table
        if has_bias:
            parameters["head.bias"] = (s.vocab_size,)
    return parameters


def _mtp_shapes(config: ModelConfig) -> Shapes:
    """Return the parameters of a module that predicts later tokens: name inside it -> shape."""
    last, width = config.num_blocks - 1, config.sizes.width
    parameters = _norm(config, "embedding_norm") | _norm(config, "hidden_norm")
    parameters |= linear("join", 2 * width, width, bias=False)
    parameters |= {f"block.{name}": shape for name, shape in layer_shapes(config, last).items()}
    return parameters | (_norm(config, "norm") if config.norms_stream else {})


def _norm(config: ModelConfig, name: str) -> Shapes:
    has_bias = config.norm.kind == "layernorm" and config.bias
    if isinstance(config.norm, Layer) and not config.norm.gain:
        return {}
    return {f"{name}.{kind}": (config.sizes.width,) for kind in ("weight", "bias")[: 1 + has_bias]}


def matrices(config: ModelConfig) -> set[str]:
    """Return the names of Transformer.muon_parameters(), without building the model."""
    names = {"transform.dense.weight"} if config.head.kind == "dense" else set()
    for i in range(config.num_blocks):
        parts = parts_of(config, i).items()
        others = {f"{name}.{inner}" for name, part in parts for inner in part.not_muon}
        inside = layer_shapes(config, i).items()
        named = {name for name, shape in inside if len(shape) == 2 and name not in others}
        named |= {f"{name}.{inner}" for name, part in parts for inner in part.stacked}
        names |= {f"blocks.{i}.{name}" for name in named}
    for k in range(config.mtp_layers):  # `named` is now of the last block
        names |= {f"mtp.{k}.join.weight", *(f"mtp.{k}.block.{name}" for name in named)}
    return names


def stacked(config: ModelConfig) -> set[str]:
    """Return the names of the parameters that have a matrix for each expert."""
    return {
        f"{block}.{name}.{inner}"
        for block, i in _named_blocks(config)
        for name, part in parts_of(config, i).items()
        for inner in part.stacked
    }


def _named_blocks(config: ModelConfig) -> list[tuple[str, int]]:
    """Return the name and layer of each block; those of later tokens are as the last one."""
    last = config.num_blocks - 1
    blocks = [(f"blocks.{i}", i) for i in range(config.num_blocks)]
    return blocks + [(f"mtp.{k}.block", last) for k in range(config.mtp_layers)]


def divided(config: ModelConfig, tensor: int) -> dict[str, int]:
    """Return the parameters of which each of `tensor` ranks that divide the matrices has a part, by
    name, and the dimension along which they are cut (BlockPart.divided)."""
    if tensor == 1:
        return {}
    tables = (n for n in _outer_shapes(config) if n.startswith(("embedding.", "head.")))
    dimensions = {} if config.sizes.vocab_size % tensor else dict.fromkeys(tables, 0)
    for block, i in _named_blocks(config):
        for name, part in parts_of(config, i).items():
            cut = part.divided(config.of_block(i)).items()
            dimensions |= {f"{block}.{name}.{inner}": dim for inner, dim in cut}
    biases = (n for n in _outer_shapes(config) if n.endswith("relative_position.weight"))
    values = (n for n in _outer_shapes(config) if n.startswith("value_embeddings."))
    return dimensions | dict.fromkeys([*biases, *values], 1)


def in_chunks(config: ModelConfig, columns: int) -> ModelConfig:
    """Return the config as a rank that has so many columns of a row computes it: without mlp.chunk
    where they are one chunk, of which nothing is computed again."""
    if columns > (config.mlp.columns or 0) or not isinstance(config.mlp, Dense):
        return config
    return replace(config, mlp=replace(config.mlp, chunk=None))


def flops_recomputed(config: ModelConfig, sequence_length: int, ranks: int = 1) -> float:
    """Return the recomputed FLOPs of one token, which `flops_per_token` does not count.

    These are the head's forward pass for a loss in chunks, what a part's backward pass computes
    again (BlockPart.recomputed) and, with activation checkpointing, the forward pass of every
    layer, or of what selective checkpointing doesn't save (BlockPart.selective_flops). ranks: that
    divide the columns.
    """
    config = in_chunks(config, sequence_length // ranks)
    s, heads = config.sizes, 1 + config.mtp_layers
    share = columns_of(config, config.encoder_layers, sequence_length) / sequence_length
    head = 2 * s.vocab_size * s.width * share * heads
    total = head * (config.loss_chunk != 0)
    is_selective = config.activation_checkpointing == "selective"
    if config.activation_checkpointing == "full":
        total += flops_per_token(config, sequence_length) / 3 - head_flops(config) * share * heads
        total -= config.mtp_layers * 4 * s.width**2  # what joins two inputs isn't made again

    def again(part: BlockPart) -> int:
        selected = part.selective_flops(config, sequence_length) if is_selective else 0
        return part.recomputed(config, sequence_length) + selected

    last = parts_of(config, config.num_blocks - 1).values()
    return total + _sum(config, again) + config.mtp_layers * sum(map(again, last))
