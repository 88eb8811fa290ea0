"""Laws from a loss to the metric of a task: the second step of a prediction of tasks.

    sigmoid-to-1  Acc = c + (1 - c) / (1 + exp(k (L - L_0))), from 1 to the floor c, which may be
                  held at the accuracy of guessing (`from_chance`)
    sigmoid       Acc = a / (1 + exp(-k (L - L_0))) + b, from b at no loss to the floor a + b
    exponential   Err = epsilon - k exp(-gamma L), and Acc = 1 - Err
    power         M = E + K L^kappa, of a metric that is a loss itself and has no upper end

They are fitted like any other form: as the log of the metric, by a column `task_loss`, so that a
fit has its certificate and its resampled fits. Least squares are on accuracy itself, and on the log
of a loss.
Invariant: a metric of a law is positive; the accuracy of a sigmoid is at most 1 too.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from forescale.scaling.fitting.forms import Design, Form
from forescale.scaling.fitting.objective import LEAST_SQUARES, Objective
from forescale.scaling.fitting.points import Array, Points

COLUMN = "task_loss"
GOAL = Objective(np.inf, "loss")  # least squares on accuracy itself
TO_ONE, SIGMOID, POWER = "sigmoid-to-1", "sigmoid", "power"
NO_LOSS = 1e-9  # stands for a loss of zero, which has no logarithm
LEAST = 1e-9  # accuracy that stands for none, which has no logarithm
_TINY = np.log(LEAST)


@dataclass(frozen=True)
class Outcomes(Points):
    """The metrics of n runs, as `loss`, with the loss that each is predicted from, (n,)."""

    task_loss: Array | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_loss is not None:
            object.__setattr__(self, COLUMN, self._checked(COLUMN, self.task_loss))


@dataclass(frozen=True)
class Sigmoid(Form):
    """The sigmoid, in theta: log floor, L_0, k and log accuracy at no loss. L_0 and k are relative
    to the losses' geometric mean."""

    def evaluate(self, theta: Any, at: Design) -> tuple[Any, Any]:
        floor, top = np.exp(theta[:, 0, None]), np.exp(theta[:, 3, None])
        middle, slope = theta[:, 1, None], theta[:, 2, None]
        away = np.exp(at.logs[COLUMN]) - middle
        share = _share(slope * away)
        bent = (top - floor) * share * (1 - share)
        rows = (floor * (1 - share), bent * slope, -bent * away, top * share)
        accuracy = rows[0] + rows[3]
        return np.log(accuracy), np.stack(np.broadcast_arrays(*rows), axis=1) / accuracy[:, None]

    def bounds(self, at: Design, log_loss: Array) -> tuple[Array, Array]:
        return np.array([_TINY, 1e-2, 1e-2, _TINY]), np.array([0.0, 50.0, 200.0, 0.0])

    def basis(self, grid: Array, at: Design) -> tuple[Array, Array]:
        share = _share(grid[:, 1, None] * (np.exp(at.logs[COLUMN]) - grid[:, 0, None]))
        return np.stack((1 - share, share), axis=1) + 1e-12, np.ones(len(grid))

    def assemble(self, grid: Array, coefficients: Array) -> Array:
        log = np.log(coefficients)
        return np.hstack((log[:, :1], grid, log[:, 1:]))

    def published(self, theta: Array, centre: Mapping[str, float]) -> Array:
        mean = np.exp(centre[COLUMN])
        floor, top = np.exp(theta[:, 0]), np.exp(theta[:, 3])
        return np.stack((floor - top, theta[:, 1] * mean, theta[:, 2] / mean, top), axis=1)

    def internal(self, values: Array, centre: Mapping[str, float]) -> Array:
        mean, (a, middle, slope, b) = np.exp(centre[COLUMN]), np.asarray(values, dtype=float).T
        top, floor = (np.log(np.maximum(x, LEAST)) for x in (b, a + b))
        return np.stack((floor, middle / mean, slope * mean, top), axis=1)


def _share(z: Any) -> Any:
    """Return 1 / (1 + exp(z)), analytic, without overflow."""
    z = np.where(z.real > 700, 700 + 0 * z, z)
    return 1 / (1 + np.exp(z))


@dataclass(frozen=True)
class SigmoidToOne(Sigmoid):
    """The sigmoid that ends at 1, in theta: log floor, L_0 and k. chance: the accuracy at the
    floor, if it is held; theta is L_0 and k then."""

    chance: float | None = None

    @property
    def _free(self) -> list[int]:
        """Return which parameters of the sigmoid are free."""
        return [0, 1, 2] if self.chance is None else [1, 2]

    def _whole(self, theta: Any) -> Any:
        """Return theta of the sigmoid, (R, 4)."""
        whole = np.zeros((len(theta), 4), dtype=theta.dtype)  # log accuracy at no loss: 0
        if self.chance is not None:
            whole[:, 0] = np.log(max(self.chance, LEAST))
        whole[:, self._free] = theta
        return whole

    def evaluate(self, theta: Any, at: Design) -> tuple[Any, Any]:
        log_accuracy, jacobian = super().evaluate(self._whole(theta), at)
        return log_accuracy, jacobian[:, self._free]

    def bounds(self, at: Design, log_loss: Array) -> tuple[Array, Array]:
        low, high = super().bounds(at, log_loss)
        return low[self._free], high[self._free]

    def assemble(self, grid: Array, coefficients: Array) -> Array:
        return super().assemble(grid, coefficients)[:, self._free]  # the floor alone: it is a start

    def published(self, theta: Array, centre: Mapping[str, float]) -> Array:
        mean, whole = np.exp(centre[COLUMN]), self._whole(theta)
        columns = np.stack((np.exp(whole[:, 0]), whole[:, 1] * mean, whole[:, 2] / mean), axis=1)
        return columns[:, self._free]

    def internal(self, values: Array, centre: Mapping[str, float]) -> Array:
        mean, theta = np.exp(centre[COLUMN]), np.array(values, dtype=float)
        if self.chance is None:
            theta[:, 0] = np.log(np.maximum(theta[:, 0], LEAST))
        theta[:, -2:] *= (1 / mean, mean)
        return theta


class FlooredForm(Form):
    """A metric that is a floor plus exp(log k + rate z), where z is a function of the loss. theta:
    `SIGN` times the log of the floor, log k where z is 0, and the rate."""

    SIGN: ClassVar[float] = 1.0

    @abstractmethod
    def z(self, at: Design) -> Any:
        """Return z of the losses, (n,)."""

    def evaluate(self, theta: Any, at: Design) -> tuple[Any, Any]:
        z = self.z(at)
        floor = np.exp(self.SIGN * theta[:, 0, None])
        gained = np.exp(theta[:, 1, None] + theta[:, 2, None] * z)
        metric = floor + gained
        rows = np.broadcast_arrays(self.SIGN * floor, gained, z * gained)
        return np.log(metric), np.stack(rows, axis=1) / metric[:, None]

    def basis(self, grid: Array, at: Design) -> tuple[Array, Array]:
        gained = np.exp(grid * self.z(at))
        return np.stack((np.ones_like(gained), gained), axis=1), np.ones(len(grid))

    def assemble(self, grid: Array, coefficients: Array) -> Array:
        log = np.log(coefficients)
        return np.hstack((self.SIGN * log[:, :1], log[:, 1:], grid))


@dataclass(frozen=True)
class Exponential(FlooredForm):
    """The exponential, in theta: -log(1 - epsilon), log k at the mean loss, relative gamma."""

    SIGN = -1.0

    def z(self, at: Design) -> Any:
        return 1 - np.exp(at.logs[COLUMN])

    def bounds(self, at: Design, log_loss: Array) -> tuple[Array, Array]:
        return np.array([0.0, _TINY, 1e-3]), np.array([-_TINY, 3.0, 100.0])

    def published(self, theta: Array, centre: Mapping[str, float]) -> Array:
        gamma = theta[:, 2]
        k = np.exp(theta[:, 1] + gamma)
        return np.stack((1 - np.exp(-theta[:, 0]), k, gamma / np.exp(centre[COLUMN])), axis=1)

    def internal(self, values: Array, centre: Mapping[str, float]) -> Array:
        epsilon, k, gamma = np.asarray(values, dtype=float).T
        gamma = gamma * np.exp(centre[COLUMN])
        floor = -np.log(np.maximum(1 - epsilon, LEAST))
        return np.stack((floor, np.log(np.maximum(k, 1e-200)) - gamma, gamma), axis=1)


@dataclass(frozen=True)
class Power(FlooredForm):
    """The power law of a loss in a loss, in theta: log E, log K at the mean loss, kappa."""

    def z(self, at: Design) -> Any:
        return at.logs[COLUMN]

    def bounds(self, at: Design, log_loss: Array) -> tuple[Array, Array]:
        low, high = float(log_loss.min()), float(log_loss.max())
        return np.array([low + _TINY, low + _TINY, 1e-3]), np.array([high, high + 3, 30.0])

    def published(self, theta: Array, centre: Mapping[str, float]) -> Array:
        kappa = theta[:, 2]
        k = np.exp(theta[:, 1] - kappa * centre[COLUMN])
        return np.stack((np.exp(theta[:, 0]), k, kappa), axis=1)

    def internal(self, values: Array, centre: Mapping[str, float]) -> Array:
        e, k, kappa = np.asarray(values, dtype=float).T
        log_k = np.log(np.maximum(k, 1e-300)) + kappa * centre[COLUMN]
        return np.stack((np.log(np.maximum(e, 1e-300)), log_k, kappa), axis=1)


_BENDS = ((0.1, 10, 18), (0.2, 60, 14))  # of L_0 and k in the profile grid
_TO_ONE = "after Bhagia et al. 2024, arXiv 2412.04403: Acc = c + (1 - c) / (1 + exp(k (L - L_0)))"
LINKS: Mapping[str, Form] = {
    TO_ONE: SigmoidToOne(TO_ONE, _TO_ONE, ("c", "L_0", "k"), (COLUMN,), ("L_0", "k"), _BENDS),
    SIGMOID: Sigmoid(
        SIGMOID,
        "Bhagia et al. 2024, arXiv 2412.04403, eq. 3: Acc = a / (1 + exp(-k (L - L_0))) + b",
        ("a", "L_0", "k", "b"), (COLUMN,), ("L_0", "k"), _BENDS,
    ),
    "exponential": Exponential(
        "exponential",
        "Gadre et al. 2024, arXiv 2403.08540, eq. 5: Err = epsilon - k exp(-gamma L)",
        ("epsilon", "k", "gamma"), (COLUMN,), ("gamma",), ((0.02, 30, 48),),
    ),
    POWER: Power(
        POWER,
        "after Brandfonbrener et al. 2024, arXiv 2411.12925: M = E + K L^kappa",
        ("E", "K", "kappa"), (COLUMN,), ("kappa",), ((0.05, 20, 40),),
    ),
}  # fmt: skip


def from_chance(chance: float) -> Form:
    """Return the sigmoid that ends at 1, its floor held at `chance`, the accuracy of guessing."""
    source = f"{_TO_ONE}, c held at {chance:g}"
    return SigmoidToOne(TO_ONE, source, ("L_0", "k"), (COLUMN,), ("L_0", "k"), _BENDS, chance)


def goal_of(link: Form) -> Objective:
    """Return the objective of a link."""
    return LEAST_SQUARES if link.name == POWER else GOAL
