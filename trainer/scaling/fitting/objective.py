"""What a fit minimises, and how near a point is to its minimum.

    residual   r = log L - log L^ (or L - L^), of each run
    value      sum of w rho(r): Huber's rho is r^2 / 2 to delta, delta (|r| - delta / 2) beyond

Least squares is delta = inf; least absolute deviations is delta = 0, the sum of w |r|.
Invariant: the scaled gradient is of the objective as stated, and has no unit: it stays what it is
if losses, weights, N or D are counted in other units.
"""

from dataclasses import dataclass

import numpy as np

from forescale.errors import UserError
from forescale.scaling.fitting.forms import Design, Form
from forescale.scaling.fitting.points import Array

# A run pulls by this at least in what the gradient is scaled by, so that a perfect fit, in which
# nothing but rounding pulls, counts as one. No loss is known to seven digits.
ROUNDING = 1e-7


@dataclass(frozen=True)
class Objective:
    """delta: of Huber's function, in units of the residual; on: "log" of the loss or the "loss".
    The default is that of Hoffmann et al. 2022 (arXiv 2203.15556), eq. 3."""

    delta: float = 1e-3
    on: str = "log"

    def __post_init__(self) -> None:
        if self.on not in ("log", "loss") or not self.delta >= 0:
            what = f"there is no objective with delta={self.delta} on '{self.on}'"
            raise UserError("objective", what, "give a delta of 0 to inf, on 'log' or 'loss'")

    def __str__(self) -> str:
        kind = {0.0: "least absolute deviations", np.inf: "least squares"}.get(self.delta)
        return f"{kind or f'Huber {self.delta:g}'} on {'log loss' if self.on == 'log' else 'loss'}"

    def value(self, residual: Array, weight: Array) -> Array:
        """(R,) of (R, n)."""
        if self.delta == 0:
            return (weight * np.abs(residual)).sum(-1)
        bent = np.clip(residual, -self.delta, self.delta)
        return (weight * bent * (residual - bent / 2)).sum(-1)


LEAST_SQUARES = Objective(np.inf)
LEAST_ABSOLUTE = Objective(0.0)


@dataclass
class Local:
    """The objective around theta (R, p), for R replicates. pulls (R, p): the sum over runs of the
    size of what each adds to the gradient. Arrays of runs are (R, n)."""

    value: Array
    gradient: Array
    pulls: Array
    jacobian: Array
    residual: Array
    bent: Array  # the residual, cut at delta: rho's derivative
    scale: Array | None  # L^ where the residual is of the loss itself

    def rows(self, which: Array) -> "Local":
        kept = {k: None if v is None else v[which] for k, v in vars(self).items()}
        return Local(**kept)  # type: ignore[arg-type]

    def put(self, which: Array, other: "Local") -> None:
        """Replace the rows of `which` by the same of another."""
        for name, own in vars(self).items():
            if own is not None:
                own[which] = getattr(other, name)[which]


def local(
    form: Form, at: Design, log_loss: Array, weight: Array, theta: Array, goal: Objective
) -> Local:
    """log_loss, weight: (R, n) or (1, n). goal.delta > 0."""
    m, jacobian = form.evaluate(theta, at)
    if goal.on == "log":
        scale, residual = None, log_loss - m
    else:
        scale = np.exp(m)
        residual = np.exp(log_loss) - scale
    bent = np.clip(residual, -goal.delta, goal.delta)
    pull = weight * bent
    value = (pull * (residual - bent / 2)).sum(-1)
    size = weight * np.maximum(np.abs(bent), min(ROUNDING, goal.delta))
    if scale is not None:
        pull, size = pull * scale, size * scale
    gradient = -(jacobian @ pull[:, :, None])[:, :, 0]
    pulls = (np.abs(jacobian) @ size[:, :, None])[:, :, 0]
    return Local(value, gradient, pulls, jacobian, residual, bent, scale)


def curvatures(
    form: Form, at: Design, weight: Array, theta: Array, goal: Objective, here: Local
) -> tuple[Array, Array]:
    """The Hessian of the objective and, never less than its part without the law's own curvature,
    that of the quadratic which touches Huber's function from above at these residuals (Huber and
    Ronchetti 2009, section 7.8: reweighted least squares): (R, p, p) each."""
    size = np.abs(here.residual)
    inside = weight * (size <= goal.delta)
    above = weight * np.where(size <= goal.delta, 1.0, goal.delta / np.maximum(size, 1e-300))
    pull = -weight * here.bent
    if here.scale is not None:
        inside, above = inside * here.scale**2, above * here.scale**2
        pull = pull * here.scale
        inside = inside + pull
    J, Jt = here.jacobian, here.jacobian.swapaxes(1, 2)
    hessian = (J * inside[:, None]) @ Jt + form.curvature(theta, at, J, pull)
    return hessian, (J * above[:, None]) @ Jt


def scaled_gradient(gradient: Array, pulls: Array, free: Array) -> Array:
    """(R,): of each parameter that is free to move, what is left of the runs' pulls after they have
    cancelled, as a share of their sizes; the largest of them. 1 far away, 0 at a minimum."""
    share = np.abs(gradient) / np.maximum(pulls, 1e-300)
    return np.where(free, share, 0.0).max(-1, initial=0.0)
