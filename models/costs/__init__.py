"""The cost records of the parts of a block, by the config value that chooses the part.

A block has a mixer (`model.mixer`: tokens exchange information) and an MLP (`model.mlp`: acts on
each token). To add one, write its module in models/mixers/NAME.py or models/NAME.py, its record in
costs/NAME.py, and a line here. FLOPs, parameter counts, memory, plans, muP and the choice of
modules read the record; nothing else in the project knows the part. Invariant: imports no torch,
because plans run on login nodes.
"""

from forescale.models.costs import (
    attention,
    blocks,
    cross,
    gated_deltanet,
    latent,
    lstm,
    mingru,
    mlp,
    moe,
)
from forescale.models.costs.record import Part

MIXERS: dict[str, Part] = {
    "attention": attention.ATTENTION,
    "gated_deltanet": gated_deltanet.GATED_DELTANET,
    "latent": latent.LATENT,
    "lstm": lstm.LSTM,
    "mingru": mingru.MINGRU,
    "window": blocks.WINDOW,
    "block_sparse": blocks.BLOCK_SPARSE,
}
CROSS = cross.CROSS  # between mixer and MLP in the decoder of an encoder-decoder
MLPS: dict[str, Part] = {
    "swiglu": mlp.SWIGLU,
    "geglu": mlp.GEGLU,
    "gelu": mlp.GELU,
    "gelu_exact": mlp.GELU,
    "relu": mlp.RELU,
    "relu2": mlp.RELU2,
    "moe": moe.MOE,
}

__all__ = ["CROSS", "MIXERS", "MLPS", "Part"]
