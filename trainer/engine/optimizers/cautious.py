"""Cautious weight decay (Chen et al. 2025, arXiv 2510.12402): a weight decays only where its update
moves it towards zero.

It is laid around any optimizer by torch's hooks: the step is made without decay, and what it moved
is compared with the weights before it, of which a copy exists meanwhile. Invariant: elementwise, so
that partitions of ZeRO compute what whole parameters do.
"""

from typing import Any

import torch
from torch import Tensor


def decay_cautiously(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer decay weights only where their update has their sign.

    DeepSpeed's Muon calls the step of its base class, whose hooks are the same: the first call
    copies, and the first that ends decays.
    """
    before = list[tuple[dict[str, Any], float, list[Tensor]]]()

    def copy_weights(*_: Any) -> None:
        if not before:
            for group in optimizer.param_groups:
                if decay := group["weight_decay"]:
                    before.append((group, decay, [p.detach().clone() for p in group["params"]]))
                    group["weight_decay"] = 0.0

    @torch.no_grad()
    def decay_weights(*_: Any) -> None:
        for group, decay, weights in before:
            group["weight_decay"] = decay
            for p, old in zip(group["params"], weights, strict=True):
                has_its_sign = (old - p) * old > 0
                p.sub_(old * has_its_sign, alpha=group["lr"] * decay)
        before.clear()

    optimizer.register_step_pre_hook(copy_weights)
    optimizer.register_step_post_hook(decay_weights)
