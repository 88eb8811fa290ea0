"""Any class of the library transformers as a model: it has the interface that our Transformer has.

Invariant: nothing but the library's own code runs, and no network is asked: no code of a hub, no
pickle, no kernel that a config names. The class alone decides what its logits are; here they become
losses of windows.

Ids: the input embedding of the class has no padding id, as a token of any id may be text.
"""

import importlib
import inspect
import json
import os
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forescale.models.positions.position import document_starts, positions_of

IGNORED = -100
_SEPARATIONS = ("positions", "masks")  # how documents stay apart: by positions alone, or a mask too
_PASTS = ("cache", "past_key_values")  # the argument that takes the cache, by version
# What a config may say of the machine, or of code and kernels elsewhere.
_UNREAD = {"auto_map", "dtype", "torch_dtype", "quantization_config", "attn_implementation"}
_UNREAD |= {"experts_implementation", "use_kernels", "kernel_config"}  # and all that begin with _
_TOLERANCE = 2e-4  # of logits that should be equal, as a part of their standard deviation


class Past:
    """The cache of the class itself, in the place of decoding.cache.Cache. Some keep none for a
    caller: then all tokens are read again."""

    source = real = None

    def __init__(self) -> None:
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
        if hasattr(self.states, "batch_select_indices"):
            self.states.batch_select_indices(rows)
        else:
            self.states = None


class AnyModel(nn.Module):
    """The class of transformers that the text of a config.json names.

    name: the directory of the model, with its weights if `weights`; they are read only if `draws`.
    vocab_size: the least number of ids. masked: of masked tokens, else of the next one. documents:
    windows hold documents that must not see each other.

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
    ):
        super().__init__()
        if activation_checkpointing not in ("none", "full"):
            problem = f"has no model.activation_checkpointing={activation_checkpointing}"
            raise ValueError(f"{problem}; write none or full")
        self.masked = masked
        known = _config(json.loads(config), masked)
        text = known.get_text_config()
        longest = getattr(text, "max_position_embeddings", None)
        if longest and sequence_length > longest:
            problem = f"reads {longest:,} tokens, and train.sequence_length is {sequence_length:,}"
            raise ValueError(f"{problem}; write train.sequence_length={longest} or less")
        reads = weights and draws and not torch.empty(0).is_meta
        lacks_ids = text.vocab_size < vocab_size
        if lacks_ids and not reads:
            text.vocab_size = vocab_size
        # Read weights leave it in eval mode: without dropout, and all activations stored.
        self.inner = _built(_auto(masked), known, name if reads else None).train()
        if lacks_ids and reads:
            self.inner.resize_token_embeddings(vocab_size)
        table = self.inner.get_input_embeddings()
        if isinstance(table, nn.Embedding):
            table.padding_idx = None
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
        # Of rows: of a matrix for each window, the kernel on a GPU has no fixed order.
        rows, targets = output.logits.float().flatten(0, 1), targets_BL.flatten()
        nats = F.cross_entropy(rows, targets, ignore_index=IGNORED, reduction="none")
        losses_B = nats.view_as(targets_BL).sum(1)
        if not balances:
            return losses_B
        return losses_B, self.balance * output.aux_loss * (targets_BL != IGNORED).sum()

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

    def _continued(self, tokens_BL: Tensor, past: Past, options: dict[str, Any]) -> Tensor:
        """Return the logits of the last tokens of a past."""
        unread: Any = past.tokens_BS if past.states is None else tokens_BL
        if past.real_BS is not None:
            options |= self._padded(past.real_BS, unread.shape[1])
        argument = next((name for name in _PASTS if name in self.takes), "")
        if argument:
            options["use_cache"] = True
        if past.states is not None:
            options[argument] = past.states
        output = self.inner(input_ids=unread, **options)
        past.states = getattr(output, argument, None) if argument else None
        logits_BLV: Tensor = output.logits
        return logits_BLV

    @cached_property
    @torch.no_grad()
    def takes_padding(self) -> bool:
        """True if rows with padding on the left are continued as they would be alone. It is tried,
        as no class says it."""
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


def _transformers() -> Any:
    os.environ["USE_HUB_KERNELS"] = "NO"  # read when the library is imported
    try:
        library = importlib.import_module("transformers")
        with suppress(ImportError):  # it may have been imported before, in a notebook
            kernels = importlib.import_module("transformers.integrations.hub_kernels")
            kernels._kernels_enabled = False  # type: ignore[attr-defined]
        return library
    except ImportError:
        problem = "needs the package transformers, which is not installed"
        raise ValueError(f"{problem}; pip install 'forescale[transformers]'") from None


def _auto(masked: bool) -> Any:
    library = _transformers()
    return library.AutoModelForMaskedLM if masked else library.AutoModelForCausalLM


def class_name(config: str, masked: bool) -> str:
    """Return the name of the class of a config.json's text."""
    library, known = _transformers(), _config(json.loads(config), masked)
    names = "MODEL_FOR_MASKED_LM_MAPPING" if masked else "MODEL_FOR_CAUSAL_LM_MAPPING"
    name: str = getattr(library, names)[type(known)].__name__
    return name


def _readable(values: Any) -> Any:
    """Return the values of a config without those that name code, kernels or number formats."""
    if isinstance(values, list):
        return [_readable(value) for value in values]
    if not isinstance(values, dict):
        return values
    unread = lambda key: key in _UNREAD or key.startswith("_")  # noqa: E731
    return {key: _readable(value) for key, value in values.items() if not unread(key)}


def _config(values: dict[str, Any], masked: bool) -> Any:
    """Return the library's config object. Raises ValueError if it knows no such class."""
    library, kind = _transformers(), values.get("model_type")
    if kind not in library.CONFIG_MAPPING:
        problem = f"has model_type {kind!r}, which transformers {library.__version__} doesn't know"
        if "auto_map" in values:
            problem += ", and code that comes with a model is never run"
        raise ValueError(f"{problem}; name another model")
    try:
        config = library.CONFIG_MAPPING[kind].from_dict(_readable(values))
    except Exception as e:
        raise ValueError(_refusal(e)) from e
    if getattr(config, "is_encoder_decoder", False):
        problem = f"{kind} has an encoder and a decoder"
        raise ValueError(f"{problem}; name a model with one of them, or write model=t5-small")
    causal = type(config) in library.MODEL_FOR_CAUSAL_LM_MAPPING
    both = type(config) in library.MODEL_FOR_MASKED_LM_MAPPING
    if masked and not both:
        raise ValueError(f"{kind} has no class for masked tokens; leave objective=masked out")
    if not masked and (not causal or (both and not getattr(config, "is_decoder", False))):
        doing = "sees later tokens" if both else "continues no text"
        raise ValueError(f"{kind} {doing}; write objective=masked, or name another model")
    return config


def _built(auto: Any, config: Any, folder: str | None) -> Any:
    """Return the module, with the weights in `folder`, else with random ones."""
    if folder is not None and not Path(folder).is_dir():
        problem = "is not there, and the run begins with its weights"
        raise ValueError(f"{problem}; copy the directory to this machine")
    if folder is None:
        try:
            return auto.from_config(config, dtype=torch.float32, trust_remote_code=False)
        except (ValueError, TypeError, KeyError, AttributeError, ImportError, AssertionError) as e:
            raise ValueError(_refusal(e)) from e
    options: dict[str, Any] = dict(local_files_only=True, trust_remote_code=False)
    options |= dict(config=config, dtype=torch.float32, use_safetensors=True)
    try:
        module, info = auto.from_pretrained(folder, output_loading_info=True, **options)
    except Exception as e:
        raise ValueError(_refusal(e)) from e
    if missing := sorted(info["missing_keys"]):
        problem = f"its files lack {len(missing):,} weights of the class, such as {missing[0]}"
        raise ValueError(f"{problem}; download it again")
    return module


def _refusal(error: Exception) -> str:
    line = next(iter(str(error).strip().splitlines()), "")[:200].rstrip(".").replace(";", ",")
    return f"transformers can't build it ({type(error).__name__}: {line}); correct its config.json"
