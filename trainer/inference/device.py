"""Where a model runs outside of training: one GPU, else the CPU."""

import torch


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
