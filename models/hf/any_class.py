"""Any class of the library transformers as a model: it has the interface that our Transformer has.

Invariant: the class alone decides what its logits are; here they become losses of windows.

Ids: the input embedding of the class has no padding id, as a token of any id may be text.
"""

import inspect
import json
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forescale.models.hf.loading import auto_class, build, config_of, transformers
from forescale.models.positions.position import document_starts, positions_of

IGNORED = -100
_SEPARATIONS = ("positions", "masks")  # how documents stay apart: by positions alone, or a mask too
_PASTS = ("cache", "past_key_values")  # the argument that takes the cache, by version
_TOLERANCE = 2e-4  # of logits that should be equal, as a part of their standard deviation


class Past:
    """The cache of the class itself, in the place of decoding.cache.Cache. Some keep none for a
    caller: then all tokens are read again."""

    real = None

    def __init__(self) -> None:
        self.source: Any = None  # what the encoder says of the sources, (B, S, D)
        self.source_real_BS: Tensor | None = None
        self.tokens_BS: Tensor | None = None
        self.real_BS: Tensor | None = None  # False at padding, which stays
        self.states: Any = None

    def reserve(self, columns: int) -> None:
        """The class makes its room itself."""

    def drop_first(self, columns: int) -> None:
        """Columns of padding stay, as the class has counted them."""

    def add(self, tokens_BL: Tensor, real_BL: Tensor | None) -> None:
        """Append tokens; real: of the first ones, None: all."""
        if self.tokens_BS is None:
            self.tokens_BS, self.real_BS = tokens_BL, real_BL
            return
        self.tokens_BS = torch.cat((self.tokens_BS, tokens_BL), 1)
        if self.real_BS is not None:
            self.real_BS = F.pad(self.real_BS, (0, tokens_BL.shape[1]), value=True)

    def keep(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        if self.tokens_BS is not None:
            self.tokens_BS = self.tokens_BS[rows]
        self.real_BS = None if self.real_BS is None else self.real_BS[rows]
        if self.source is not None:
            self.source = self.source[rows]
        if self.source_real_BS is not None:
            self.source_real_BS = self.source_real_BS[rows]
        if hasattr(self.states, "batch_select_indices"):
            self.states.batch_select_indices(rows)
        else:
            self.states = None


def _declared_length(text: Any) -> int | None:
    """Return the most tokens that a config of transformers declares; None: any number."""
    keys = [f"max_{half}position_embeddings" for half in ("", "encoder_", "decoder_")]
    lengths = [getattr(text, key, None) or 0 for key in keys]
    return min((length for length in lengths if length > 0), default=None)


class AnyModel(nn.Module):
    """The class of transformers that the text of a config.json names.

    name: the directory of the model, with its weights if `weights`; they are read only if `draws`.
    vocab_size: the least number of ids. masked: of masked tokens, else of the next one. documents:
    windows hold documents that must not see each other. split: the number of columns of a row that
    are its source; 0: rows have none. An encoder reads the source, if the class has an encoder.

    Raises ValueError, "problem; what to do", for a class that isn't one of the library's, can't be
    built, or doesn't do that.
    """

    def __init__(
        self,
        config: str,
        name: str = "",
        weights: bool = False,
        activation_checkpointing: Literal["none", "full"] = "none",
        *,
        vocab_size: int,
        sequence_length: int,
        draws: bool = True,
        masked: bool = False,
        documents: bool = False,
        split: int = 0,
    ):
        super().__init__()
        if activation_checkpointing not in ("none", "full"):
            problem = f"has no model.activation_checkpointing={activation_checkpointing}"
            raise ValueError(f"{problem}; write none or full")
        self.masked, self.sequence_length = masked, sequence_length
        known = config_of(json.loads(config), masked, split > 0)
        text = known.get_text_config()
        self.split = split if known.is_encoder_decoder else 0
        self._expect_columns(_declared_length(text))  # before a large model is built
        reads = weights and draws and not torch.empty(0).is_meta
        lacks_ids = text.vocab_size < vocab_size
        if lacks_ids and not reads:
            text.vocab_size = vocab_size
        # Read weights leave it in eval mode: without dropout, and all activations stored.
        self.inner = build(auto_class(config, masked), known, name if reads else None).train()
        if lacks_ids and reads:
            self.inner.resize_token_embeddings(vocab_size)
        self._expect_columns(self.longest)
        for table in self.tables():
            table.padding_idx = None
            if table.num_embeddings < vocab_size:
                problem = f"has a table of {table.num_embeddings:,} ids, and the data has "
                problem += f"{vocab_size:,} with those of the objective"
                raise ValueError(f"{problem}; write objective=pairs, or name another model")
        if self.split and getattr(text, "output_router_logits", False):
            problem = "has a balance loss of experts, which an encoder-decoder can't have here"
            raise ValueError(f'{problem}; write "output_router_logits": false in config.json')
        if activation_checkpointing == "full":
            if not self.inner.supports_gradient_checkpointing:
                raise ValueError(
                    "can't compute activations again; leave activation_checkpointing out"
                )
            name = "activation_checkpointing_enable"  # since transformers 5, before gradient_...
            old = "gradient_checkpointing_enable"
            getattr(self.inner, name if hasattr(self.inner, name) else old)(
                {"use_reentrant": False}
            )
        self.takes = {*inspect.signature(self.inner.forward).parameters}
        balance = getattr(text, "router_aux_loss_coef", 0.0)
        self.balance = balance if getattr(text, "output_router_logits", False) else 0.0
        self.separation = ""
        if documents:
            self._choose_way()

    def forward(
        self,
        tokens_BL: Tensor,
        targets_BL: Tensor | None = None,
        padding_mask_BL: Tensor | None = None,
        documents_BL: Tensor | None = None,
        cache: Past | None = None,
        last: int | None = None,
    ) -> Any:
        """Return logits, of the `last` tokens if that is given, or the loss of each window in nats
        with a penalty of unbalanced experts, if config.json turns it on (output_router_logits).
        Arguments as of models.Transformer; a cache is a Past."""
        options: dict[str, Any] = {"use_cache": False} if "use_cache" in self.takes else {}
        if self.split and cache is None:
            rows = tokens_BL[:, : self.split], tokens_BL[:, self.split :]
            real_BS = None if padding_mask_BL is None else padding_mask_BL[:, : self.split]
            options |= self._sourced(rows[0], real_BS) | {"decoder_input_ids": rows[1]}
            logits_BTV: Tensor = self.inner(**options).logits
            if targets_BL is None:
                return logits_BTV
            return _nats(logits_BTV, targets_BL[:, self.split :])
        balances = bool(self.balance) and self.training and targets_BL is not None
        if self.balance:
            options["output_router_logits"] = balances
        if padding_mask_BL is not None and cache is None:
            options |= self._padded(padding_mask_BL, tokens_BL.shape[1])
        if documents_BL is not None:
            options |= self._apart(documents_BL)
        if last is not None and "logits_to_keep" in self.takes:
            options["logits_to_keep"] = last
        if cache is not None:
            cache.add(tokens_BL, padding_mask_BL)
            return self._continued(tokens_BL, cache, options)
        if targets_BL is None:
            logits_BLV: Tensor = self.inner(input_ids=tokens_BL, **options).logits
            return logits_BLV
        output = self.inner(input_ids=tokens_BL, **options)
        losses_B = _nats(output.logits, targets_BL)
        if not balances:
            return losses_B
        return losses_B, self.balance * output.aux_loss * (targets_BL != IGNORED).sum()

    @torch.no_grad()
    def encode(self, tokens_BS: Tensor, padding_mask_BS: Tensor | None = None) -> Past:
        """Return a cache for the decoder, with what the encoder says of sources. Arguments and
        errors as of models.Transformer."""
        if not self.split:
            raise ValueError("the model has no encoder; give all tokens to the decoder.")
        past, options = self.new_cache(), self._sourced(tokens_BS, padding_mask_BS)
        past.source = self.inner.get_encoder()(**options).last_hidden_state
        past.source_real_BS = options.get("attention_mask")
        return past

    def _sourced(self, tokens_BS: Tensor, real_BS: Tensor | None) -> dict[str, Any]:
        """Return the arguments for sources: padding moves to the right, as the class counts
        positions from the first column."""
        if real_BS is None:
            return {"input_ids": tokens_BS}
        columns = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)[None]
        moved_BS = (columns + real_BS.long().argmax(1)[:, None]) % tokens_BS.shape[1]
        real_BS = real_BS.long().gather(1, moved_BS)
        return {"input_ids": tokens_BS.gather(1, moved_BS), "attention_mask": real_BS}

    def new_cache(self) -> Past:
        """Return an empty cache, for one batch of rows."""
        return Past()

    def muon_parameters(self) -> set[str]:
        """Return the names of the hidden matrices: linear layers, but for the head."""
        head = getattr(self.inner.get_output_embeddings(), "weight", None)
        every = dict(self.named_parameters())
        return {
            f"{name}.weight"
            for name, module in self.named_modules()
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
            if f"{name}.weight" in every and every[f"{name}.weight"] is not head
        }

    def tables(self) -> list[nn.Embedding]:
        """Return the modules that embed tokens: an encoder and a decoder have one each, of the same
        or of other weights."""
        parts = [self.inner]
        if self.split:
            parts += [self.inner.get_encoder(), self.inner.get_decoder()]
        every = (part.get_input_embeddings() for part in parts)
        return [*dict.fromkeys(table for table in every if isinstance(table, nn.Embedding))]

    def flops_per_token(self, sequence_length: int) -> float:
        """Return the FLOPs of training on a column, the mean of a row: 6 for each weight that reads
        it, 4 for a frozen one. An encoder reads the source alone, all other weights the rest (cross
        attention's keys and values too, which read the source)."""
        tables = {id(table.weight) for table in self.tables()}  # an encoder's may be the head
        encoder = self.inner.get_encoder().parameters() if self.split else ()
        of_source, share = {id(p) for p in encoder} - tables, self.split / self.sequence_length
        flops = 0.0
        for p in self.parameters():
            weight = (6 if p.requires_grad else 4) * getattr(p, "ds_numel", p.numel())
            flops += weight * (share if id(p) in of_source else 1 - share)
        return flops

    def adaptable(self) -> list[str]:
        """Return the names of the modules that can have an adapter: linear layers, but for the
        head."""
        head = self.inner.get_output_embeddings()
        linear = ((n, m) for n, m in self.named_modules() if isinstance(m, nn.Linear))
        return [name for name, module in linear if module is not head]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As of any module, but the frequencies of rotations stay in fp32: rounded to bf16 they
        would turn distant tokens by other angles."""
        exact = {n: b for n, b in self.named_buffers() if "inv_freq" in n}
        result = super()._apply(fn, recurse)
        for name, old in exact.items():
            path, _, key = name.rpartition(".")
            module = self.get_submodule(path)
            module._buffers[key] = old.to(module._buffers[key].device)  # type: ignore[union-attr]
        return result

    @property
    def longest(self) -> int | None:
        """The most tokens of a row, or of a source and of an answer; None: any number.

        RoBERTa's kin count positions from behind the padding id, so that their tables have more
        entries than a row has tokens. XLNet declares -1, for any number; LED a length for each
        half.
        """
        lengths = [_declared_length(self.inner.config.get_text_config()) or 0]
        for name, module in self.inner.named_modules():
            behind = getattr(module, "padding_idx", None)
            if name.endswith("position_embeddings") and isinstance(behind, int):
                lengths.append(getattr(module, "num_embeddings", 0) - behind - 1)
        return min((length for length in lengths if length > 0), default=None)

    def _expect_columns(self, longest: int | None) -> None:
        split, length = self.split, self.sequence_length
        if longest and longest < max(split, length - split):
            parts = f", {split:,} of them the source" if split else ""
            problem = f"reads {longest:,} tokens, and train.sequence_length is {length:,}"
            raise ValueError(f"{problem}{parts}; write train.sequence_length={longest} or less")

    def _continued(self, tokens_BL: Tensor, past: Past, options: dict[str, Any]) -> Tensor:
        """Return the logits of the last tokens of a past."""
        if self.split and past.source is None:
            raise ValueError("this cache has no source for the decoder; make it by encode.")
        unread: Any = past.tokens_BS if past.states is None else tokens_BL
        options |= {"decoder_input_ids" if self.split else "input_ids": unread}
        if past.source is not None:
            # Some classes read its first, others a field, such as that of routers.
            options["encoder_outputs"] = transformers().modeling_outputs.MoEModelOutput(
                last_hidden_state=past.source
            )
            options["attention_mask"] = past.source_real_BS
        if past.real_BS is not None:
            options |= self._padded(past.real_BS, unread.shape[1])
        argument = next((name for name in _PASTS if name in self.takes), "")
        if argument:
            options["use_cache"] = True
        if past.states is not None:
            options[argument] = past.states
        output = self.inner(**options)
        past.states = getattr(output, argument, None) if argument else None
        logits_BLV: Tensor = output.logits
        return logits_BLV

    @cached_property
    @torch.no_grad()
    def takes_padding(self) -> bool:
        """True if rows with padding on the left are continued as they would be alone. It is tried,
        as no class says it."""
        if self.split:
            return True  # sources are padded, and their answers begin together
        device = next(self.parameters()).device
        row_1L = torch.arange(3, 24, 3, device=device)[None]
        rows_2L = torch.cat((F.pad(row_1L[:, :5], (2, 0)), row_1L))
        real_2L, past = F.pad(torch.ones_like(rows_2L[:, 2:]), (2, 0)).bool(), Past()
        real_2L[1] = True
        try:
            self(rows_2L[:, :5], padding_mask_BL=real_2L[:, :5], cache=past)
            first = self(rows_2L[:, 5:6], cache=past)[:1, -1]
            past.keep(torch.zeros(1, dtype=torch.long, device=device))
            second = self(rows_2L[:1, 6:], cache=past)[:, -1]
        except Exception:  # of whatever the class does with a mask that it doesn't expect
            return False
        alone = self(row_1L[:, :5])[0, 3:5]
        differences = (torch.cat((first, second)) - alone).abs().max()
        return bool(differences < _TOLERANCE * alone.std())

    def _padded(self, real_BS: Tensor, last: int) -> dict[str, Any]:
        """Return the arguments that hide padding from the last tokens of rows."""
        options: dict[str, Any] = {"attention_mask": real_BS.long()}
        # An encoder has padding on the right alone, and may count its positions otherwise.
        if "position_ids" in self.takes and not self.masked:
            positions = positions_of(real_BS.shape[1], real_BS.device, real_BS)
            options["position_ids"] = positions[:, -last:]
        return options

    def _apart(self, documents_BL: Tensor) -> dict[str, Any]:
        """Return the arguments that keep documents apart."""
        starts, length = document_starts(documents_BL), documents_BL.shape[1]
        positions = positions_of(length, documents_BL.device, None, starts)
        options: dict[str, Any] = {"position_ids": positions.expand_as(documents_BL)}
        if self.separation == "masks":
            same = documents_BL[:, None, :, None] == documents_BL[:, None, None]
            visible, dtype = same if self.masked else same.tril(), next(self.parameters()).dtype
            mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
            options["attention_mask"] = mask.masked_fill(~visible, torch.finfo(dtype).min)
        return options

    @torch.no_grad()
    def _choose_way(self) -> None:
        """Choose how documents are kept apart. It is tried, as no class says it: a row of two must
        have the logits of each alone. A mask replaces a window of attention, so a class with one
        must do it by positions."""
        problem = f"{type(self.inner).__name__} can't keep the documents of a window apart"
        refused = ValueError(f"{problem}; leave data.document_mask out")
        if "position_ids" not in self.takes:
            raise refused
        self.separation = _SEPARATIONS[0]
        if next(self.parameters()).is_meta:
            return
        self.eval()
        columns_1L = torch.arange(9)[None]
        row_1L, documents_1L = columns_1L * 7 + 3, columns_1L // 5
        whole = torch.cat([self(row_1L[:, :5]), self(row_1L[:, 5:])], 1)
        has_window = getattr(self.inner.config.get_text_config(), "sliding_window", None)
        for self.separation in _SEPARATIONS[:1] if has_window else _SEPARATIONS:
            logits = self(row_1L, documents_BL=documents_1L)
            if (logits - whole).abs().max() < _TOLERANCE * whole.std():
                self.train()
                return
        raise refused


def _nats(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
    """Return the loss of each window, (B,) fp32."""
    # Of rows: of a matrix for each window, the kernel on a GPU has no fixed order.
    rows, targets = logits_BLV.float().flatten(0, 1), targets_BL.flatten()
    nats = F.cross_entropy(rows, targets, ignore_index=IGNORED, reduction="none")
    return nats.view_as(targets_BL).sum(1)
