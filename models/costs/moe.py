"""The costs and the rules of a mixture of experts; its module is models/experts/moe.py."""

from typing import TYPE_CHECKING

from forescale.models.costs.mlp import SWIGLU
from forescale.models.costs.record import Part, Problem, Shapes, by_output, linear

if TYPE_CHECKING:
    from forescale.models.config import ModelConfig

SCORES = ("softmax", "sigmoid")
_INNER = ("gate", "up")  # from width to moe_width; "down" leads back


def part_of(config: "ModelConfig", layer: int) -> Part:
    """Return the record of the MLP of a layer: the first moe_dense_layers are dense."""
    return SWIGLU if layer < config.moe_dense_layers else MOE


def _shapes(config: "ModelConfig") -> Shapes:
    width, e, inner = config.sizes.width, config.moe_experts, config.expert_width
    found: Shapes = {"router.weight": (e, width)}
    found |= {f"{name}.weight": (e, inner, width) for name in _INNER}
    found["down.weight"] = (e, width, inner)
    if config.moe_shared:
        for name in _INNER:
            found |= linear(f"shared.{name}", width, config.moe_shared * inner, False)
        found |= linear("shared.down", config.moe_shared * inner, width, False)
    return found


def _expert(config: "ModelConfig") -> int:
    """Return the parameters of one expert."""
    return 3 * config.sizes.width * config.expert_width


def _flops(config: "ModelConfig", sequence_length: int, causal: bool) -> int:
    """Return the FLOPs of the router and of the experts that a token uses, the shared ones too.

    A capacity changes nothing here: as for MFU, neither places without a token are counted, nor are
    dropped tokens subtracted.
    """
    active = config.moe_top_k + config.moe_shared
    return 2 * (active * _expert(config) + config.moe_experts * config.sizes.width)


def _divided(config: "ModelConfig") -> dict[str, int]:
    """Return the matrices of the shared experts: of the router and the others a rank has all that
    it uses, for tokens of its own."""
    if not config.moe_shared:
        return {}
    return by_output(_shapes(config), tuple(f"shared.{name}" for name in _INNER), "shared.down")


def _idle(config: "ModelConfig") -> int:
    return (config.moe_experts - config.moe_top_k) * _expert(config)


def _activation_bytes(config: "ModelConfig", bytes_per_value: int, norm_bytes: int) -> int:
    """Return the bytes that router, rows and experts keep of a token.

    Router, in fp32: its input where it isn't, probabilities, and logits for the z-loss; a number a
    token for each of that loss's log Z, the token's share of the means, and the sum of sigmoid
    scores. Pair of token and expert: weight and its divisor, three numbers (int64) of where it is,
    and the expert's output. Row of an expert, of which a capacity makes more: its input, gate,
    silu(gate), up, and the product of the last two.
    """
    c, s, b, k = config, config.sizes, bytes_per_value, config.moe_top_k
    has_loss = c.moe_z_loss > 0 or c.moe_balance_loss > 0
    has_sum = c.moe_scores == "sigmoid"
    router = 4 * c.moe_experts * (1 + (c.moe_z_loss > 0)) + (4 * s.width if b < 4 else 0)
    router += 4 * ((c.moe_z_loss > 0) + has_loss + has_sum)
    pairs = k * (16 + b + b * s.width) + (4 * k + 4 if c.moe_renormalise else 0)
    row = 8 + b * (s.width + 4 * c.expert_width)
    rows = k * (c.moe_capacity or 1.0) * row
    return int(router + pairs + rows) + 4 * b * c.moe_shared * c.expert_width


def _selected_bytes(config: "ModelConfig", bytes_per_value: int) -> int:
    """Return the bytes of the router's logits in fp32, of the results of each expert's matrices for
    its rows, and of those of the shared ones."""
    c, width = config, config.sizes.width
    rows = c.moe_top_k * (c.moe_capacity or 1.0)
    shared = (2 * c.moe_shared * c.expert_width + width) * (c.moe_shared > 0)
    results = rows * (2 * c.expert_width + width) + shared
    return 4 * c.moe_experts + int(bytes_per_value * results)


def _problems(c: "ModelConfig", full: "ModelConfig", longest: int | None) -> list[Problem]:
    """Return the broken rules of the keys moe_*: of their values, then among the sizes."""
    return _of_values(c) or _of_sizes(c, full)


def _of_values(c: "ModelConfig") -> list[Problem]:
    found: list[Problem] = []

    def add(name: str, problem: str, todo: str) -> None:
        found.append((f"moe_{name}", problem, todo))

    if c.moe_experts < 2:
        add("experts", f"{c.moe_experts} is no mixture", "give at least 2, or choose mlp=swiglu")
    elif not 1 <= c.moe_top_k <= c.moe_experts:
        problem = f"a token can't use {c.moe_top_k} of {c.moe_experts} experts"
        add("top_k", problem, f"give 1 to {c.moe_experts}")
    if c.moe_width is not None and c.moe_width < 1:
        add("width", f"{c.moe_width} is not a size", "give at least 1")
    for name in ("shared", "dense_layers"):
        value = getattr(c, f"moe_{name}")
        if value < 0:
            add(name, f"{value} is not a count", "give 0 or more")
    if c.moe_scores not in SCORES:
        add("scores", f"unknown value {c.moe_scores!r}", f"choose from {', '.join(SCORES)}")
    for name in ("balance_loss", "z_loss", "bias_speed", "capacity"):
        value = getattr(c, f"moe_{name}")
        if not 0 <= value < float("inf"):
            add(name, f"{value} is not 0 or more", "give 0 to switch it off")
    if 1 < c.moe_bias_speed < float("inf"):
        problem = f"a step of {c.moe_bias_speed:g} is wider than the scale of all scores, 0 to 1"
        add("bias_speed", problem, "give less, such as 0.001")
    most = c.moe_experts / max(1, c.moe_top_k)
    if most < c.moe_capacity < float("inf"):
        problem = f"with {c.moe_capacity:g} an expert has more places than there are tokens"
        add("capacity", problem, f"give at most {most:g}, or 0 to drop nothing")
    if 0 < c.moe_capacity < 1:
        problem = f"{c.moe_capacity} leaves tokens without a place even where all experts are alike"
        add("capacity", problem, "give 1 or more, such as 1.25, or 0 to drop nothing")
    if c.moe_bias_speed and c.moe_scores == "softmax":
        problem = "a bias of the choice is on the scale of sigmoid scores"
        add("bias_speed", problem, "choose moe_scores=sigmoid, or give 0")
    if c.moe_top_k == 1 and c.moe_renormalise:
        problem = "the score of the only expert becomes 1, and the router learns nothing"
        add("renormalise", problem, "set it to false, or give moe_top_k=2 or more")
    if c.bias:
        found.append(("bias", "experts have no biases", "set it to false, or choose another mlp"))
    return found


def _of_sizes(given: "ModelConfig", c: "ModelConfig") -> list[Problem]:
    found: list[Problem] = []
    active = c.moe_top_k + c.moe_shared
    if given.moe_width is None and (c.mlp_width or 0) % active:
        problem = f"{active} experts a token do not divide mlp_width {c.mlp_width}"
        found.append(("moe_width", problem, "give it"))
    if c.moe_dense_layers >= (c.num_layers or 1):
        problem = f"{c.moe_dense_layers} dense layers of {c.num_layers} leave no mixture"
        found.append(("moe_dense_layers", problem, "give fewer, or choose mlp=swiglu"))
    return found


_KEYS = (
    "moe_experts",
    "moe_top_k",
    "moe_width",
    "moe_shared",
    "moe_dense_layers",
    "moe_scores",
    "moe_renormalise",
    "moe_balance_loss",
    "moe_z_loss",
    "moe_bias_speed",
    "moe_capacity",
)
MOE = Part(
    module="forescale.models.experts.moe.MixtureOfExperts",
    shapes=_shapes,
    flops=_flops,
    activation_bytes=_activation_bytes,
    selected_bytes=_selected_bytes,
    writes=("down", "shared.down"),
    not_muon=("router.weight",),
    stacked=("gate.weight", "up.weight", "down.weight"),
    idle=_idle,
    divided=_divided,
    keys=_KEYS,
    problems=_problems,
    is_gated=True,
    is_routed=True,
)
