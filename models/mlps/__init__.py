"""What acts on each token alone: the MLPs by the word of model.mlp. Imports no torch."""

from forescale.models.mlps.dense import GEGLU, GELU, ExactGELU, ReLU, SquaredReLU, SwiGLU
from forescale.models.mlps.moe import Experts
from forescale.models.part import Mlp, registry

MLPS: dict[str, type[Mlp]] = registry(SwiGLU, GEGLU, GELU, ExactGELU, ReLU, SquaredReLU, Experts)
