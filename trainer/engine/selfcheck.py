"""The self-check: does this device still compute correctly, and do all ranks hold the same weights?

A processor that computes wrong results without an error is rare, and ruins a run unnoticed (Dixit
et al. 2021, "Silent Data Corruptions at Scale"). So at intervals, between backward and update, a
rank computes its first micro-batch some times more: the loss must be that of the step, and the
gradients of one early parameter (to which the whole backward contributes) must be equal. The
weights that all ranks hold must have the same hash.

Where the run is exact (config/hardware.py), two replays are compared bit by bit. Otherwise replays
differ by the order of additions, by how much nobody knows beforehand, and it changes as the model
learns. So each check measures it: of 8 replays, each one's deviation is the largest difference from
their median, over the largest value; the usual deviation is the median of these, here or at the
last checks, whichever is larger. A fault is a replay that deviates by 200 times that, and by more
than the rounding of the number format explains; or by half of the largest value. So is a usual
deviation that is 200 times the last ones.

How 8 and 200 were chosen: a healthy check is to be called a fault less than once in 10,000 times.
Of 1e6 simulated ones it was 0 where noise is normal, 1 of Laplace's, 19 of Student's t with 3
degrees of freedom (540 with 2, whose variance is infinite). Had two replays been compared, and 10
times their first difference tolerated, 15 to 30 % of healthy runs would have halted. What the
tolerance hides: a fault in the lower bits of a result; in bf16, where roundings alone are usual
deviations of 0.2 %, all of a gradient but its upper bits. A changed weight is found all the same,
by its hash. Doubt: the noise of a GPU has not been measured.

Invariant: the check does not change the training: the gradients that wait for the update stay, and
random numbers depend on the micro-batch alone.

Where groups of ranks have a copy of the states each (replicas.py), the ranks with the same part of
them must have the same hash of that part: weights, masters and moments, at stage 3 too.

At ZeRO stage 3 the weights are partitioned, so nothing can be compared across ranks, and gathering
them for an extra backward would disturb DeepSpeed's prefetching. There, and in a pipeline, whose
stages compute a loss together, the forward is replayed without a gradient, and compared with
itself.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forescale.engine.step import Engine
from forescale.models.parallel.whole import whole_of

REPLAYS = 8  # where bits may differ; 2 where they must not
_FACTOR = 200.0  # times the usual deviation of a replay
_PAST = 16  # checks that the usual deviation is remembered of
# Deviations that the rounding of a format explains, whatever was measured: in bf16 of two additions
# of the largest value; in fp32, whose errors grow over many layers, 1e-5 (measured between ranks).
_ROUNDINGS, _LEAST = 2.0, 1e-5
_CEILING = 0.5  # no replay of a sound device deviates by half of the largest value
_NAMED = 16  # ranks that a sentence names at most
_ODD = 0x9E3779B97F4A7C15  # makes the hash depend on the parameter (golden ratio, splitmix64)


@dataclass(frozen=True)
class Finding:
    """The result on one rank. fault: a sentence, or None; weights: the hash of the weights that all
    ranks have, or None at stage 3; divided_weights: (parts, part, hash) of the matrices and experts
    that ranks divide; ranks with the same part of as many parts have the same hash. The stages of a
    pipeline are such parts, of all weights. replicas: the first rank with the same part of the
    states, and their hash here; (0, None) if none has."""

    rank: int
    host: str
    fault: str | None
    weights: int | None
    divided_weights: tuple[tuple[int, int, int | None], ...] = ()
    replicas: tuple[int, int | None] = (0, None)


class Noise:
    """How much the replays of one quantity may deviate. floor: what rounding explains, relative.

    tolerance: of the last check; 0 before.
    """

    def __init__(self, floor: float):
        self.floor, self.tolerance = floor, 0.0
        self._past: deque[float] = deque(maxlen=_PAST)

    def fault(self, values: list[Tensor]) -> float | None:
        """Return the deviation that is a fault, or None; values: of each replay."""
        gaps = _deviations_of(values)
        past = torch.tensor([*self._past], dtype=torch.float64)
        tolerance, is_fault = judged(gaps, past, self.floor)
        self.tolerance = float(tolerance)
        if is_fault:
            return float(gaps.max())
        self._past.append(float(_usual(gaps)))
        return None


def deviations(values: Tensor) -> Tensor:
    """Return how far each of M replays is from their median, (..., M), of values (..., M, E): the
    largest difference over the largest median. inf for a replay that isn't finite where the median
    is, or the reverse; 0 where all agree that it isn't."""
    ordered = values.sort(-2).values
    middle, size = ordered.shape[-2] // 2, ordered.shape[-2]
    centre = ordered[..., middle, :]
    if size % 2 == 0:
        centre = (centre + ordered[..., middle - 1, :]) / 2
    gap = (values - centre[..., None, :]).abs()
    same = (values == centre[..., None, :]) | (values.isnan() & centre.isnan()[..., None, :])
    gap = gap.masked_fill(same, 0.0).nan_to_num(torch.inf, torch.inf)
    largest = centre.abs().nan_to_num(0.0, 0.0).amax(-1).clamp(min=1e-30)
    return gap.amax(-1) / largest[..., None]


def judged(values: Tensor, past: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Return the tolerance of a check, (...), and whether it has a fault, (...).

    values: the deviations of its M replays, (..., M); past: the medians of earlier checks, (...,
    N), where N may be 0.
    """
    usual = _usual(values)
    before = past.median(-1).values if past.shape[-1] else usual
    tolerance = (_FACTOR * torch.maximum(usual, before)).clamp(min=floor, max=_CEILING)
    grown = (usual > _FACTOR * before) & (usual > floor)
    return tolerance, (values.amax(-1) > tolerance) | grown


def _usual(values: Tensor) -> Tensor:
    """Return the median of deviations, (..., M), the larger of two: the smaller is smallest by
    chance more often."""
    return values.sort(-1).values[..., values.shape[-1] // 2]


class SelfCheck:
    """The self-check of one rank. exact: the bits of replays must be equal.

    tolerance: relative, of the last check; None before the first.
    """

    def __init__(self, engine: Engine, host: str, exact: bool):
        self.engine, self.host, self.exact = engine, host, exact
        self.partitioned = any(hasattr(p, "ds_tensor") for p in engine.names)
        self.has_gradient = not self.partitioned and engine.pipeline is None
        self.tolerance: float | None = None
        eps = torch.finfo(next(iter(engine.names)).dtype).eps
        floor = max(_LEAST, _ROUNDINGS * eps)
        self._noise = {name: Noise(floor) for name in ("loss", "gradient")}

    def __call__(self, batch, losses: Tensor) -> str | None:
        """Check between backward and update. Return a sentence that names the faulty rank and host
        on all ranks, or None. A synchronisation, of fixed size where there is no fault.

        batch: this rank's part of the step; losses: what `backward` returned for it.
        """
        world = self.engine.world
        fault = self._fault(batch, losses[0])
        places = {(whole_of(p).parts, whole_of(p).part) for p in self.engine.names}
        stages, stage = world.pipeline.size, world.pipeline.rank
        hashes = [
            (parts * stages, stage * parts + part, self._weights_hash((parts, part)))
            for parts, part in sorted(places)
            if parts * stages > 1
        ]
        common = self._weights_hash() if stages == 1 else None
        first, states = self._replicas()
        of_places = {"": common, **{f"{part} of {parts}": each for parts, part, each in hashes}}
        of_places[f"states as {first}"] = states
        if world.merged(None if fault else of_places, common_hashes) is not None:
            return None
        mine = (world.rank, self.host, fault, common, tuple(hashes), (first, states))
        return world.reduce_on_main(mine, lambda all: fault_of([Finding(*each) for each in all]))

    def _fault(self, batch, loss: Tensor) -> str | None:
        replays = [self._replay(batch) for _ in range(2 if self.exact else REPLAYS)]
        by_name = dict(zip(("loss", "gradient"), zip(*replays, strict=True), strict=False))
        values = {name: [*each] for name, each in by_name.items()}
        # Without a gradient the losses are in eval mode; of ranks that divide matrices only
        # the first reports its loss, the others 0 (Engine.backward).
        if self.has_gradient and self.engine.world.tensor.is_main:
            values["loss"].append(loss)
        if self.exact:
            self.tolerance = 0.0
            gaps = [gap for each in values.values() if (gap := _gap(each)) is not None]
            if not gaps:
                return None
            also = ""
            if self.engine.world.device.type != "cpu":
                also = " (if other devices say so too, set train.deterministic=false)"
            differs = f"differs by {max(gaps):.2g} (relative), not by nothing"
            return f"a micro-batch computed again {differs}{also}"
        faults = {name: self._noise[name].fault(each) for name, each in values.items()}
        self.tolerance = max(self._noise[name].tolerance for name in values)
        for name, deviation in faults.items():
            if deviation is not None:
                tolerance = self._noise[name].tolerance
                return (
                    f"a micro-batch computed again differs by {deviation:.2g} (relative, {name}), "
                    f"where {tolerance:.2g} are usual at most"
                )
        return None

    def _replay(self, batch) -> list[Tensor]:
        """Return [loss], or [loss, gradient of an early parameter], of the first micro-batch."""
        engine, micro = self.engine, batch.micro[0]
        engine.seed_for(batch.step, micro.index)
        if not self.has_gradient:
            return [engine.losses(micro).sum()]
        # Not through DeepSpeed's forward, whose hooks expect its own backward.
        positional, named = micro.arguments(engine.world.device)
        loss, *_ = engine.combined(engine.module(*positional, **named), micro)
        # The first trained vector, else the first trained parameter: it is small, and the whole
        # backward contributes to its gradient.
        trained = [p for p in self.engine.names if p.requires_grad]
        early = next((p for p in trained if p.dim() == 1), trained[0])
        total = loss.sum()
        (gradient,) = torch.autograd.grad(total, [early])
        return [total.detach().float(), gradient]

    @torch.no_grad()
    def _weights_hash(self, place: tuple[int, int] = (1, 0)) -> int | None:
        """Return a hash of the bits of the parameters that all ranks have, as the forward uses
        them; with `place` (parts, part), of those of which this rank has that part. Any flipped bit
        changes it."""
        if self.partitioned:
            return None
        every = enumerate(self.engine.names)
        return _hash((i, p) for i, p in every if (whole_of(p).parts, whole_of(p).part) == place)

    @torch.no_grad()
    def _replicas(self) -> tuple[int, int | None]:
        """Return `replicas` of Finding."""
        world = self.engine.world
        if world.replicas.size == 1:
            return 0, None
        layout = self.engine.layout
        states = [p.ds_tensor for p in self.engine.names] if self.partitioned else []  # type: ignore[attr-defined]
        for unit in layout.units():
            moments = layout.base.state.get(unit.master, {}).values()
            states += [unit.master, *(moment for moment in moments if torch.is_tensor(moment))]
        return world.mesh.replica_peers(world.rank)[0], _hash(enumerate(states))


def _hash(tensors: Iterable[tuple[int, Any]]) -> int:
    """Return a hash of the bits of numbered tensors."""
    total = 0
    for i, tensor in tensors:
        bits = tensor.detach().reshape(-1).view(_INTEGERS[tensor.element_size()])
        total += int(bits.sum(dtype=torch.int64)) * (_ODD * (i + 1) | 1)
    return total % 2**64


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _gap(values: list[Tensor]) -> float | None:
    """Return the largest deviation of replays of one quantity; None if all have the same bits."""
    first = values[0]
    same = (((first == other) | (first.isnan() & other.isnan())).all() for other in values[1:])
    if all(map(bool, same)):
        return None
    return float(_deviations_of(values).max())


def _deviations_of(values: list[Tensor]) -> Tensor:
    return deviations(torch.stack([v.detach().double().reshape(-1) for v in values]))


def common_hashes(hashes: list[dict[str, int | None] | None]) -> dict[str, int | None] | None:
    """Return the hashes of several ranks by place; None if two differ in one, or one rank has a
    fault."""
    every: dict[str, int | None] = {}
    for each in hashes:
        if each is None or any(every.setdefault(at, value) != value for at, value in each.items()):
            return None
    return every


def fault_of(findings: list[Finding]) -> str | None:
    """Return one sentence that names the faulty rank and host, or None if nothing was found."""
    faults = [f"rank {f.rank} on {f.host}: {f.fault}" for f in findings if f.fault]
    faults += _differing_weights(findings, [f.weights for f in findings])
    divided = [
        ((parts, part), f, weights) for f in findings for parts, part, weights in f.divided_weights
    ]
    for place in sorted({place for place, *_ in divided}):
        same = [(f, weights) for at, f, weights in divided if at == place]
        faults += _differing_weights([f for f, _ in same], [weights for _, weights in same])
    for first in sorted({f.replicas[0] for f in findings}):
        alike = [f for f in findings if f.replicas[0] == first]
        faults += _differing_weights(alike, [f.replicas[1] for f in alike])
    every = [*dict.fromkeys(faults)]
    rest = [f"and {n:,} others"] if (n := len(every) - _NAMED) > 0 else []
    return "; ".join([*every[:_NAMED], *rest]) or None


def _differing_weights(findings: list[Finding], hashes: list[int | None]) -> list[str]:
    """Return a sentence for each rank whose hash is not that of most, or one for all; [] if all are
    equal."""
    if len(set(hashes)) <= 1:
        return []
    usual = max(set(hashes), key=hashes.count)
    if hashes.count(usual) * 2 > len(hashes):
        odd = [f for f, hashed in zip(findings, hashes, strict=True) if hashed != usual]
        where = [f"rank {f.rank} on {f.host}" for f in odd]
        return [f"{one}: its weights differ from the others'" for one in where]
    names = ", ".join(f"{f.rank} on {f.host}" for f in findings[:_NAMED])
    rest = f" and {n:,} others" if (n := len(findings) - _NAMED) > 0 else ""
    return [f"the weights of ranks {names}{rest} differ, where all must be equal"]
