"""Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2): the sign of an interpolated momentum.

Lion keeps one moment; AdamW keeps two. Its learning rate is typically 3 to 10 times smaller than
AdamW's, and its weight decay larger by the same factor (section 5 of the paper). Each element is
updated independently, so the result does not depend on where ZeRO cuts parameters.
"""

from collections.abc import Callable
from typing import Any

import torch

from forescale.config.sections.optimizer import LionConfig


class Lion(torch.optim.Optimizer):
    """The Lion optimizer. beta1: for the update; beta2: for the momentum (paper: 0.9 and 0.99)."""

    def __init__(self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99)):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient; return the loss of `closure`."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)
        return loss

    def _update(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(p)
        momentum, gradient = state["exp_avg"], p.grad
        assert gradient is not None
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(torch.lerp(gradient, momentum, beta1).sign_(), alpha=-group["lr"])
        momentum.lerp_(gradient, 1 - beta2)


def build(config: LionConfig, groups: list[dict]) -> torch.optim.Optimizer:
    """Return Lion over `groups`."""
    return Lion(groups, betas=(config.beta1, config.beta2))
