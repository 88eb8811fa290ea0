"""Every form, with parameters near those of its paper."""

from forescale.scaling.fitting import laws

BASE = {"A": 400.0, "B": 2000.0, "E": 1.8, "alpha": 0.34, "beta": 0.37}
LAWS = [
    (laws.CHINCHILLA, BASE),
    (laws.SHARED_EXPONENT, {"A": 400.0, "B": 2000.0, "E": 1.8, "alpha": 0.35}),
    (laws.OVER_TRAINING, {"a": 212.0, "b": 366.0, "E": 1.84, "eta": 0.136}),
    (laws.KAPLAN, {"N_c": 8.8e13, "D_c": 5.4e13, "alpha_N": 0.076, "alpha_D": 0.095}),
    (laws.data_constrained(), BASE | {"R_D": 15.4}),
    (laws.data_constrained(BASE), BASE | {"R_D": 15.4, "R_N": 5.3}),
    (laws.FRONTIER, {"K": 1000.0, "E": 1.7, "gamma": 0.15}),
]
NAMES = [f"{form.name}, {form.size}" for form, _ in LAWS]
