"""Convert weights to and from Hugging Face's formats; families.py lists the architectures of
decoders, and two_sided.py has those of BERT and T5.

It works on plain dicts and does not import transformers. An export that is imported again has the
same weights, bit for bit, and the same architecture, but for T5's tied head, which comes back as a
matrix of its own. Lost are the fields of training (z_loss,
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
from forescale.models.hf import two_sided
from forescale.models.hf.config_json import config_to_hf
from forescale.models.hf.families import FAMILIES
from forescale.models.hf.fit import family_of
from forescale.models.hf.piece import exported, joined
from forescale.models.hf.pieces import config_of, pieces, pieces_of
from forescale.models.parametrization import folds

State = dict[str, Tensor]
__all__ = ["FAMILIES", "family_of", "from_hf", "to_hf"]


def to_hf(
    config: ModelConfig, state: Mapping[str, Tensor], prefer: str | None = None
) -> tuple[dict[str, Any], Iterator[tuple[str, Tensor]]]:
    """Return the content of config.json, and an iterator over the tensors by their Hugging Face
    names, which reads each parameter from `state` when it is needed.

    state: the state_dict of the config's Transformer. prefer: the family, where several
    fit. Special tokens are None, because only the caller knows the tokenizer. Raises ValueError if
    no architecture fits.
    """
    config = replace(config.resolved(), mtp_layers=0)  # they serve training alone
    if config.has_encoder or not config.causal:
        return two_sided.to_hf(config, state)
    family = family_of(config, prefer)
    dtype = str(state[next(iter(state))].dtype).removeprefix("torch.")
    weights = exported(pieces(family, config), state, folds(config))
    return config_to_hf(family, config) | {"dtype": dtype}, weights


def from_hf(hf_config: dict[str, Any], hf_state: State) -> tuple[ModelConfig, State]:
    """Return our config and weights: the inverse of to_hf, also for models of others. pieces.py
    does the same tensor by tensor.

    Raises ValueError for an unknown architecture, for a variant that is not supported (such as
    other scalings of rotary positions, or sliding windows), and for unknown or missing weights.
    """
    config = config_of(hf_config, hf_state)
    state: dict[str, list[Tensor]] = {}
    for piece in pieces_of(hf_config, config, hf_state):
        taken = piece.taken(hf_state[piece.source], hf_state.get(piece.row))
        state.setdefault(piece.name, []).append(taken)
    return config, {name: joined(parts) for name, parts in state.items()}
