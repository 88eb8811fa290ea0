"""What a model must be like for ranks to divide the columns of its rows (sequence.py), or its
matrices (tensor.py).

Invariant: what no rule here forbids computes the same as on one rank. Imports no torch: a plan
reads this file on a login node.
"""

from typing import TYPE_CHECKING

from forescale.models.costs import CROSS, MIXERS, MLPS

if TYPE_CHECKING:
    from forescale.models.config import ModelConfig

Refusal = tuple[str, str]  # what is wrong, what to do


def of_columns(config: "ModelConfig", ranks: int, columns: int, tensor: int = 1) -> list[Refusal]:
    """Return why `ranks` can't divide rows of `columns` of this model; each (what, todo).

    tensor: the ranks that divide the heads before.
    """
    whole = "write engine.sequence_parallel=1"
    found: list[Refusal] = []
    if columns % ranks:
        problem = f"{ranks} ranks don't divide train.sequence_length={columns}"
        found.append((problem, "choose a divisor of it"))
    if (heads := (config.sized().num_heads or 1) // tensor) % ranks:
        whose = "the model's" if tensor == 1 else "a tensor-parallel rank's"
        problem = f"{ranks} ranks don't divide {whose} {heads} head{'s' * (heads != 1)}"
        times = "" if tensor == 1 else "; its product with engine.tensor_parallel must divide them"
        found.append((problem, f"choose a divisor of model.num_heads{times}"))
    for name in config.mixers_used:
        if MIXERS[name].exchanged is None:
            problem = f"mixer {name} carries a state from column to column, which no rank has whole"
            found.append((problem, f"{whole}, or choose a mixer of attention"))
    if config.token_shift:
        problem = "the token before a rank's first column is another rank's"
        found.append((problem, f"{whole}, or model.token_shift=false"))
    if config.has_encoder:
        problem = "an encoder-decoder has rows of two parts, which are not divided"
        found.append((problem, f"{whole}, or model.encoder_layers=0"))
    if config.mtp_layers:
        problem = "modules for later tokens read the next rank's columns"
        found.append((problem, f"{whole}, or model.mtp_layers=0"))
    if config.has_experts and config.moe_capacity:
        problem = (
            "the places of experts are given to tokens in their order, which no rank has whole"
        )
        found.append((problem, f"{whole}, or model.moe_capacity=0"))
    return found


def of_matrices(config: "ModelConfig", ranks: int, columns: int) -> list[Refusal]:
    """Return why `ranks` can't divide the matrices of this model; each (what, todo)."""
    whole, sized = "write engine.tensor_parallel=1", config.sized()
    known = config.resolved(config.vocab_size or 1, columns)
    found: list[Refusal] = []
    grouped = sized.num_kv_heads != sized.num_heads
    is_dense = config.moe_dense_layers > 0 or not config.has_experts
    for name in ("num_heads", *["num_kv_heads"] * grouped, *["mlp_width"] * is_dense):
        if (size := getattr(sized, name) or 1) % ranks:
            problem = f"{ranks} ranks don't divide model.{name}={size}"
            found.append((problem, f"choose a divisor of model.{name}"))
    mixers = {name: MIXERS[name] for name in config.mixers_used}
    for name, part in (mixers | {"attention": CROSS} if config.has_encoder else mixers).items():
        if not part.divided(known):
            over = " with qk_norm_over=layer" if part.heads else ""
            problem = f"the matrices of mixer {name}{over} are not divided"
            found.append((problem, f"{whole}, or choose another mixer"))
    if config.has_experts:
        if (inner := config.moe_shared * known.expert_width) % ranks:
            problem = f"{ranks} ranks don't divide the {inner} channels of shared experts"
            found.append((problem, "choose a divisor of model.moe_shared x moe_width"))
        if config.moe_capacity:
            problem = "the places of experts are given to tokens in their order, of which each rank"
            found.append((f"{problem} has a part", f"{whole}, or model.moe_capacity=0"))
    elif not MLPS[config.mlp].divided(known):
        problem = f"the matrices of mlp {config.mlp} are not divided"
        found.append((problem, f"{whole}, or choose another model.mlp"))
    return found
