"""AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101): torch's fused implementation."""

import torch

from forescale.config.sections.optimizer import AdamWConfig


def build(config: AdamWConfig, groups: list[dict]) -> torch.optim.Optimizer:
    """Return AdamW over `groups`."""
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=1.0, fused=True, betas=betas, eps=config.eps)
