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
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if (gradient := p.grad) is None:
                    continue
                if "exp_avg" not in self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                momentum = self.state[p]["exp_avg"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(torch.lerp(gradient, momentum, beta1).sign_(), alpha=-group["lr"])
                momentum.lerp_(gradient, 1 - beta2)
        return loss


def build(config: LionConfig, groups: list[dict]) -> torch.optim.Optimizer:
    """Return Lion over `groups`."""
    return Lion(groups, betas=(config.beta1, config.beta2))
