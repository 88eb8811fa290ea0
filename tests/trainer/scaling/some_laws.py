"""Every law, with parameters near those of its paper; and certificates of given parameters."""

import numpy as np

from forescale.scaling.fitting import laws
from forescale.scaling.fitting.fit import Certificate, certified, minimisation_of
from forescale.scaling.fitting.newton import measured
from forescale.scaling.fitting.objective import Objective

BASE = {"A": 400.0, "B": 2000.0, "E": 1.8, "alpha": 0.34, "beta": 0.37}
LAWS = [
    (laws.CHINCHILLA, BASE),
    (laws.SHARED_EXPONENT, {"A": 400.0, "B": 2000.0, "E": 1.8, "alpha": 0.35}),
    (laws.OVER_TRAINING, {"a": 212.0, "b": 366.0, "E": 1.84, "eta": 0.136}),
    (laws.KAPLAN, {"N_c": 8.8e13, "D_c": 5.4e13, "alpha_N": 0.076, "alpha_D": 0.095}),
    (laws.DATA_CONSTRAINED, BASE | {"R_D": 15.4}),
    (laws.FRONTIER, {"K": 1000.0, "E": 1.7, "gamma": 0.15}),
]
# Ludziejewski et al. 2025, table 4 at one expert (A, B, E, alpha, beta) and table 3.
MIXTURE = {
    "A": 30.364, "B": 53.9838, "E": 1.3637, "alpha": 0.1817, "beta": 0.1965,
    "delta": 0.2285, "gamma": -0.0098, "omega": -0.5529, "zeta": 0.0259,
}  # fmt: skip
LAWS.append((laws.FORMS["experts"], MIXTURE))
# Kumar et al. 2024, table 2, with alpha for beta; gamma is that of P* = 7.6 bits, see its test.
SIZED = {"A": 4299.0, "B": 18060.0, "E": 2.7648, "alpha": 0.4965, "beta": 0.4965}
PARTS = {"gamma_w": 2.6745, "gamma_a": 2.2102, "gamma_kv": 0.9578}
AFTER = {"C_T": 0.0598, "gamma_D": 0.5068, "gamma_N": 0.3439, "gamma_post": 0.5907}
BY_PARTS = laws.PRECISION.suited(["weight_bits", "activation_bits", "cache_bits"])
LAWS += [(laws.PRECISION, SIZED | {"gamma": 4.0}), (BY_PARTS, SIZED | PARTS),
         (laws.QUANTISED, SIZED | AFTER)]  # fmt: skip
# Tao et al. 2024, from their repository (N and N_v in millions, D in billions), plus 10.
WORDS = {"A": 875.826, "A_v": 2071.72, "B": 22214.4, "E": 4.46722, "alpha_v": 0.670737,
         "beta": 0.446606}  # fmt: skip
LAWS.append((laws.VOCABULARY, WORDS))
NAMES = [f"{form.name}, {form.size}" for form, _ in LAWS]


def certify(form, points, values, objective=None, weights=None) -> tuple[float, Certificate]:
    """Return the objective at given published parameters, and the certificate of that point."""
    task = minimisation_of(form, points, objective or Objective())
    theta = form.internal(form.vector(values)[None], task.at.centre)
    w = np.ones(len(points)) if weights is None else np.asarray(weights)
    one = measured(task, np.log(points.loss)[None], w[None], np.clip(theta, task.low, task.high))
    return float(one.value[0]), certified(task, one, w)[1]


def sizes(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    """N and D of n runs over two or three decades each."""
    rng = np.random.default_rng(seed)
    N, D = np.exp(rng.uniform(np.log([[1e7], [1e9]]), np.log([[1e10], [1e12]]), (2, n)))
    return {"parameters": N, "tokens": D}
