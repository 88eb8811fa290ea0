"""A mixture of experts as an MLP; its module is in moe_module.py."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from forescale.models.mlps.dense import SwiGLU
from forescale.models.part import Mlp, Problem, Shapes, by_output, linear

if TYPE_CHECKING:
    from forescale.models.config import ModelConfig

_INNER = ("gate", "up")  # from width to expert_width; "down" leads back
_DENSE = SwiGLU()


@dataclass(frozen=True)
class Experts(Mlp):
    """Experts: each token uses some of many small SwiGLU MLPs."""

    experts: int = 8  # experts of a layer (Mixtral: 8)
    top_k: int = 2  # experts that a token uses (GShard, Mixtral: 2)
    expert_width: int | None = None  # None: mlp_width / (top_k + shared)
    shared: int = 0  # experts that every token uses too
    dense_layers: int = 0  # first layers, which have a dense swiglu of mlp_width
    scores: Literal["softmax", "sigmoid"] = "softmax"  # of the router
    renormalise: bool = True  # divide a token's scores by the sum of those of its experts
    balance_loss: float = 0.01  # coefficient of the load-balancing loss (Switch: 0.01); 0: off
    z_loss: float = 0.001  # coefficient of the router's z-loss (ST-MoE: 0.001); 0: off
    bias_speed: float = 0.0  # loss-free balance: bias step (DeepSeek-V3: 0.001); 0: off
    capacity: float = 0.0  # places of an expert / mean load (Switch: 1.25); 0: drop no token

    kind = "moe"
    module = "forescale.models.mlps.moe_module.MixtureOfExperts"
    writes = ("down", "shared.down")
    not_muon = ("router.weight",)
    stacked = ("gate.weight", "up.weight", "down.weight")
    is_gated = True
    is_routed = True

    def of_layer(self, layer: int) -> Mlp:
        """Return the MLP of a layer: the first dense_layers have no experts."""
        return _DENSE if layer < self.dense_layers else self

    def sized(self, sized: "ModelConfig") -> "Experts":
        """Return the part with the width of an expert."""
        active = max(1, self.top_k + self.shared)
        return replace(self, expert_width=self.expert_width or (sized.mlp_width or 0) // active)

    def width(self, config: "ModelConfig") -> int:
        """Return the width of an expert."""
        width = self.expert_width or self.sized(config.sized()).expert_width
        assert width is not None
        return width

    def shapes(self, config: "ModelConfig") -> Shapes:
        width, e, inner = config.sizes.width, self.experts, self.width(config)
        shapes: Shapes = {"router.weight": (e, width)}
        shapes |= {f"{name}.weight": (e, inner, width) for name in _INNER}
        shapes["down.weight"] = (e, width, inner)
        if self.shared:
            for name in _INNER:
                shapes |= linear(f"shared.{name}", width, self.shared * inner, False)
            shapes |= linear("shared.down", self.shared * inner, width, False)
        return shapes

    def _expert(self, config: "ModelConfig") -> int:
        """Return the parameters of one expert."""
        return 3 * config.sizes.width * self.width(config)

    def flops(self, config: "ModelConfig", sequence_length: int, causal: bool) -> int:
        """Return the FLOPs of the router and of the experts that a token uses, the shared ones too.

        A capacity changes nothing here: as for MFU, neither places without a token are counted, nor
        are dropped tokens subtracted.
        """
        active = self.top_k + self.shared
        return 2 * (active * self._expert(config) + self.experts * config.sizes.width)

    def divided(self, config: "ModelConfig") -> dict[str, int]:
        """Return the matrices of the shared experts: of the router and the others a rank has all
        that it uses, for its own tokens."""
        if not self.shared:
            return {}
        names = tuple(f"shared.{name}" for name in _INNER)
        return by_output(self.shapes(config), names, "shared.down")

    def idle(self, config: "ModelConfig") -> int:
        return (self.experts - self.top_k) * self._expert(config)

    def activation_bytes(self, config: "ModelConfig", bytes_per_value: int, norm_bytes: int) -> int:
        """Return the bytes that router, rows and experts save of a token.

        Router, in fp32: its input where it isn't, probabilities, and logits for the z-loss; a
        number a token for each of that loss's log Z, the token's share of the means, and the sum of
        sigmoid scores. Pair of token and expert: weight and its divisor, three numbers (int64) of
        where it is, and the expert's output. Row of an expert, of which a capacity makes more: its
        input, gate, up, and the product of silu(gate) and up. Shared experts keep silu(gate) too.
        """
        s, b, k = config.sizes, bytes_per_value, self.top_k
        has_z, inner = self.z_loss > 0, self.width(config)
        has_loss, has_sum = has_z or self.balance_loss > 0, self.scores == "sigmoid"
        router = 4 * self.experts * (1 + has_z) + (4 * s.width if b < 4 else 0)
        router += 4 * (has_z + has_loss + has_sum)
        pairs = k * (16 + b + b * s.width) + (4 * k + 4 if self.renormalise else 0)
        row = 8 + b * (s.width + 3 * inner)
        rows = k * (self.capacity or 1.0) * row
        return int(router + pairs + rows) + 4 * b * self.shared * inner

    def compiled_bytes(self, config: "ModelConfig", bytes_per_value: int) -> int:
        """Return the same without silu(gate). The router's input in fp32 stands for the norm's
        output, unless shared experts take this."""
        b, width = bytes_per_value, config.sizes.width
        normed = b * width if b < 4 and not self.shared else 0
        shared = b * self.shared * self.width(config)
        return self.activation_bytes(config, b, b) - shared - normed

    def selected_bytes(self, config: "ModelConfig", bytes_per_value: int) -> int:
        """Return the bytes of the router's logits in fp32, of the results of each expert's matrices
        for its rows, and of those of the shared ones."""
        width, inner = config.sizes.width, self.width(config)
        rows = self.top_k * (self.capacity or 1.0)
        shared = (2 * self.shared * inner + width) * (self.shared > 0)
        results = rows * (2 * inner + width) + shared
        return 4 * self.experts + int(bytes_per_value * results)

    def problems(self) -> list[Problem]:
        problems: list[Problem] = []

        def add(name: str, problem: str, todo: str) -> None:
            problems.append((name, problem, todo))

        if self.experts < 2:
            add("experts", f"{self.experts} is no mixture", "give at least 2, or choose mlp=swiglu")
        elif not 1 <= self.top_k <= self.experts:
            problem = f"a token can't use {self.top_k} of {self.experts} experts"
            add("top_k", problem, f"give 1 to {self.experts}")
        if self.expert_width is not None and self.expert_width < 1:
            add("expert_width", f"{self.expert_width} is not a size", "give at least 1")
        for name in ("shared", "dense_layers"):
            if (count := getattr(self, name)) < 0:
                add(name, f"{count} is not a count", "give 0 or more")
        for name in ("balance_loss", "z_loss", "bias_speed", "capacity"):
            if not 0 <= (value := getattr(self, name)) < float("inf"):
                add(name, f"{value} is not 0 or more", "give 0 to switch it off")
        if 1 < self.bias_speed < float("inf"):
            problem = f"a step of {self.bias_speed:g} is wider than the scale of all scores, 0 to 1"
            add("bias_speed", problem, "give less, such as 0.001")
        most = self.experts / max(1, self.top_k)
        if most < self.capacity < float("inf"):
            problem = f"with {self.capacity:g} an expert has more places than there are tokens"
            add("capacity", problem, f"give at most {most:g}, or 0 to drop nothing")
        if 0 < self.capacity < 1:
            problem = f"{self.capacity} leaves tokens without a place even if all experts are alike"
            add("capacity", problem, "give 1 or more, such as 1.25, or 0 to drop nothing")
        if self.bias_speed and self.scores == "softmax":
            problem = "a bias of the choice is on the scale of sigmoid scores"
            add("bias_speed", problem, "choose scores=sigmoid, or give 0")
        if self.top_k == 1 and self.renormalise:
            problem = "the score of the only expert becomes 1, and the router learns nothing"
            add("renormalise", problem, "set it to false, or give top_k=2 or more")
        return problems

    def problems_in(self, sized: "ModelConfig", longest: int | None) -> list[Problem]:
        problems: list[Problem] = []
        active = max(1, self.top_k + self.shared)
        if self.expert_width is None and (sized.mlp_width or 0) % active:
            problem = f"{active} experts a token do not divide mlp_width {sized.mlp_width}"
            problems.append(("expert_width", problem, "give it"))
        if self.dense_layers >= (sized.num_layers or 1):
            problem = f"{self.dense_layers} dense layers of {sized.num_layers} leave no mixture"
            problems.append(("dense_layers", problem, "give fewer, or choose mlp=swiglu"))
        return problems
