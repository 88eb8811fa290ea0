"""What the layout of a DeepSpeed optimizer says: where a parameter's master weight, moments and
gradient are stored. The layouts themselves are in stages.py.

A *unit* is one tensor that the base optimizer updates, with the pieces of our parameters that it
holds; a `Piece` gives the range to read and write. Invariant: between `backward` and `step` every
layout returns the averaged gradient, not clipped and not yet orthogonalised by Muon.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from forescale.engine.parallel.experts import is_expert
from forescale.engine.parallel.matrices import Part
from forescale.engine.ranks import Ranks
from forescale.models.parallel.whole import whole_of


@dataclass(frozen=True)
class Piece:
    """`size` elements of a flattened parameter from `start`, stored at offset `at` of a unit."""

    param: nn.Parameter
    start: int
    at: int
    size: int


@dataclass(frozen=True)
class Unit:
    """A tensor that the base optimizer updates (fp32), its parameter group's index, its pieces."""

    group: int
    master: Tensor
    pieces: list[Piece]


class Layout:
    """The common base. `replicated`: no element has one owner, see Replicated."""

    replicated = False
    adds_beside = False

    def __init__(self, engine):
        self.engine = engine
        self.optimizer = engine.optimizer
        self.base = engine.basic_optimizer
        self.factor = 1.0
        # Of the gradient times `loss_scale`, over all ranks, where the engine has measured it.
        self.norm: float | None = None
        # Whether this rank counts a parameter that it holds: False for the copy of another rank's.
        self.counts: Callable[[nn.Parameter], bool] = lambda param: True
        self.dividing: Ranks | None = None

    def is_muon(self, group: int) -> bool:
        return bool(self.base.param_groups[group].get("use_muon", False))

    def units(self) -> Iterator[Unit]:
        """Yield this rank's units, in an order that never varies."""
        raise NotImplementedError

    def owned(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield the averaged gradient of all elements that this rank owns, times `loss_scale`, with
        the parameter that each part is of."""
        raise NotImplementedError

    def parts(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield the same of the parameters that this rank counts."""
        yield from ((p, gradient) for p, gradient in self.owned() if self.counts(p))

    def gradients(self) -> Iterator[Tensor]:
        """Yield the same without the parameters, possibly several in one."""
        yield from (gradient for _, gradient in self.parts())

    def reduced(self) -> Iterator[Tensor]:
        """Yield all that a step reads of the averaged gradient on this rank, as memory that may be
        written, where ZeRO divides the states and nothing is offloaded."""
        yield from (gradient for _, gradient in self.owned())

    def forget(self) -> None:
        """Let a parameter that the next step doesn't use have no gradient."""

    def add_beside(self, replicas: Ranks) -> None:
        """Let the gradient be summed over replicas beside the last backward pass of each step, from
        now on, where DeepSpeed does so with reductions (`adds_beside`). In that pass all ranks must
        make the same gradients, in the same order."""

    @property
    def bucket_size(self) -> int:
        """The number of elements of a communication bucket."""
        return int(self.optimizer.reduce_bucket_size)

    def sum_over(self, ranks: int) -> None:
        """Let the gradient be the sum over so many ranks, and not their mean, from now on."""
        # DeepSpeed takes it for the number of ranks with the same windows, and so divides by 1.
        self.optimizer.sequence_parallel_size = ranks

    def square_sum(self, device, world_size: int) -> Tensor:
        """Return what this rank adds to the sum of squares of the whole gradient (times
        `loss_scale` squared): that of all elements that it owns, shape (), fp64."""
        return fp32_square_sum(self.gradients(), device).double()

    def momentum_slot(self, unit: Unit, piece: Piece) -> tuple[int, int, int] | None:
        """Return (start in the parameter, offset in the buffer, size) of Muon's momentum; None if
        it is laid out like the master weight."""
        return None

    def momentum_size(self, unit: Unit) -> int:
        """Return the number of elements of a unit's Muon momentum buffer."""
        return unit.master.numel()

    @property
    def loss_scale(self) -> float:
        """The factor by which gradients are scaled in fp16; 1.0 otherwise."""
        return float(getattr(self.optimizer, "loss_scale", 1.0))

    @property
    def backward_scale(self) -> float:
        """A factor that the loss must be multiplied with because DeepSpeed doesn't do it."""
        return 1.0

    def add_in_fp32(self) -> None:
        """Add up the gradients of micro-batches in fp32, though the weights have fewer digits.

        torch then makes each `.grad` in fp32, from the gradient of one backward pass, which has the
        weights' type: DeepSpeed accumulates and reduces what it finds there.
        """
        for param in self.engine.module.parameters():
            if param.requires_grad:
                param.grad_dtype = torch.float32

    def divided_among(self, ranks: Ranks) -> None:
        """Register the ranks that divide matrices: Muon needs whole ones."""
        self.dividing = ranks

    def mark(self, param: nn.Parameter, gradient: Tensor | None) -> None:
        """Mark the gradient of a part of a divided matrix, for Muon."""
        whole = whole_of(param)
        is_part = whole.parts > 1 and self.in_turns(param) > 1
        if self.dividing is not None and gradient is not None and is_part:
            gradient.part = Part(whole, self.dividing)  # type: ignore[attr-defined]

    def reduce_later(self) -> None:
        """Let backward passes add up gradients alone from now on, until `reduce`: with those of
        other micro-batches under way, DeepSpeed can't see which is the last one."""
        self.engine.pipeline_parallelism = True

    def reduce(self) -> None:
        """Average the gradients that `reduce_later` has left, over the ranks."""
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.allreduce_gradients()

    def in_turns(self, param: nn.Parameter) -> int:
        """Return how many ranks divide matrices such as this; of experts a rank has whole ones."""
        return 1 if self.dividing is None or is_expert(param) else self.dividing.size

    def prepare_step(self, factor: float) -> None:
        """Multiply the gradients by `factor` (clipping), at once or inside DeepSpeed's step."""
        self.factor = factor

    def discard(self) -> None:
        """Discard the gradients, as if there had been no backward."""
        self.engine.zero_grad()

    def before_load(self) -> None:
        """Prepare for masters and moments being overwritten."""

    def after_load(self) -> None:
        """Copy the masters to the forward weights (DeepSpeed's setters don't)."""

    def scale_in_step(self, is_scaled) -> None:
        """Wrap DeepSpeed's unscaling so that it also multiplies by our factor, in fp32. Where the
        loss has no scale, it would multiply by 1: it clips nothing."""
        original = self.optimizer.unscale_and_clip_grads

        def unscale_and_clip_grads(first, *args, **kwargs):
            result = original(first, *args, **kwargs) if self.loss_scale != 1.0 else None
            if self.factor != 1.0 and (grads := list(is_scaled(first))):
                torch._foreach_mul_(grads, self.factor)
            return result

        self.optimizer.unscale_and_clip_grads = unscale_and_clip_grads


class Replicated(Layout):
    """The common base at stage 0: every rank holds every element, of a divided parameter those of
    its part."""

    replicated = True

    def divided_among(self, ranks):
        super().divided_among(ranks)
        self.base.register_step_pre_hook(lambda *_: self._mark_all())

    def _mark_all(self) -> None:
        for unit in self.units():
            if self.is_muon(unit.group):
                self.mark(unit.pieces[0].param, unit.master.grad)

    def owned(self):
        yield from ((p, p.grad) for p in self._params() if p.grad is not None)

    def gradients(self):
        """Yield the gradients of the forward weights, also of those that it doesn't count."""
        yield from (p.grad for p in self._params() if p.grad is not None)

    def sum_over(self, ranks):
        self.engine.sequence_parallel_size = ranks

    def square_sum(self, device, world_size):
        """Return the sum of squares, divided by the number of ranks with the same elements."""
        total = torch.zeros((), dtype=torch.float64, device=device)
        for parts in sorted({whole_of(p).parts for p in self._params()}):
            grads = (p.grad for p in self._params() if whole_of(p).parts == parts)
            square = fp32_square_sum((g for g in grads if g is not None), device).double()
            total += square / (world_size // parts)
        return total

    def _params(self) -> Iterator[nn.Parameter]:
        return (piece.param for unit in self.units() for piece in unit.pieces)


def fp32_square_sum(tensors: Iterator[Tensor], device) -> Tensor:
    """Return the sum of squares in fp32, shape (): one kernel per tensor, no synchronisation.

    torch._foreach_norm has one for many, but adds the squares of a tensor in another order.
    """
    norms = [torch.linalg.vector_norm(t, dtype=torch.float32).to(device) for t in tensors]
    return torch.stack(norms).square().sum() if norms else torch.zeros((), device=device)
