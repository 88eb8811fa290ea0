"""A sudden gain is named where it is; laws with noise give none."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from forescale.scaling.doubts.gain import gain_doubts
from forescale.scaling.fitting.points import Points
from tests.trainer.scaling.iso_flop_runs import iso_flop_runs

BUDGETS, AT = np.geomspace(1e18, 1e20, 5), 1e19


def doubts_of(points, budgets, noise=0.0) -> list[str]:
    """noise: of the residuals of the law, which counts without budgets."""
    rest = noise * np.random.default_rng(1).standard_normal(len(points))
    law = SimpleNamespace(points=points, form=SimpleNamespace(size=5), residuals=rest)
    return gain_doubts(points, budgets, law)


def dropped(points: Points, at: float = AT) -> Points:
    """The runs with losses that fall by 10 % more within a factor 3 of C."""
    share = np.clip(np.log(points.flops / at) / np.log(3) + 0.5, 0, 1)
    columns = {name: getattr(points, name) for name in ("parameters", "tokens", "flops")}
    return Points(points.loss * (1 - 0.1 * share), **columns)


@pytest.mark.parametrize("noise", [0.001, 0.003, 0.01])
def test_tables_of_a_law_give_none_and_a_drop_is_named(noise):
    larger, wide = np.geomspace(1e18, 1e21, 6), {"sizes": 7, "width": 4.0}
    for seed in range(20):
        runs, c = iso_flop_runs(BUDGETS, sizes=5, width=2.5, noise=noise, seed=seed)
        assert doubts_of(runs, c) == []
        assert noise == 0.01 or doubts_of(dropped(runs), c)
        runs, c = iso_flop_runs(larger, noise=noise, seed=seed, **wide)
        assert doubts_of(runs, c) == []
        assert doubts_of(dropped(runs, 10**19.5), c)


def test_the_sentence_names_the_budgets_and_what_to_type():
    runs, c = iso_flop_runs(np.geomspace(1e18, 1e20, 7), sizes=5, width=2.5, noise=0.001)
    (sentence,) = doubts_of(dropped(runs), c)
    low, high = (float(word) for word in sentence.split() if "e+" in word)
    assert 1e19 / 3.2 < low < high < 1e19 * 3.2
    count = int(sentence.split("drop_largest=")[1].split()[0])
    left = np.sort(dropped(runs).loss)[:-count]
    assert left.max() < dropped(runs).loss[c <= 4e18].min(), "no run before the gain is left"


def test_a_gain_at_a_fixed_size_needs_no_budgets():
    n = np.repeat([1e8, 2e8], 7)
    c = np.tile(np.geomspace(1e18, 1e20, 7), 2)
    law = 1.8 + 400 / n**0.35 + 2000 / (c / 6 / n) ** 0.37
    runs = Points(law, parameters=n, tokens=c / 6 / n, flops=c)
    assert doubts_of(runs, None, 0.002) == []
    assert "faster than any law" in doubts_of(dropped(runs), None, 0.002)[0]


def test_runs_without_compute_are_not_judged():
    assert doubts_of(Points(np.array([3.0, 2.0]), parameters=np.array([1e6, 1e7])), None) == []


def test_public_tables_have_none(published):
    for path in sorted((published / "backtest").glob("*.csv")):
        t = pd.read_csv(path)
        columns = {k: t[k].to_numpy() for k in ("loss", "parameters", "tokens", "flops")}
        assert doubts_of(Points(**columns), t["budget"].to_numpy(dtype=float)) == [], path
