"""Convert weights to and from Hugging Face's formats; families.py lists the architectures.

Works on plain dicts; transformers is needed only by whoever loads the result. Weights survive
there and back bit for bit, and so does every architectural field of the config; what only training
knows (z_loss, mtp_layers, loss_chunk, activation_checkpointing, init_std; dropout but for GPT-2)
does not, and ntk comes back as the larger rope_theta that it is.
Their configs have no place for the multipliers of mup and completep, which go into the weights
(parametrization.folds): what comes back is `standard`, and computes the same.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from forescale.models.config import ModelConfig
from forescale.models.hf import experts
from forescale.models.hf.config_json import config_to_hf
from forescale.models.hf.families import FAMILIES, GAINS_BESIDE_ONE, module_names
from forescale.models.hf.pieces import FUSED, config_of, is_gpt2_matrix, joined, pieces_of
from forescale.models.parametrization import folds
from forescale.models.part import Part

State = dict[str, Tensor]


def family_of(config: ModelConfig) -> str:
    """Return the family of a resolved config. Raises ValueError with the nearest if none fits."""
    differing: dict[str, dict[str, str]] = {}
    for name, family in FAMILIES.items():
        fits = dict(family.fits)
        if "num_kv_heads" in fits:
            fits["num_kv_heads"] = config.num_heads
        values = {path: _value(config, path) for path in fits}
        if "head_dim" in fits:
            s = config.sizes
            values["head_dim"], fits["head_dim"] = s.head_dim, s.width // s.num_heads
        differing[name] = {
            path: f"{path}={_typed(fits[path])} (not {_typed(value)})"
            for path, value in values.items()
            if value not in (fits[path], ...)
        }
    # Of families that are equally near, one with the model's own MLP.
    nearest = min(differing, key=lambda name: (len(differing[name]), "mlp" in differing[name]))
    if not differing[nearest]:
        return nearest
    raise ValueError(
        f"No Hugging Face architecture fits this model; the nearest, "
        f"{FAMILIES[nearest].architecture}, has {', '.join(differing[nearest].values())}."
    )


def _value(config: ModelConfig, path: str) -> Any:
    """Return the value of a key; of a part its word; ... of a key that the chosen part lacks."""
    field, _, inner = path.partition(".")
    values = [getattr(config, field)]
    if field == "mixer":
        values = [*dict.fromkeys(config.mixers)]
    if isinstance(values[0], Part) and not inner:
        return ", ".join(dict.fromkeys(part.kind for part in values))
    values = [getattr(value, inner, ...) if inner else value for value in values]
    different = [*dict.fromkeys(values)]
    return different[0] if len(different) == 1 else ", ".join(map(_typed, different))


def _typed(value: Any) -> str:
    """Return a value of a config as it is typed."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def to_hf(
    config: ModelConfig, state: Mapping[str, Tensor]
) -> tuple[dict[str, Any], Iterator[tuple[str, Tensor]]]:
    """config.json's content, and the weights under Hugging Face's names, one at a time: each is
    taken out of `state` when it is asked for, and not held.

    Args: `config`, and the state_dict of its Transformer. Special tokens are left None: the caller
    knows the tokenizer. Raises ValueError where no architecture fits.
    """
    config = config.resolved()
    family = family_of(config)
    dtype = str(state[next(iter(state))].dtype).removeprefix("torch.")
    folded = _Folded(state, folds(config))  # without what serves training alone
    return config_to_hf(family, config) | {"dtype": dtype}, _renamed(family, config, folded)


class _Folded(Mapping[str, Tensor]):
    """`state`, with each tensor multiplied by its factor, if any, when it is read."""

    def __init__(self, state: Mapping[str, Tensor], by: dict[str, float]):
        self._state, self._by = state, by
        self._names = [name for name in state if not name.startswith("mtp.")]

    def __getitem__(self, name: str) -> Tensor:
        by, tensor = self._by.get(name, 1.0), self._state[name]
        return tensor if by == 1.0 else tensor * by

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _renamed(
    family: str, config: ModelConfig, state: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    names = module_names(family, config)
    for name, tensor in _FORMS.get(family, _items)(state):
        module, leaf = name.rsplit(".", 1)
        if family in GAINS_BESIDE_ONE and module.endswith("norm"):
            tensor = tensor - 1
        yield f"{names[module]}.{leaf}", tensor


def _items(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((name, state[name]) for name in state)


def from_hf(hf_config: dict[str, Any], hf_state: State) -> tuple[ModelConfig, State]:
    """The inverse of to_hf, also for models that others trained; pieces.py does it tensor by
    tensor.

    Raises ValueError for another architecture, for a variant that we don't compute (rotary
    positions scaled otherwise than by yarn as we do it, sliding windows, heads that don't add up to
    the width), and for unknown or missing weights.
    """
    config = config_of(hf_config)
    pieces = pieces_of(hf_config["model_type"], config, hf_state)
    state: dict[str, list[Tensor]] = {}
    for piece in pieces:
        state.setdefault(piece.name, []).append(piece.taken(hf_state[piece.source]))
    return config, {name: joined(parts) for name, parts in state.items()}


def _fused(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights in GPT-2's format: matrices (in, out); query, key and value in one."""
    for name in state:
        if ".key." in name or ".value." in name:
            continue
        tensor = state[name]
        if ".query." in name:
            parts = [state[name.replace(".query.", f".{part}.")] for part in FUSED[1:]]
            name, tensor = name.replace(".query.", ".qkv."), torch.cat([tensor, *parts])
        yield name, tensor.T.contiguous() if is_gpt2_matrix(name, tensor.dim()) else tensor


_FORMS = {"gpt2": _fused} | dict.fromkeys(experts.FITS, experts.unstacked)
