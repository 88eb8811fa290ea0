"""Convert weights to and from Hugging Face's formats; families.py lists the architectures.

It works on plain dicts and does not import transformers. An export that is imported again has the
same weights, bit for bit, and the same architecture. Lost are the fields of training (z_loss,
mtp_layers, loss_chunk, activation_checkpointing, init_std; dropout, except for GPT-2); ntk comes
back as the larger rope_theta that it is. config.json has no place for the multipliers of mup and
completep, so they go into the weights (parametrization.folds): the imported model is `standard`,
and computes the same.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from forescale.models.config import ModelConfig
from forescale.models.hf.config_json import config_to_hf
from forescale.models.hf.families import FAMILIES
from forescale.models.hf.pieces import config_of, exported, joined, pieces_of
from forescale.models.parametrization import folds
from forescale.models.part import Part

State = dict[str, Tensor]


def family_of(config: ModelConfig) -> str:
    """Return the family of a resolved config. Raises ValueError, which names the nearest family, if
    none fits."""
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
    # Of equally near families, one with the same MLP.
    nearest = min(differing, key=lambda name: (len(differing[name]), "mlp" in differing[name]))
    if not differing[nearest]:
        return nearest
    raise ValueError(
        f"No Hugging Face architecture fits this model; the nearest, "
        f"{FAMILIES[nearest].architecture}, has {', '.join(differing[nearest].values())}."
    )


def _value(config: ModelConfig, path: str) -> Any:
    """Return the value of a key, or the word of a part; `...` if the chosen part lacks the key."""
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
    """Return a value of a config as a user types it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def to_hf(
    config: ModelConfig, state: Mapping[str, Tensor]
) -> tuple[dict[str, Any], Iterator[tuple[str, Tensor]]]:
    """Return the content of config.json, and an iterator over the tensors by their Hugging Face
    names, which reads each parameter from `state` when it is needed.

    state: the state_dict of the config's Transformer. Special tokens are None, because only the
    caller knows the tokenizer. Raises ValueError if no architecture fits.
    """
    config = replace(config.resolved(), mtp_layers=0)  # they serve training alone
    family = family_of(config)
    dtype = str(state[next(iter(state))].dtype).removeprefix("torch.")
    weights = exported(family, config, state, folds(config))
    return config_to_hf(family, config) | {"dtype": dtype}, weights


def from_hf(hf_config: dict[str, Any], hf_state: State) -> tuple[ModelConfig, State]:
    """Return our config and weights: the inverse of to_hf, also for models of others. pieces.py
    does the same tensor by tensor.

    Raises ValueError for an unknown architecture, for a variant that is not supported (such as
    other scalings of rotary positions, or sliding windows), and for unknown or missing weights.
    """
    config = config_of(hf_config)
    pieces = pieces_of(hf_config["model_type"], config, hf_state)
    state: dict[str, list[Tensor]] = {}
    for piece in pieces:
        state.setdefault(piece.name, []).append(piece.taken(hf_state[piece.source]))
    return config, {name: joined(parts) for name, parts in state.items()}
