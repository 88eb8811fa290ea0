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


class MixesTypesOfConvolution(Small):
    def __init__(self, vocab_size: int):
        super().__init__(vocab_size)
        self.kernel_DDK = nn.Parameter(torch.zeros(64, 64, 3))

    def changed(self, x_BLD):
        return F.conv1d(x_BLD.transpose(1, 2), self.kernel_DDK.float(), padding=1).transpose(1, 2)


class UsesWhatGpusHave(Small):
    """Nothing here fails on a GPU, and some of it has no fake kernel, or sizes that values have."""

    def changed(self, x_BLD):
        x_ND = x_BLD.flatten(0, 1)
        rows, _ = torch.where(x_ND > 0)
        x_ND = x_ND.index_add(0, rows, x_ND[rows])
        x_ND = x_ND + x_ND[x_ND.sum(1) > 0].sum() + torch.unique(rows).numel()
        generator = torch.Generator(device=x_BLD.device).manual_seed(1)
        x_ND = x_ND + torch.rand(64, generator=generator, device=x_BLD.device, dtype=x_ND.dtype)
        assert f"{x_ND.detach().float().mean().cpu().numpy():.1f}{x_ND.mean():.1f}"
        assert torch.cuda.memory_stats()["allocated_bytes.all.peak"] >= 0
        x_BLD = x_ND.view_as(x_BLD)
        return compiled(F.scaled_dot_product_attention(x_BLD, x_BLD, x_BLD, is_causal=True))


@torch.compile
def compiled(x_BLD):
    return F.silu(x_BLD) * x_BLD


class SplitsByValues(Small):
    def changed(self, x_BLD):
        counts = torch.ones(2, dtype=torch.int64, device=x_BLD.device) * (x_BLD.shape[1] // 2)
        return torch.cat(x_BLD.split(counts.tolist(), 1), 1)


class HasNoFakeKernel(Small):
    def __init__(self, vocab_size: int):
        super().__init__(vocab_size)
        self.gru = nn.GRU(64, 64, batch_first=True)

    def changed(self, x_BLD):
        return self.gru(x_BLD)[0]


class Sees:
    """A callback, which looks at a loss and a weight."""

    def __init__(self, engine):
        self.engine = engine

    def see(self, step, summary):
        assert summary.losses[0] > 0
        assert next(self.engine.module.parameters()).is_cuda
