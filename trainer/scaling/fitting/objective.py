"""The objective that a fit minimises, and the scaled gradient: how far a point is from a minimum.

    residual   r = log L - log L^ (or L - L^) of each run, where L^ is the fitted loss
    value      sum of w rho(r); Huber's rho is r^2 / 2 up to delta, delta (|r| - delta / 2) beyond

Least squares is delta = inf. Least absolute deviations is a delta far below all residuals: at most
delta / 2 a run above the optimum of the sum of |r|, which has kinks that no smooth solver resolves.
Invariant: the scaled gradient is that of the stated objective and has no unit: it doesn't change if
losses, weights, N or D are counted in other units.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from forescale.ground.errors import UserError
from forescale.scaling.fitting.forms import Design, Form
from forescale.scaling.fitting.points import Array

# Least residual of a run in the scale of the gradient, so that a perfect fit, whose gradient is
# nothing but rounding, is certified. No loss is known to seven digits.
ROUNDING = 1e-7


@dataclass(frozen=True)
class Objective:
    """An objective; the default is that of Hoffmann et al. 2022 (arXiv 2203.15556), eq. 3. delta:
    that of Huber's function, in units of the residual; on: "log" for residuals of log loss, "loss"
    for those of the loss. Raises UserError for other values."""

    delta: float = 1e-3
    on: str = "log"

    def __post_init__(self) -> None:
        if self.on not in ("log", "loss") or not self.delta > 0:
            problem = f"there is no objective with delta={self.delta} on '{self.on}'"
            raise UserError("objective", problem, "give a delta above 0, on 'log' or 'loss'")

    @classmethod
    def of(cls, delta: float | None, on: str) -> "Objective":
        """Return the objective of a job's keys. delta: None for least squares, 0 for least absolute
        deviations."""
        return cls(np.inf if delta is None else delta or LEAST_ABSOLUTE.delta, on)

    def __str__(self) -> str:
        """Return the name of the objective, such as "Huber 0.001 on log loss"."""
        kind = "least squares" if self.delta == np.inf else f"Huber {self.delta:g}"
        return f"{kind} on {'log loss' if self.on == 'log' else 'loss'}"

    def value(self, residual: Array, weight: Array) -> Array:
        """Return the objective, (R,), at residuals, (R, n)."""
        clipped = np.clip(residual, -self.delta, self.delta)
        return (weight * clipped * (residual - clipped / 2)).sum(-1)


LEAST_SQUARES, LEAST_ABSOLUTE = Objective(np.inf), Objective(1e-8)


@dataclass
class Rows:
    """Arrays of R replicates, (R, ...) each, of which some may be None."""

    def take(self, which: Array) -> Self:
        """Return the replicates of an index or a mask."""
        return replace(self, **{k: v[which] for k, v in vars(self).items() if v is not None})

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Return the replicates of all parts, in their order."""
        first, *others = parts
        names = [k for k, v in vars(first).items() if v is not None] if others else []
        return replace(first, **{k: np.concatenate([getattr(p, k) for p in parts]) for k in names})


@dataclass
class Local(Rows):
    """The objective at theta, (R, p), of R replicates.

    value: (R,); gradient: (R, p); pulls: the sum over runs of the size of each contribution to the
    gradient, (R, p); jacobian: (R, p, n); clipped: the residual, cut at delta, which is rho's
    derivative, (R, n); scale: L^, (R, n), if the residual is that of the loss itself.
    """

    value: Array
    gradient: Array
    pulls: Array
    jacobian: Array
    residual: Array
    clipped: Array
    scale: Array | None

    def put(self, which: Array, other: "Local") -> None:
        """Replace the replicates of `which` by the same ones of `other`."""
        for name, array in vars(self).items():
            if array is not None:
                array[which] = getattr(other, name)[which]


def local(
    form: Form, at: Design, log_loss: Array, weight: Array, theta: Array, goal: Objective
) -> Local:
    """Return the objective at theta, (R, p) or (1, p), if all replicates have the same. log_loss,
    weight: (R, n) or (1, n)."""
    m, jacobian = form.evaluate(theta, at)
    R = max(len(log_loss), len(weight), len(theta))
    if len(theta) < R:
        m, jacobian = (np.broadcast_to(x, (R, *x.shape[1:])) for x in (m, jacobian))
    if goal.on == "log":
        scale, residual = None, log_loss - m
    else:
        scale = np.exp(m)
        residual = np.exp(log_loss) - scale
    clipped = np.clip(residual, -goal.delta, goal.delta)
    pull = weight * clipped
    value = (pull * (residual - clipped / 2)).sum(-1)
    size = weight * np.maximum(np.abs(clipped), min(ROUNDING, goal.delta))
    if scale is not None:
        pull, size = pull * scale, size * scale
    gradient = -(jacobian @ pull[:, :, None])[:, :, 0]
    pulls = (np.abs(jacobian) @ size[:, :, None])[:, :, 0]
    return Local(value, gradient, pulls, jacobian, residual, clipped, scale)


def curvatures(
    form: Form, at: Design, weight: Array, theta: Array, goal: Objective, here: Local
) -> tuple[Array, Array]:
    """Return the Hessian of the objective and that of reweighted least squares, (R, p, p) each.

    The second is that of the quadratic which touches Huber's function from above at these residuals
    (Huber and Ronchetti 2009, section 7.8). It is never less than the part of the Hessian without
    the law's own curvature.
    """
    size = np.abs(here.residual)
    inside = weight * (size <= goal.delta)
    above = weight * np.minimum(1.0, goal.delta / np.maximum(size, 1e-300))
    pull = -weight * here.clipped
    bent = inside - pull  # the law's curvature below has the part J J' of the log too
    if here.scale is not None:
        inside, above = inside * here.scale**2, above * here.scale**2
        pull = pull * here.scale
        bent = inside
    J, Jt = here.jacobian, here.jacobian.swapaxes(1, 2)
    hessian = (J * bent[:, None]) @ Jt + form.curvature(theta, at, J, pull)
    return hessian, (J * above[:, None]) @ Jt


def scaled_gradient(gradient: Array, pulls: Array, free: Array) -> Array:
    """Return the scaled gradient, (R,): near 1 far from a minimum, 0 at one. It is the largest
    share |gradient| / pulls of the free parameters: what remains of the runs' contributions after
    they cancel, over the sum of their sizes."""
    share = np.abs(gradient) / np.maximum(pulls, 1e-300)
    return np.where(free, share, 0.0).max(-1, initial=0.0)
