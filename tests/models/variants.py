"""Small models of every combination of the architecture's choices, for the tests of documents."""

from itertools import product

import torch
from torch import Tensor

from forescale.models import Transformer
from forescale.models.choices import NORMS
from forescale.models.mlps import MLPS
from forescale.models.positions.kinds import POSITIONS
from tests.models.configs import model_config

# The MLP, which acts on each token alone, in turns. Experts multiply tokens of several documents
# together, which rounds differently: tests/models/mlps.
DENSE = [name for name, part in MLPS.items() if not part.is_routed]
OTHERS = list(product(POSITIONS, NORMS, ("none", "head"), (None, 1)))
VARIANTS = [
    (position, norm, DENSE[(i + i // 4) % len(DENSE)], qk_norm, kv_heads)
    for i, (position, norm, qk_norm, kv_heads) in enumerate(OTHERS)
]
L, V = 12, 37


def named(variant: tuple) -> str:
    return "-".join(map(str, variant))


def build(position, norm, mlp, qk_norm, num_kv_heads, **keys) -> Transformer:
    torch.manual_seed(0)
    sizes = dict(num_layers=2, width=16, num_heads=2, mlp_width=24, vocab_size=V)
    config = model_config(
        **sizes | dict(max_sequence_length=L + 5) | keys,
        num_kv_heads=num_kv_heads,
        position=position,
        norm=norm,
        mlp=mlp,
        mixer__qk_norm=qk_norm,
        bias=norm == "layernorm" and mlp != "moe",
        init_std=0.3,  # large enough that a leak could not hide in rounding
    )
    return Transformer(config).eval()


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(3))
