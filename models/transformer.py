"""The transformer: embedding, blocks, and a head that is also the loss.

Invariant: a parameter is read only inside the forward method of the module that owns it, and every
module is used by calling it. ZeRO-3 gathers a module's parameters around its call, so this code
need not know that the weights are partitioned. A tied table is one module that is called twice.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from forescale.models.block import (
    WHOLE,
    Block,
    Place,
    ResidualStream,
    Trunk,
    normed,
    run_block,
    viewers,
)
from forescale.models.config import ModelConfig
from forescale.models.decoding.cache import Cache, Memory
from forescale.models.flops import layers_of
from forescale.models.heads.mtp import MtpModule, counted_penalty, metrics_of
from forescale.models.heads.vocabulary import Transform, Vocabulary
from forescale.models.init import Linear
from forescale.models.mixers.context import Columns, Context, Mask, Viewer
from forescale.models.mixers.masks import full_mask, source_mask
from forescale.models.mlps.balance import Routing, that_count
from forescale.models.mlps.grouped import GroupedLinear
from forescale.models.norms import make_norm
from forescale.models.parallel.groups import SequenceGroup, TensorGroup
from forescale.models.parallel.stages import Stage
from forescale.models.parametrization import Factors, factors, scales
from forescale.models.positions.biases import RelativePosition
from forescale.models.positions.position import (
    LearnedPosition,
    Rotation,
    document_starts,
    positions_of,
    rotation,
    sinusoids,
)
from forescale.models.tables import BigramEmbedding, ValueEmbedding, previous
from forescale.models.tallies import tallies_of


class Absent(nn.Module):
    """The place of a module that another stage of a pipeline has."""


class Transformer(nn.Module):
    """A language model of `config`, whose vocabulary and longest sequence must be known.

    With encoder_layers it is an encoder-decoder: a row is [source | decoder's inputs], and the
    first source_length columns are the encoder's. Both share the embedding, and count positions
    each from their own first token; the first blocks are the encoder's.

    place: called with each large part as soon as it has its initial weights, the blocks and the
    tables, and returns it. It may take the weights away to where they are kept: no later part needs
    them, so the whole model need not exist at once.
    stage: of a pipeline; only what its parts read is here, by the names of the whole model.
    Raises ValueError with one sentence if the config has problems.
    """

    def __init__(
        self,
        config: ModelConfig,
        place: Callable[[nn.Module], nn.Module] | None = None,
        stage: Stage | None = None,
    ):
        super().__init__()
        self.config = config = config.resolved()
        self.stage = stage and stage.of(config)

        def placed(name: str, module: nn.Module, is_large: bool = True) -> nn.Module:
            if stage is not None and not stage.reads(name):
                return Absent()
            return place(module) if place and is_large else module

        self.sizes, self.scales = config.sizes, scales(config)
        tied = Vocabulary(config, makes_logits=config.tie_embeddings)
        self.embedding = placed("embedding", tied)
        self.bigrams = placed("bigrams", BigramEmbedding(config)) if config.bigram_rows else None
        tables = {i: f"value_embeddings.{i}" for i in config.value_layers}
        self.value_embeddings = nn.ModuleDict(
            {str(i): placed(name, ValueEmbedding(config)) for i, name in tables.items()}
        )
        self.position = self.embedding_norm = None
        if config.position.kind == "learned":
            self.position = placed("position", LearnedPosition(config), False)
        if config.norm.embedding:
            self.embedding_norm = placed("embedding_norm", make_norm(config), False)
        self.encoder_relative_position = self.relative_position = None
        if config.position.kind == "relative":
            if config.has_encoder:
                self.encoder_relative_position = RelativePosition(config.of_block(0))
            self.relative_position = RelativePosition(config)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            placed(f"blocks.{i}", Block(config, i)) for i in range(config.num_blocks)
        )
        self.takes_mask = any(mixer.takes_mask for mixer in config.mixers)
        self.viewers = viewers(config)
        self.thetas = [getattr(mixer, "theta", None) for mixer in config.mixers]
        # Otherwise the stream leaves the last block normed.
        self.norm = placed("norm", make_norm(config), False) if config.norms_stream else None
        self.transform = None
        if config.head.kind == "dense":
            self.transform = placed("transform", Transform(config), False)
        self.head = None if config.tie_embeddings else placed("head", Vocabulary(config))
        self.mtp = nn.ModuleList(
            placed(f"mtp.{k}", MtpModule(config)) for k in range(config.mtp_layers)
        )
        self.tallies = tallies_of(config)
        self.group: SequenceGroup | None = None
        self.dividing: TensorGroup | None = None  # the ranks that divide the matrices

    def forward(
        self,
        tokens_BL: Tensor,
        targets_BL: Tensor | None = None,
        padding_mask_BL: Tensor | None = None,
        documents_BL: Tensor | None = None,
        cache: Cache | None = None,
        last: int | None = None,
    ) -> Any:
        """Return logits, or the loss of each window.

        tokens (B, L) int64.
        targets (B, L) int64: -100 for no target, as at padding, whose outputs are undefined.
        padding_mask (B, L): True (or 1) for a real token; padding on either side.
        documents (B, L), integers: the number of each token's document, nondecreasing along the
            row. A token attends only to its own document, and positions count from the document's
            first token in the row, so each document has the same outputs as if it were alone.
        cache: of the columns that were read before (new_cache; encode for an encoder-decoder).
            tokens and padding_mask are then of the new columns, in an encoder-decoder the
            decoder's. Padding is on the left, and there are no documents.
        last: the number of last columns of which logits are computed; None: all.

        Returns, without targets: logits (B, L, V); of an encoder-decoder (B, T, V), of the
        decoder's T columns (targets of the source's columns are not read). With targets: losses
        (B,) fp32, each window's sum of cross-entropy in nats; with z_loss, or with experts or
        mtp_layers in training, (losses, penalty), where penalty is a scalar, summed over all
        targets, for the training objective only. After divide(), rows are whole, and logits and
        losses are of this rank's columns.

        Raises ValueError for a sequence longer than the learned position table, for a cache with
        documents or of a model that is not causal, and in an encoder-decoder for documents and for
        a cache without a source.
        """
        counted_BL = self._counted(targets_BL, padding_mask_BL)
        if self.config.has_encoder and cache is None:
            if documents_BL is not None:
                raise ValueError("an encoder-decoder takes no documents.")
            trunk = Trunk(self._decoded(tokens_BL, padding_mask_BL), [])
            targets_BL = None if targets_BL is None else targets_BL[:, -trunk.hidden.shape[1] :]
        else:
            trunk = self._hidden(tokens_BL, padding_mask_BL, documents_BL, cache, counted_BL)
        return self._result(trunk, targets_BL, padding_mask_BL, documents_BL, last)

    def _result(
        self,
        trunk: Trunk,
        targets_BL: Tensor | None,
        padding_mask_BL: Tensor | None,
        documents_BL: Tensor | None,
        last: int | None = None,
    ) -> Any:
        """Return what `forward` does, from the output of the blocks."""
        hidden_BLD = trunk.hidden if last is None else trunk.hidden[:, -last:]
        own_BL = None if targets_BL is None else self._columns(targets_BL)
        result = self._head(hidden_BLD, own_BL)
        if self.tallies is None or not self.training or targets_BL is None:
            return result
        losses_B, penalty = result if isinstance(result, tuple) else (result, 0.0)
        labels, weight = (targets_BL, padding_mask_BL, documents_BL), self.config.mtp_weight
        penalty += counted_penalty(
            self.tallies, trunk, labels, self.mtp, weight, self._head, self.group
        )
        return losses_B, penalty

    def part(
        self,
        index: int,
        stream: ResidualStream | None,
        tokens_BL: Tensor,
        targets_BL: Tensor,
        padding_mask_BL: Tensor | None = None,
        documents_BL: Tensor | None = None,
    ) -> tuple[Any, Tensor | float]:
        """Return what a part of a stage of a pipeline computes: the ResidualStream for the next
        one, of the last part the losses (B,); and the part's penalty. stream: that of the part
        before; the other arguments as those of `forward`.
        """
        assert self.stage is not None
        division = self.stage.division
        blocks, is_last = division.blocks[index], index == division.last
        counted_BL = self._counted(targets_BL, padding_mask_BL)
        place = Place(blocks, stream, is_last)
        trunk = self._hidden(tokens_BL, padding_mask_BL, documents_BL, None, counted_BL, place)
        routed = (parts.mlp.is_routed for parts in layers_of(self.config)[: blocks.start])
        trunk = trunk._replace(routed_before=sum(routed))
        if is_last:
            result = self._result(trunk, targets_BL, padding_mask_BL, documents_BL)
            return result if isinstance(result, tuple) else (result, 0.0)
        assert trunk.context is not None
        penalty: Tensor | float = 0.0
        if trunk.routings and self.training:
            assert self.tallies is not None
            labels = (targets_BL, padding_mask_BL, documents_BL)
            penalty = counted_penalty(self.tallies, trunk, labels, nn.ModuleList(), 0.0, self._head)
        return ResidualStream(trunk.hidden, trunk.context.values), penalty

    def stream_shapes(self, rows: int, columns: int) -> list[tuple[int, ...]]:
        """Return the shapes of the tensors of a ResidualStream, for rows of so many columns."""
        columns //= self.group.size if self.group else 1
        shapes: list[tuple[int, ...]] = [(rows, columns, self.sizes.width)]
        if self.config.shared_values:
            mixer: Any = next(block.mixer for block in self.blocks if isinstance(block, Block))
            shapes.append((rows, columns, mixer.num_kv_heads, self.sizes.head_dim))
        return shapes

    def _counted(self, targets_BL: Tensor | None, padding_mask_BL: Tensor | None) -> Tensor | None:
        """Return which tokens count for the balance of experts; None: all."""
        if self.tallies is None or not self.training or targets_BL is None:
            return padding_mask_BL
        return that_count(targets_BL, padding_mask_BL, self.config.causal)

    def _head(self, x_BLD: Tensor, targets_BL: Tensor | None) -> Any:
        """Return the logits of hidden states or, with targets, the result of window_losses."""
        if self.transform is not None:
            x_BLD = self.transform(x_BLD)
        head = self.embedding if self.head is None else self.head
        return head(x_BLD) if targets_BL is None else head(x_BLD, targets_BL)

    def divide(self, group: SequenceGroup) -> None:
        """Divide the columns of rows among the ranks of the group. Each rank then calls `forward`
        with the same whole rows, and gets the losses of its own columns."""
        self.group = group

    def _columns(self, x_BL: Tensor) -> Tensor:
        return x_BL if self.group is None else self.group.columns(x_BL)

    def new_cache(self) -> Cache:
        """Return an empty cache, for one batch of rows; see encode for an encoder-decoder's."""
        return Cache(self.sizes.num_layers)

    def encode(self, tokens_BS: Tensor, padding_mask_BS: Tensor | None = None) -> Cache:
        """Return a cache for the decoder, with the encoder's output.

        Args: tokens (B, S) int64, of any length; padding_mask (B, S), True (or 1) for a real token,
        on either side. Raises ValueError for a model without an encoder.
        """
        if not self.config.has_encoder:
            raise ValueError("the model has no encoder; give all tokens to the decoder.")
        positions = positions_of(tokens_BS.shape[1], tokens_BS.device, padding_mask_BS)
        x_BSD, turn = self._placed(self.embedding(tokens_BS), positions)
        real, length = padding_mask_BS, x_BSD.shape[1]
        columns = Columns(positions, length, None, real, x_BSD.dtype, drops=self._drops)
        return Cache(self.sizes.num_layers, *self._source(x_BSD, turn, columns))

    def _hidden(
        self,
        tokens_BL: Tensor,
        padding_mask_BL: Tensor | None,
        documents_BL: Tensor | None,
        cache: Cache | None,
        counted_BL: Tensor | None,
        place: Place = WHOLE,
    ) -> Trunk:
        """Return the output of the blocks, (B, L) -> (B, L, D), normed for the head. place: the
        part of the model that it is of."""
        real, starts, last = padding_mask_BL, None, None if cache is None else cache.last
        memories: list[Memory | None] = []
        if cache is not None:
            if documents_BL is not None or not self.config.causal:
                raise ValueError("a cache is for causal models, without documents.")
            if self.config.has_encoder and cache.source is None:
                raise ValueError("this cache has no source for the decoder; make it by encode.")
            real, memories = cache.advance(tokens_BL, padding_mask_BL), [*cache.layers]
        elif documents_BL is not None:
            starts = document_starts(documents_BL)
        columns = tokens_BL.shape[1] if cache is None else cache.length
        positions = positions_of(columns, tokens_BL.device, real, starts)
        own_BL = self._columns(tokens_BL)
        embedded_BLD: Any = None
        if place.stream is None or (place.is_last and self.training and len(self.mtp)):
            embedded_BLD = self.embedding(own_BL)
            if self.bigrams is not None:
                previous_BL = self._columns(previous(tokens_BL, last, starts, real))
                embedded_BLD = embedded_BLD + self.bigrams(own_BL, previous_BL)
        constants = None if cache is None else cache.constants
        if place.stream is None:
            x_BLD, turn = self._placed(embedded_BLD, positions, constants)
        else:
            x_BLD = place.stream.hidden
            turn = self._turn(positions, x_BLD.shape[1], constants)[1]
        decoding, length = cache is not None, tokens_BL.shape[1]
        read = Columns(positions, length, starts, real, x_BLD.dtype, decoding, self._drops)
        counted_BL = None if counted_BL is None else self._columns(counted_BL)
        mask = self._mask(read, self.config.causal)
        context = Context(turn, mask, starts, real, counted=counted_BL, group=self.group)
        if place.stream is not None:
            context = context._replace(values=place.stream.values)
        if cache is not None:
            context = context._replace(source=cache.source, source_mask=cache.source_mask)
        x_BLD, routings, context = self._through(
            x_BLD, context, read, memories, tokens_BL=own_BL, blocks=place.blocks
        )
        if place.is_last:
            x_BLD = normed(self.norm, x_BLD)
        return Trunk(x_BLD, routings, embedded_BLD, context)

    @property
    def _has_ring(self) -> bool:
        """True if attention makes its own masks (mixers/ring.py)."""
        return self.group is not None and self.group.ring.size > 1

    @property
    def _drops(self) -> bool:
        return self.training and self.config.dropout > 0

    def _through(
        self,
        x_BLD: Tensor,
        context: Context,
        columns: Columns,
        memories: Sequence[Memory | None] = (),
        encodes: bool = False,
        tokens_BL: Tensor | None = None,
        blocks: range | None = None,
    ) -> tuple[Tensor, list[Routing], Context]:
        """Return the output of the blocks (the encoder's or all others), the routings of experts,
        and the last context. columns: for the views; memories: one per block, (): no cache; tokens:
        of these columns, for value embeddings; blocks: these alone."""
        layers = self.config.encoder_layers
        first, end = (0, layers) if encodes else (layers, len(self.blocks))
        routings: list[Routing] = []
        views: dict[Viewer | None, Any] = {}
        turns: dict[float | None, Rotation | None] = {None: context.rotation, 0: None}
        for i in blocks or range(first, end):
            block, memory = self.blocks[i], memories[i - first] if memories else None
            viewer = self.viewers[i]
            if viewer is not None and viewer not in views and not self._has_ring:
                views[viewer] = viewer(columns)
            token_values = None
            if str(i) in self.value_embeddings:
                token_values = self.value_embeddings[str(i)](tokens_BL)
            view, theta = views.get(viewer), self.thetas[i]
            if theta not in turns:
                turns[theta] = self._turn(columns.positions, x_BLD.shape[1], None, theta)[1]
            context = context._replace(memory=memory, view=view, token_values=token_values)
            context = context._replace(rotation=turns[theta])
            recomputes = self.config.activation_checkpointing == "full"
            x_BLD, values, routing = run_block(block, x_BLD, context, recomputes)
            if values is not None:
                context = context._replace(values=values)
            routings += routing
        return x_BLD, routings, context

    def _decoded(self, tokens_BL: Tensor, real_BL: Tensor | None) -> Tensor:
        """Return the input of the head of an encoder-decoder: (B, S + T) -> (B, T, D)."""
        config, device = self.config, tokens_BL.device
        assert config.source_length is not None
        parts = (slice(0, config.source_length), slice(config.source_length, tokens_BL.shape[1]))
        reals = [None if real_BL is None else real_BL[:, part] for part in parts]
        positions = [
            positions_of(part.stop - part.start, device, real)
            for part, real in zip(parts, reals, strict=True)
        ]
        # One call of the embedding: each would have a gradient of the size of its table.
        x_BLD, turn = self._placed(self.embedding(tokens_BL), torch.cat(positions, -1))
        xs, turns, columns = [], [], []
        for part, places, real in zip(parts, positions, reals, strict=True):
            xs.append(x_BLD[:, part])
            turns.append(turn and (turn[0][..., part, :, :], turn[1][..., part, :, :]))
            length = part.stop - part.start
            columns.append(Columns(places, length, None, real, x_BLD.dtype, drops=self._drops))
        source, hidden = self._source(xs[0], turns[0], columns[0])
        mask = self._mask(columns[1], True)
        context = Context(turns[1], mask, real=reals[1], source=source, source_mask=hidden)
        x_BLD, _, _ = self._through(xs[1], context, columns[1])
        return normed(self.norm, x_BLD)

    def _source(
        self, x_BSD: Tensor, turn: Rotation | None, columns: Columns
    ) -> tuple[Tensor, Tensor | None]:
        """Return the encoder's output, (B, S, D), for embedded tokens, and the decoder's mask of
        its columns, (B, 1, 1, S); None without padding."""
        context = Context(turn, self._mask(columns, False), None, columns.real)
        x_BSD, _, _ = self._through(x_BSD, context, columns, encodes=True)
        if self.dividing is not None:  # once for all layers, whose heads each rank has a part of
            x_BSD = self.dividing.copied(x_BSD)
        return x_BSD, None if columns.real is None else source_mask(columns.real, x_BSD.dtype)

    def _placed(
        self, x_BLD: Tensor, positions: Tensor, constants: dict[str, Any] | None = None
    ) -> tuple[Tensor, Rotation | None]:
        """Return the input of the first block, (B, L, D), and the rotation, with rotary positions.

        x: the tokens' embeddings, of the last L columns, or of this rank's. positions: of all
        columns.
        """
        config, s = self.config, self.sizes
        places, turn = self._turn(positions, x_BLD.shape[1], constants)
        if config.scale_embedding or config.position.kind == "sinusoidal":  # these have amplitude 1
            x_BLD = x_BLD * self.scales.embedding
        if config.position.kind == "sinusoidal":
            x_BLD = x_BLD + sinusoids(places, s.width).to(x_BLD.dtype)
        elif self.position is not None:
            if positions.shape[-1] > s.max_sequence_length:
                raise ValueError(
                    f"{positions.shape[-1]} tokens are more than the model's learned positions; "
                    f"give at most max_sequence_length = {s.max_sequence_length}."
                )
            x_BLD = x_BLD + self.position(places)
        return self.dropout(normed(self.embedding_norm, x_BLD)), turn

    def _turn(
        self,
        positions: Tensor,
        length: int,
        constants: dict[str, Any] | None,
        theta: float | None = None,
    ) -> tuple[Tensor, Rotation | None]:
        """Return the positions of the last `length` columns, or of this rank's, and the rotation,
        with rotary positions. theta: the base of some layers alone, see mixers/attention.py."""
        places = positions[..., -length:] if self.group is None else self.group.columns(positions)
        config = self.config
        return places, rotation(places, config, constants, theta) if config.rotates else None

    def _mask(self, columns: Columns, causal: bool) -> Mask | None:
        """Return the mask of Context; None: no mixer takes one, or the kernels need none."""
        if not self.takes_mask:
            return None
        table = self.relative_position
        if self.encoder_relative_position is not None and not causal:
            table = self.encoder_relative_position
        exchange = None if self.group is None else self.group.exchange
        groups = self.dividing, exchange
        return full_mask(self.config, columns, causal, table, groups, self._has_ring)

    def muon_parameters(self) -> set[str]:
        """Return the names of the hidden matrices: all but embedding, positions and head."""
        kinds = (Linear, GroupedLinear)
        linear = (name for name, module in self.named_modules() if isinstance(module, kinds))
        return {f"{name}.weight" for name in linear}

    def compiled_parts(self) -> list[nn.Module]:
        """Return the modules to compile, each alone: the blocks, the head, and on a GPU the norms
        outside of them, whose fp32 copies else stand at the top of the backward pass."""
        mtp = [module for module in self.mtp if isinstance(module, MtpModule)]
        inner: list[Any] = [module.block for module in mtp]
        if next(self.parameters()).is_cuda:
            outside = (child for each in (self, *mtp) for child in each.named_children())
            inner += [module for name, module in outside if name.endswith("norm")]
        parts = [*self.blocks, *inner, self.embedding if self.head is None else self.head]
        return [part for part in parts if not isinstance(part, Absent)]

    def counters(self) -> Tensor | None:
        """Return the counts of training forward passes (trainer/train/model.py)."""
        return None if self.tallies is None else self.tallies.counts

    def counted(self, totals: Tensor) -> None:
        """Take the counts of the whole step, over all micro-batches and ranks."""
        if self.tallies is not None:
            self.tallies.totals = totals

    def updated(self) -> None:
        """Move the biases of the experts' choice, after the optimizer's update."""
        experts = self.config.experts
        if experts is None or not experts.bias_speed or self.tallies is None:
            return
        totals = self.tallies.total("experts")
        assert totals is not None, "the engine gives the totals before the update"
        routed = [
            block
            for block, parts in zip(self.blocks, layers_of(self.config), strict=True)
            if parts.mlp.is_routed
        ]
        routed += [getattr(module, "block", module) for module in self.mtp]
        for block, counts in zip(routed, totals, strict=False):
            if isinstance(block, Block):  # here, and not on another stage
                block.mlp.move_bias(counts[:-2])

    def metrics(self) -> dict[str, Tensor]:
        """Return the experts' load and the losses of later tokens in the step, if there are any."""
        experts = self.config.experts
        return metrics_of(self.tallies, 1 if experts is None else experts.top_k)

    def optimizer_factors(self) -> dict[str, Factors]:
        """Return multipliers of AdamW's settings by parameter name; see parametrization.py."""
        return factors(self.config)
