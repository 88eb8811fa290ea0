"""Muon's update of a matrix, as DeepSpeed's `muon_update` computes it, of several at once.

DeepSpeed orthogonalises one matrix after the other, and of small ones the calls take a good part of
the time. Here matrices of one shape are one product of a stack.
Invariant: on a CPU the updates in fp32 are the same to the bit, however many matrices share a stack
(in bf16 tiny ones may differ; with train.invariant none share one). The
momenta are DeepSpeed's own to the bit; so are the updates of method "gram". Those of "standard" are
its own but for rounding, of which they have less: each sum is part of the product before it.

Facts about DeepSpeed 0.19.8 that this leans on (tests/trainer/engine/optimizers/test_orthogonal.py
fails where one changes):
- All its optimizers call `muon_update` by name, with the settings of `MuonUpdate.__call__`.
- It looks for infinities in each gradient, to keep them out of the momentum, which takes a tenth of
  the update of small matrices. We don't: the engine applies no gradient that isn't finite, except
  in fp16. There stages 0 and 3 look for an overflow before they call it, and stages 1 and 2 give it
  a copy of the momentum, which they discard where an update isn't finite. The update of a gradient
  that isn't finite never is.
- What it returns to stages 1 and 2 is kept as views until their step.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from forescale.engine.parallel.matrices import Part, update_in_turns

# Bytes of a stack, in the iterations. Larger ones leave a processor's cache: in fp32, twelve
# matrices of 128 x 128 take longer by a third together than one by one, and four take as long.
_MOST = 1 << 18
_MOST_ON_GPU = 16 << 20  # whose time for small matrices is that of the launches
_stacks = True

_STEPS = 5  # Newton-Schulz iterations, with these coefficients (Jordan et al. 2024)
_A, _B, _C = 3.4445, -4.7750, 2.0315


class _Matrix(NamedTuple):
    """What is to be orthogonalised in place: a matrix, that of each expert, or a `part` of one."""

    blend: Tensor
    part: Part | None
    method: str


class MuonUpdate:
    """Replaces DeepSpeed's `muon_update`: follows the momentum, and returns the update.

    A gradient with the attribute `part` is one of a matrix that ranks divide (matrices.py): one
    of them orthogonalises the whole, and the update, like the momentum, is of the part.
    """

    def __init__(self, original: Any):
        self.original = original  # DeepSpeed's, for what this one doesn't do
        self._waiting: list[_Matrix] | None = None

    def __call__(
        self,
        gradient: Tensor,
        momentum: Tensor,
        beta: float = 0.95,
        *,
        ns_method: str = "gram",
        is_expert_group: bool = False,
        num_heads: int | None = None,
    ) -> Tensor:
        """Return the update, in the memory of the gradient if that is contiguous."""
        if num_heads is not None or gradient.ndim > 3:
            options: dict[str, Any] = {"is_expert_group": is_expert_group, "num_heads": num_heads}
            options["ns_method"] = ns_method
            update: Tensor = self.original(gradient, momentum, beta, **options)
            return update
        momentum.lerp_(gradient, 1 - beta)
        blend = gradient.lerp_(momentum, beta).contiguous()  # Nesterov's momentum
        matrix = _Matrix(blend, getattr(gradient, "part", None), ns_method)
        if self._waiting is None:
            _in_place([matrix])
        else:
            self._waiting.append(matrix)
        return blend

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is returned inside has its values only afterwards: those of one shape that follow
        each other are computed at once."""
        self._waiting = []
        try:
            yield
            waiting = self._waiting
        finally:
            self._waiting = None
        _in_place(waiting)


def use_stacks(enabled: bool) -> None:
    """Let matrices share a product, or not, from now on: which ones do so depends on the
    number of ranks, and a stack's product may round in another way than a matrix's."""
    global _stacks
    _stacks = enabled


def orthogonalise(blends: Sequence[Tensor], method: str) -> None:
    """Make of each matrix its update, in place; those of one shape that follow each other are
    computed at once. A matrix with the attribute `part` is one of a matrix that ranks divide."""
    _in_place([_Matrix(blend, getattr(blend, "part", None), method) for blend in blends])


def _in_place(waiting: Sequence[_Matrix]) -> None:
    from deepspeed.runtime.zero.muon.original_muon import ns_compute_dtype

    for method, same in groupby(waiting, lambda matrix: matrix.method):
        whole: list[Tensor] = []
        divided: list[tuple[Tensor, Part]] = []
        for blend, part, _ in same:
            if part is None:
                whole.append(blend)
            else:
                divided.append((blend, part))
        for blend, update in zip(whole, _updates(method, whole), strict=True):
            blend.copy_(update)
        if divided:
            update_in_turns(divided, partial(_updates, method), ns_compute_dtype(method))


def _updates(method: str, matrices: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the update of each matrix; those of one shape that follow each other are computed at
    once."""
    from deepspeed.runtime.zero.muon.original_muon import ns_compute_dtype

    for _, same in groupby(matrices, lambda matrix: (matrix.shape, matrix.dtype)):
        stack = list(same)
        size = stack[0].numel() * int(ns_compute_dtype(method).itemsize)
        most = _MOST_ON_GPU if stack[0].is_cuda else _MOST
        at_once = max(1, most // size) if _stacks else 1
        for i in range(0, len(stack), at_once):
            yield from _orthogonalised(stack[i : i + at_once], method)


def _orthogonalised(matrices: Sequence[Tensor], method: str) -> Sequence[Tensor]:
    """Return matrices of one shape orthogonalised, and scaled for their shape."""
    from deepspeed.runtime.zero.muon import original_muon as deepspeeds

    iterate = {"gram": deepspeeds.zeropower_via_gram_newtonschulz, "standard": _standard}
    # One alone stays a matrix: a product of a stack of one takes longer.
    stack = torch.stack([*matrices]) if len(matrices) > 1 else matrices[0]
    updates = iterate[method](stack, steps=_STEPS)
    rows, columns = matrices[0].shape[-2:]
    if rows > columns:
        updates *= math.sqrt(rows / columns)
    return [*updates] if len(matrices) > 1 else [updates]


def _standard(matrices: Tensor, steps: int) -> Tensor:
    """Return what DeepSpeed's zeropower_via_newtonschulz5 does, with fused sums as in
    torch.optim.Muon: on a CPU in 0.6 to 0.9 of the time."""
    from deepspeed.runtime.zero.muon.original_muon import ns_compute_dtype

    stack = matrices.flatten(end_dim=-3) if matrices.ndim > 3 else matrices  # of experts' matrices
    x, is_tall = stack.to(ns_compute_dtype("standard")), matrices.size(-2) > matrices.size(-1)
    if is_tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # spectral norm at most 1
    fused = torch.addmm if x.ndim == 2 else torch.baddbmm
    for _ in range(steps):
        gram = x @ x.mT
        x = fused(x, fused(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    x = x.mT if is_tall else x
    return x.unflatten(0, matrices.shape[:-2]) if matrices.ndim > 3 else x
