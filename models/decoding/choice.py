"""How the rows of a batch choose their tokens: each by its own rules and its own random numbers.

Invariant: what a row draws depends on no other row, where each has a generator.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from forescale.models.decoding.sampler import Sampler

Draw = torch.Generator | Sequence[torch.Generator] | None


class Choice:
    """samplers: of each row; generator: one for all rows, or one for each; None: torch's own."""

    def __init__(self, samplers: Sequence[Sampler], generator: Draw = None):
        self.samplers, self.generator = [*samplers], generator
        self._held: Tensor | None = None  # (B, V): which tokens a row holds; None: not counted yet
        self._groups = _grouped(self.samplers)

    def next_tokens(self, logits_BV: Tensor, tokens_BS: Tensor, real_BS: Tensor | None) -> Tensor:
        """Return the next token of each row, (B, 1) int64. tokens: those of the rows; real: False
        at padding."""
        held_BV = drawn_B1 = None
        if any(sampler.reads_row for sampler in self._groups):
            held_BV = self._held = self._counted(tokens_BS, real_BS, logits_BV.shape[1])
        if any(sampler.draws for sampler in self._groups):
            drawn_B1 = self._drawn(logits_BV)
        if len(self._groups) == 1:
            next_B1 = self.samplers[0].choose(logits_BV, drawn_B1, held_BV)
        else:
            next_B1 = tokens_BS.new_empty(len(tokens_BS), 1)
            for sampler, numbers in self._groups.items():
                rows = torch.tensor(numbers, device=logits_BV.device)
                options = [None if x is None else x[rows] for x in (drawn_B1, held_BV)]
                next_B1[rows] = sampler.choose(logits_BV[rows], *options)
        if held_BV is not None:
            held_BV.scatter_(1, next_B1, True)
        return next_B1

    def keep(self, going: Tensor) -> None:
        """Drop all rows but these, (R,) int64, and go on in their order."""
        rows = going.tolist()
        self.samplers = [self.samplers[i] for i in rows]
        self._groups = _grouped(self.samplers)
        self._held = None if self._held is None else self._held[going]
        if isinstance(self.generator, Sequence):
            self.generator = [self.generator[i] for i in rows]

    def join(self, other: "Choice") -> None:
        """Add the rows of another; in both each row has a generator."""
        assert isinstance(self.generator, Sequence)
        assert isinstance(other.generator, Sequence)
        self.generator = [*self.generator, *other.generator]
        self.samplers += other.samplers
        self._groups, self._held = _grouped(self.samplers), None

    def _counted(self, tokens_BS: Tensor, real_BS: Tensor | None, size: int) -> Tensor:
        """Return (B, V): True for each token that a row holds."""
        if self._held is not None:
            return self._held
        real = torch.ones_like(tokens_BS) if real_BS is None else real_BS.long()
        counts = torch.zeros(len(real), size, dtype=torch.long, device=real.device)
        return counts.scatter_add_(1, tokens_BS, real) > 0

    def _drawn(self, logits_BV: Tensor) -> Tensor:
        """Return a number of each row from 0 to below 1, (B, 1) fp64 where the logits are."""
        if isinstance(self.generator, Sequence):
            parts = [
                torch.rand(1, dtype=torch.float64, generator=g, device=g.device)
                for g in self.generator
            ]
            return torch.stack(parts).to(logits_BV.device)
        where = logits_BV.device if self.generator is None else self.generator.device
        size = (len(logits_BV), 1)
        drawn = torch.rand(size, dtype=torch.float64, generator=self.generator, device=where)
        return drawn.to(logits_BV.device)


def _grouped(samplers: Sequence[Sampler]) -> dict[Sampler, list[int]]:
    """Return the rows of each sampler."""
    groups: dict[Sampler, list[int]] = {}
    for row, sampler in enumerate(samplers):
        groups.setdefault(sampler, []).append(row)
    return groups
