"""Laws from a loss to the accuracy of a task: the second step of a prediction of tasks.

    sigmoid       Acc = a / (1 + exp(-k (L - L_0))) + b, from b at no loss to the floor a + b
    exponential   Err = epsilon - k exp(-gamma L), and Acc = 1 - Err

They are fitted by least squares on accuracy, like any other form: as log accuracy of a column
`task_loss`, so that a fit has its certificate and its resampled fits.
Invariant: an accuracy of a law is positive; that of the sigmoid is at most 1 too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from forescale.scaling.fitting.forms import Design, Form
from forescale.scaling.fitting.objective import Objective
from forescale.scaling.fitting.points import Array, Points

COLUMN = "task_loss"
GOAL = Objective(np.inf, "loss")  # least squares on accuracy itself
NO_LOSS = 1e-9  # stands for a loss of zero, which has no logarithm
_TINY = np.log(1e-9)  # least log of an accuracy


@dataclass(frozen=True)
class Outcomes(Points):
    """The accuracies of n runs, as `loss`, with the loss that each is predicted from, (n,)."""

    task_loss: Array | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_loss is not None:
            object.__setattr__(self, COLUMN, self._checked(COLUMN, self.task_loss))


@dataclass(frozen=True)
class Sigmoid(Form):
    """The sigmoid, in theta: log floor, L_0, k and log accuracy at no loss.

    L_0 and k are relative to the losses' geometric mean.
    """

    def evaluate(self, theta: Any, at: Design) -> tuple[Any, Any]:
        """Return log accuracy and its derivatives; see Form.evaluate."""
        floor, top = np.exp(theta[:, 0, None]), np.exp(theta[:, 3, None])
        middle, slope = theta[:, 1, None], theta[:, 2, None]
        away = np.exp(at.logs[COLUMN]) - middle
        share = _share(slope * away)
        bent = (top - floor) * share * (1 - share)
        rows = (floor * (1 - share), bent * slope, -bent * away, top * share)
        accuracy = rows[0] + rows[3]
        return np.log(accuracy), np.stack(np.broadcast_arrays(*rows), axis=1) / accuracy[:, None]

    def bounds(self, at: Design, log_loss: Array) -> tuple[Array, Array]:
        """Return the least and the greatest theta, (p,) each."""
        return np.array([_TINY, 1e-2, 1e-2, _TINY]), np.array([0.0, 50.0, 200.0, 0.0])

    def axes(self) -> tuple[Array, ...]:
        """Return the values of L_0 and k, relative to the mean loss."""
        return np.geomspace(0.1, 10, 18), np.geomspace(0.2, 60, 14)

    def basis(self, grid: Array, at: Design) -> tuple[Array, Array]:
        """Return the shares of the floor and of the accuracy at no loss, and a power of 1."""
        share = _share(grid[:, 1, None] * (np.exp(at.logs[COLUMN]) - grid[:, 0, None]))
        return np.stack((1 - share, share), axis=1) + 1e-12, np.ones(len(grid))

    def assemble(self, grid: Array, coefficients: Array) -> Array:
        """Return theta of L_0, k and the two accuracies; see Form.assemble."""
        log = np.log(coefficients)
        return np.hstack((log[:, :1], grid, log[:, 1:]))

    def published(self, theta: Array, centre: Mapping[str, float]) -> Array:
        """Return a, L_0, k and b of theta."""
        mean = np.exp(centre[COLUMN])
        floor, top = np.exp(theta[:, 0]), np.exp(theta[:, 3])
        return np.stack((floor - top, theta[:, 1] * mean, theta[:, 2] / mean, top), axis=1)

    def internal(self, values: Array, centre: Mapping[str, float]) -> Array:
        """Return theta of a, L_0, k and b."""
        mean, (a, middle, slope, b) = np.exp(centre[COLUMN]), np.asarray(values, dtype=float).T
        top, floor = (np.log(np.maximum(x, np.exp(_TINY))) for x in (b, a + b))
        return np.stack((floor, middle / mean, slope * mean, top), axis=1)


def _share(z: Any) -> Any:
    """Return 1 / (1 + exp(z)), analytic, without overflow."""
    z = np.where(z.real > 700, 700 + 0 * z, z)
    return 1 / (1 + np.exp(z))


@dataclass(frozen=True)
class Exponential(Form):
    """The exponential, in theta: -log(1 - epsilon), log k at the mean loss, relative gamma."""

    def evaluate(self, theta: Any, at: Design) -> tuple[Any, Any]:
        """Return log accuracy and its derivatives; see Form.evaluate."""
        away = np.exp(at.logs[COLUMN]) - 1
        floor = np.exp(-theta[:, 0, None])
        gained = np.exp(theta[:, 1, None] - theta[:, 2, None] * away)
        accuracy = floor + gained
        rows = np.broadcast_arrays(-floor, gained, -away * gained)
        return np.log(accuracy), np.stack(rows, axis=1) / accuracy[:, None]

    def bounds(self, at: Design, log_loss: Array) -> tuple[Array, Array]:
        """Return the least and the greatest theta, (p,) each."""
        return np.array([0.0, _TINY, 1e-3]), np.array([-_TINY, 3.0, 100.0])

    def axes(self) -> tuple[Array, ...]:
        """Return the values of gamma, relative to the mean loss."""
        return (np.geomspace(0.02, 30, 48),)

    def basis(self, grid: Array, at: Design) -> tuple[Array, Array]:
        """Return the two terms without their coefficients, and a power of 1."""
        gained = np.exp(-grid * (np.exp(at.logs[COLUMN]) - 1))
        return np.stack((np.ones_like(gained), gained), axis=1), np.ones(len(grid))

    def assemble(self, grid: Array, coefficients: Array) -> Array:
        """Return theta of gamma and the coefficients; see Form.assemble."""
        log = np.log(coefficients)
        return np.hstack((-log[:, :1], log[:, 1:], grid))

    def published(self, theta: Array, centre: Mapping[str, float]) -> Array:
        """Return epsilon, k and gamma of theta."""
        gamma = theta[:, 2]
        k = np.exp(theta[:, 1] + gamma)
        return np.stack((1 - np.exp(-theta[:, 0]), k, gamma / np.exp(centre[COLUMN])), axis=1)

    def internal(self, values: Array, centre: Mapping[str, float]) -> Array:
        """Return theta of epsilon, k and gamma."""
        epsilon, k, gamma = np.asarray(values, dtype=float).T
        gamma = gamma * np.exp(centre[COLUMN])
        floor = -np.log(np.maximum(1 - epsilon, np.exp(_TINY)))
        return np.stack((floor, np.log(np.maximum(k, 1e-200)) - gamma, gamma), axis=1)


LINKS: Mapping[str, Form] = {
    "sigmoid": Sigmoid(
        "sigmoid",
        "Bhagia et al. 2024, arXiv 2412.04403, eq. 3: Acc = a / (1 + exp(-k (L - L_0))) + b",
        ("a", "L_0", "k", "b"),
        (COLUMN,),
        ("L_0", "k"),
    ),
    "exponential": Exponential(
        "exponential",
        "Gadre et al. 2024, arXiv 2403.08540, eq. 5: Err = epsilon - k exp(-gamma L)",
        ("epsilon", "k", "gamma"),
        (COLUMN,),
        ("gamma",),
    ),
}
