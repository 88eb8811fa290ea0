"""Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2): the sign of an interpolated momentum.

Lion keeps one moment; AdamW keeps two. Its learning rate is typically 3 to 10 times smaller than
AdamW's, and its weight decay larger by the same factor (section 5 of the paper). Each element is
updated independently, so the result does not depend on where ZeRO cuts parameters.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

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
            (beta1, beta2), rate = group["betas"], group["lr"]
            for params in _together([p for p in group["params"] if p.grad is not None]):
                for p in params:
                    if "exp_avg" not in self.state[p]:
                        self.state[p]["exp_avg"] = torch.zeros_like(p)
                gradients: Any = [p.grad for p in params]
                momenta = [self.state[p]["exp_avg"] for p in params]
                torch._foreach_mul_(params, 1 - rate * group["weight_decay"])
                updates = torch._foreach_lerp(gradients, momenta, beta1)
                torch._foreach_sign_(updates)
                torch._foreach_add_(params, updates, alpha=-rate)
                torch._foreach_lerp_(momenta, gradients, 1 - beta2)
                del updates  # before the next ones
        return loss


def _together(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the parameters in lists that have no more elements than the largest one has: so their
    updates need no more memory than its update does."""
    most, run, size = max((p.numel() for p in params), default=0), list[Tensor](), 0
    for p in params:
        if run and size + p.numel() > most:
            yield run
            run, size = [], 0
        run.append(p)
        size += p.numel()
    if run:
        yield run


def build(config: LionConfig, groups: list[dict]) -> torch.optim.Optimizer:
    """Return Lion over `groups`."""
    return Lion(groups, betas=(config.beta1, config.beta2))
