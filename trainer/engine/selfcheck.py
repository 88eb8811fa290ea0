"""The self-check: does this device still compute correctly, and do all ranks hold the same weights?

A processor that computes wrong results without an error is rare, and ruins a run unnoticed (Dixit
et al. 2021, "Silent Data Corruptions at Scale"). So at intervals, between backward and update, a
rank computes its first micro-batch twice more: the loss must be that of the step, and the two
gradients of one early parameter (to which the whole backward contributes) must be equal. The
weights that all ranks hold must have the same hash.

Invariant: the check does not change the training: the gradients that wait for the update stay, and
random numbers depend on the micro-batch alone. If devices aren't exact to the bit, the first check
measures the difference between two replays, and ten times that is tolerated from then on.

At ZeRO stage 3 the weights are partitioned, so nothing can be compared across ranks, and gathering
them for an extra backward would disturb DeepSpeed's prefetching. There the forward is replayed
twice without a gradient, and compared with itself.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from forescale.engine.step import Engine, split_penalty

_ALLOWED = 10.0  # times the difference of two clean replays
_ODD = 0x9E3779B97F4A7C15  # makes the hash depend on the parameter (golden ratio, splitmix64)


@dataclass(frozen=True)
class Finding:
    """The result on one rank. fault: a sentence, or None; weights: the hash of the weights, or None
    at stage 3."""

    rank: int
    host: str
    fault: str | None
    weights: int | None


class SelfCheck:
    """The self-check of one rank. `tolerance`: relative, None until the first check has measured
    it."""

    def __init__(self, engine: Engine, host: str):
        self.engine, self.host = engine, host
        self.partitioned = any(hasattr(p, "ds_tensor") for p in engine.names)
        self.tolerance: float | None = None

    def __call__(self, batch, losses: Tensor) -> list[Finding]:
        """Check between backward and update. Return every rank's finding. A synchronisation.

        batch: this rank's part of the step; losses: what `backward` returned for it.
        """
        world = self.engine.world
        fault = self._fault(batch, losses[0])
        mine = (world.rank, self.host, fault, self._weights_hash())
        return [Finding(*fields) for fields in world.gather(mine)]

    def _fault(self, batch, loss: Tensor) -> str | None:
        first, second = (self._replay(batch) for _ in range(2))
        pairs = list(zip(first, second, strict=True))
        if not self.partitioned:  # at stage 3 the losses are computed in eval mode
            pairs.append((loss, first[0]))
        difference = max(_difference(a, b) for a, b in pairs)
        if self.tolerance is None:
            self.tolerance = 0.0 if difference == 0 else _ALLOWED * difference
            return None if difference < 1e-2 else f"two replays differ by {difference:.2g}"
        if difference <= self.tolerance:
            return None
        return f"a micro-batch computed again differs by {difference:.2g} (relative)"

    def _replay(self, batch) -> list[Tensor]:
        """Return [loss], or [loss, gradient of an early parameter], of the first micro-batch."""
        engine, micro = self.engine, batch.micro[0]
        engine.seed_for(batch.step, micro.index)
        if self.partitioned:
            return [engine.losses(micro).sum()]
        # Not through DeepSpeed's forward, whose hooks expect its own backward.
        positional, named = micro.arguments(engine.world.device)
        loss, _ = split_penalty(engine.module(*positional, **named))
        total = loss.sum()
        (gradient,) = torch.autograd.grad(total, [self._early()])
        return [total.detach().float(), gradient]

    def _early(self) -> torch.nn.Parameter:
        """Return the first trained vector, else the first trained parameter: it is small, and the
        whole backward contributes to its gradient."""
        trained = [p for p in self.engine.names if p.requires_grad]
        return next((p for p in trained if p.dim() == 1), trained[0])

    @torch.no_grad()
    def _weights_hash(self) -> int | None:
        """Return a hash of the bits of all parameters as the forward uses them; any flipped bit
        changes it."""
        if self.partitioned:
            return None
        total = 0
        for i, p in enumerate(self.engine.names):
            bits = p.detach().reshape(-1).view(_INTEGERS[p.element_size()])
            total += int(bits.sum(dtype=torch.int64)) * (_ODD * (i + 1) | 1)
        return total % 2**64


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _difference(a: Tensor, b: Tensor) -> float:
    """Return 0.0 if all bits are equal, else the largest difference over the largest value."""
    if torch.equal(a, b):
        return 0.0
    scale = max(float(a.abs().max()), float(b.abs().max()), 1e-30)
    gap = float((a.double() - b.double()).abs().max()) / scale
    return gap if gap == gap else float("inf")


def fault_of(findings: list[Finding]) -> str | None:
    """Return one sentence that names the faulty rank and host, or None if nothing was found."""
    faults = [f"rank {f.rank} on {f.host}: {f.fault}" for f in findings if f.fault]
    hashes = [f.weights for f in findings]
    if len(set(hashes)) > 1:
        usual = max(set(hashes), key=hashes.count)
        if hashes.count(usual) * 2 > len(hashes):
            odd = [f for f in findings if f.weights != usual]
            where = [f"rank {f.rank} on {f.host}" for f in odd]
            faults += [f"{one}: its weights differ from the others'" for one in where]
        else:
            names = ", ".join(f"{f.rank} on {f.host}" for f in findings)
            faults.append(f"the weights of ranks {names} differ, where all must be equal")
    return "; ".join(faults) or None
