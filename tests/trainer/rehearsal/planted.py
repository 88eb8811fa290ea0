"""Classes of a user's own, each with a mistake that only a GPU would show."""

import torch
from torch import nn
from torch.nn import functional as F


class Small(nn.Module):
    def __init__(self, vocab_size: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, 64)
        self.output = nn.Linear(64, vocab_size, bias=False)

    def forward(self, tokens_BL, targets_BL=None):
        logits_BLV = self.output(self.changed(self.embedding(tokens_BL)))
        if targets_BL is None:
            return logits_BLV
        nats = F.cross_entropy(logits_BLV.transpose(1, 2), targets_BL, reduction="none")
        return nats.sum(1)

    def changed(self, x_BLD):
        return x_BLD


class MixesDevices(Small):
    def changed(self, x_BLD):
        return x_BLD * torch.ones(64)


class Reads(Small):
    def changed(self, x_BLD):
        return x_BLD * x_BLD.mean().item()


class MixesTypes(Small):
    def changed(self, x_BLD):
        return x_BLD @ torch.ones(64, 64, device=x_BLD.device)
