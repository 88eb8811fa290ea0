"""Seed noise and tuning gap, measured on records with known noise."""

import numpy as np
import pandas as pd
import pytest

from forescale.scaling.design.noise import noise_of
from forescale.scaling.design.simulate import Assumptions

WEIGHTS, DATA = 3e-3, 4e-3  # together 5e-3


def repeats(cell, flops, seeds, scale=1.0, rng=None):
    """Repeats of a cell by (data seed, weights seed); each seed adds its own noise."""
    rng = rng or np.random.default_rng(0)
    weights, data = {}, {}
    rows = []
    for i, (seed, init_seed) in enumerate(seeds):
        w = weights.setdefault(init_seed, WEIGHTS * rng.standard_normal())
        d = data.setdefault(seed, DATA * rng.standard_normal())
        rows.append(
            {
                "name": cell if i == 0 else f"{cell}-seed{i}",
                "role": "grid" if i == 0 else "seed",
                "cell_of": cell,
                "seed": seed,
                "init_seed": init_seed,
                "learning_rate": 1e-3,
                "flops_causal": flops,
                "loss": 3 * np.exp(scale * (w + d)),
            }
        )
    return rows


def apart(count):
    """Seeds as a study draws them: other weights with the same data, and the reverse."""
    others = [s for i in range(1, count) for s in ((1, 1 + i), (1 + i, 1))]
    return [(1, 1), *others]


def sweep(cell, losses, rates=(5e-4, 1e-3, 2e-3)):
    columns = {"role": "rate", "cell_of": cell, "flops_causal": 1e18, "seed": 1, "init_seed": 1}
    rows = [
        {"name": f"{cell}-{r}", **columns, "learning_rate": r, "loss": x}
        for r, x in zip(rates, losses, strict=True)
    ]
    rows[len(rows) // 2] |= {"name": cell, "role": "grid"}
    return rows


def test_noise_of_weights_and_of_data_are_separated():
    (level,) = noise_of(pd.DataFrame(repeats("s1-n2", 1e17, apart(300)))).levels
    assert level.weights.sd == pytest.approx(WEIGHTS, rel=0.1)
    assert level.data.sd == pytest.approx(DATA, rel=0.1)
    assert level.noise.sd == pytest.approx(5e-3, rel=0.1)
    assert (level.runs, level.weights.free, level.data.free) == (599, 299, 299)
    assert level.flops == 1e17


def test_seeds_that_change_together_give_only_the_total_noise():
    rows = repeats("s1-n2", 1e17, [(i, i) for i in range(300)])
    (level,) = noise_of(pd.DataFrame(rows)).levels
    assert level.weights is None
    assert level.data is None
    assert level.noise.sd == pytest.approx(5e-3, rel=0.1)
    bare = pd.DataFrame(rows).drop(columns=["seed", "init_seed"])
    assert noise_of(bare).levels[0].noise == level.noise


def test_two_levels_give_the_exponent_of_the_noise():
    rng = np.random.default_rng(1)
    rows = repeats("s1", 1e17, apart(200), rng=rng)
    rows += repeats("s4", 1e19, apart(200), scale=100**-0.3, rng=rng)
    noise = noise_of(pd.DataFrame(rows)).assumed()
    assert noise.fading == pytest.approx(0.3, abs=0.04)
    assert noise.seed_noise(np.array([1e17]))[0] == pytest.approx(5e-3, rel=0.1)
    assert noise.seed_noise(np.array([1e19]))[0] == pytest.approx(5e-3 * 100**-0.3, rel=0.1)


def test_few_seeds_hardly_move_the_exponent():
    """Five and three runs, as in a study; without the prior the exponent would scatter by 0.2."""
    assumed, noise = Assumptions(), []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        rows = repeats("s1", 1e17, apart(3), rng=rng) + repeats("s4", 3e18, apart(2), rng=rng)
        noise.append(noise_of(pd.DataFrame(rows)).assumed().fading)
    assert np.std(noise) < 0.1
    assert 0.05 < np.mean(noise) < assumed.fading  # the true exponent is 0


def test_the_tuning_gap_is_the_excess_of_the_best_run_of_a_sweep():
    """On parabolas with known minima."""
    rates = np.array([5e-4, 1e-3, 2e-3])

    def losses(best):
        return 3 * np.exp(0.02 * np.log(rates / best) ** 2)

    rows = sweep("a", losses(1.2e-3)) + sweep("b", losses(0.9e-3)) + sweep("c", losses(9e-3))
    noise = noise_of(pd.DataFrame(rows))
    assert (noise.sweeps, noise.edges, noise.levels) == (2, 1, ())
    gaps = 0.02 * np.log(np.array([1.2, 0.9])) ** 2
    assert noise.gap == pytest.approx(np.sqrt((gaps**2).mean()))
    assert noise_of(pd.DataFrame(rows)).assumed() == Assumptions(gap=noise.gap)


def test_what_was_not_measured_stays_as_assumed():
    alone = pd.DataFrame(repeats("s1", 1e17, [(1, 1)]))
    diverged = pd.DataFrame(repeats("s1", 1e17, [(1, 1), (2, 1)])).assign(loss=[3.0, np.nan])
    for table in (pd.DataFrame(), alone, diverged):
        assert noise_of(table).assumed() == Assumptions()
    same = pd.DataFrame(repeats("s1", 1e17, [(1, 1), (2, 1)])).assign(loss=3.0)
    assert noise_of(same).assumed() == Assumptions()  # one run twice


def test_noise_that_hides_the_law_is_a_warning():
    """5 % at 1e17 FLOPs; at 1e18 as little as ever."""
    loud = [*repeats("s1-n2", 1e17, apart(5), scale=10), *repeats("s2-n2", 1e18, apart(5))]
    assert noise_of(pd.DataFrame(loud[9:])).warning == ""
    warning = noise_of(pd.DataFrame(loud)).warning
    assert warning.startswith("At 1e+17 FLOPs another seed moves the loss by ")
    assert "(standard deviation of 9 runs)" in warning
