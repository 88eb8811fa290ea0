"""Laws of the best learning rate and batch, on sweeps of known laws."""

import itertools
import json
import re

import numpy as np
import pandas as pd
import pytest

from forescale.ground.errors import UserError
from forescale.scaling.config import StudyJob, TargetPoint
from forescale.scaling.design.rate_laws import BATCH, RATE, as_dict, critical_batches, rate_laws

# Li et al. 2025, arXiv 2503.04715: the best rate and batch (tokens) of N and D.
STEP_LAW = {"k": 1.79, "parameters": -0.713, "tokens": 0.307}
BATCH_LAW = {"k": 0.58, "parameters": 0.0, "tokens": 0.571}
SIZES, TOKENS = (6e7, 2e8, 6e8), (2e9, 1e10, 5e10)
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
BEND = 0.004


def best(law, n, d):
    return law["k"] * n ** law["parameters"] * d ** law["tokens"]


def sweeps(both=True, noise=0.0, seed=0, cells=None, off=1.0) -> pd.DataFrame:
    """Sweeps of rate and batch around 0.8 times their best; `noise`: of the log best values."""
    rng, rows = np.random.default_rng(seed), []
    for n, d in cells or itertools.product(SIZES, TOKENS):
        rate, batch = (best(law, n, d) * np.exp(noise * rng.standard_normal())
                       for law in (STEP_LAW, BATCH_LAW))  # fmt: skip
        for i, j in itertools.product(FACTORS, FACTORS if both else (1.0,)):
            off_rate, off_batch = np.log(0.8 * off * i), np.log(0.8 * j)
            loss = 3 * np.exp(BEND * (off_rate**2 - 0.4 * off_rate * off_batch + off_batch**2))
            rows.append({
                "parameters": n, "tokens": d, "loss": loss, "learning_rate": 0.8 * off * i * rate,
                "batch_tokens": 0.8 * j * batch if both else 1e5,
            })  # fmt: skip
    return pd.DataFrame(rows)


def laws_of(table, target=None, **keys):
    keys = {"input": ["none"], "target": target or TargetPoint()} | keys
    return rate_laws(table, StudyJob(**keys), "sweeps.csv")


def test_exact_sweeps_give_both_laws_back():
    laws = laws_of(sweeps(), TargetPoint(parameters=7e9, tokens=1e12))
    for law, truth in ((laws.rate, STEP_LAW), (laws.batch, BATCH_LAW)):
        assert law.columns == ("parameters", "tokens")
        assert law.k == pytest.approx(truth["k"], rel=1e-6)
        for column, (value, _, _) in law.exponents(0.9).items():
            assert value == pytest.approx(truth[column], abs=1e-8)
    exponents = as_dict(laws)["batch_tokens"]["exponents"]
    assert exponents["tokens"][0] == pytest.approx(BATCH_LAW["tokens"])
    assert laws.target[RATE][0] == pytest.approx(best(STEP_LAW, 7e9, 1e12))
    assert laws.target[BATCH][0] == pytest.approx(best(BATCH_LAW, 7e9, 1e12))


def test_sweeps_of_one_batch_give_the_law_of_the_rate_alone():
    laws = laws_of(sweeps(both=False))
    exponents = [v for v, _, _ in laws.rate.exponents(0.9).values()]
    assert exponents == pytest.approx([-0.713, 0.307], abs=1e-6)
    assert laws.batch is None
    assert laws.cost == pytest.approx(np.expm1(BEND * np.log(2) ** 2), rel=1e-6)


def test_intervals_cover_the_exponents():
    """Nominal 90 % over 200 tables of nine sweeps whose optima scatter by 20 %."""
    inside = np.zeros(3)
    target = TargetPoint(parameters=2e9, tokens=1e11)
    for seed in range(200):
        laws = laws_of(sweeps(both=False, noise=0.2, seed=seed), target)
        rows = [laws.target[RATE], *laws.rate.exponents(0.9).values()]
        truths = [best(STEP_LAW, 2e9, 1e11), STEP_LAW["parameters"], STEP_LAW["tokens"]]
        inside += [low <= x <= high for (_, low, high), x in zip(rows, truths, strict=True)]
    assert (np.abs(inside / 200 - 0.9) < 0.07).all(), inside / 200


def test_a_best_run_at_the_edge_is_refused_with_the_reason():
    table = sweeps(both=False)
    edge = (table.parameters == SIZES[0]) & (table.tokens == TOKENS[0])
    table.loc[edge, "loss"] = 3 - 0.1 * np.arange(edge.sum())  # it only falls with the rate
    laws = laws_of(table)
    (refused,) = laws.refused
    assert refused.at["parameters"] == pytest.approx(SIZES[0])
    assert len(laws.optima) == 8
    assert "its best learning rate, " in refused.why
    assert refused.why.endswith("is at the edge")


def test_a_diverged_run_is_worse_than_all_others():
    table = sweeps(both=False)
    high = table.groupby(["parameters", "tokens"])["learning_rate"].transform("max")
    table.loc[table.learning_rate == high, "loss"] = np.nan
    laws = laws_of(table)
    assert not laws.refused
    assert laws.rate.exponents(0.9)["parameters"][0] == pytest.approx(-0.713, abs=1e-6)


def test_sweeps_along_one_line_are_fitted_against_n_alone_with_a_note():
    laws = laws_of(sweeps(both=False, cells=[(n, 20 * n) for n in (1e8, 2e8, 4e8, 8e8)]))
    assert laws.rate.columns == ("parameters",)
    assert laws.rate.exponents(0.9)["parameters"][0] == pytest.approx(-0.713 + 0.307)
    assert "don't tell N and D apart" in laws.notes[0]
    by_flops = laws_of(
        sweeps(both=False, cells=[(n, 20 * n) for n in (1e8, 2e8, 4e8, 8e8)]), against=["flops"]
    )
    assert by_flops.rate.exponents(0.9)["flops"][0] == pytest.approx((-0.713 + 0.307) / 2)


def test_the_critical_batch_of_losses_that_larger_batches_cost_tokens():
    critical, beta, job = {1e9: 3e4, 1e10: 9e4}, 0.1, StudyJob(input=["none"])
    rows = [
        {"parameters": 1e8, "tokens": d, "batch_tokens": b, "learning_rate": rate * b**0.5,
         "loss": (d / (1 + b / at)) ** -beta * np.exp(0.01 * np.log(rate / 1e-3) ** 2)}
        for d, at in critical.items() for b in (2e4, 8e4, 32e4) for rate in (5e-4, 1e-3, 2e-3)
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    computed = critical_batches(table, job, "x", lambda n, d: beta)
    np.testing.assert_allclose(computed, [*critical.items()], rtol=0.02)
    steep = critical_batches(table, job, "x", lambda n, d: 1e3)
    assert {b for _, b in steep} == {np.inf}, "by such a law so slight a rise is far below it"
    one_rate = table[table["learning_rate"] == 1e-3 * table["batch_tokens"] ** 0.5]
    assert critical_batches(one_rate, job, "x", lambda n, d: beta) == []


def test_runs_of_other_bits_are_another_sweep():
    table = sweeps(both=False)
    few = table.assign(bits=4.0, loss=table["loss"] * 1.2, learning_rate=table["learning_rate"] / 2)
    laws = laws_of(pd.concat((table.assign(bits=16.0), few)))
    assert len(laws.optima) == 2 * len(laws_of(table).optima)


def test_tokens_that_differ_by_the_rounding_of_a_batch_are_one_sweep():
    table = sweeps(both=False)
    table["tokens"] *= 1 + 0.01 * np.tile(np.linspace(-0.5, 0.5, 5), 9)
    assert len(laws_of(table).optima) == 9


@pytest.mark.parametrize(
    ("change", "keys", "message"),
    [
        (lambda t: t.drop(columns="learning_rate"), {}, "has no column 'learning_rate'; name it"),
        (lambda t: t.assign(learning_rate="high"), {}, "learning_rate of row 0: 'high' is no"),
        (lambda t: t.head(10), {}, "2 sweeps have a best learning rate inside; give 3 or more"),
        (
            lambda t: t.assign(loss=t.learning_rate),
            {},
            "0 sweeps have a best learning rate inside (N 6e+07, D 2e+09: its best",
        ),
        (lambda t: t, {"target": TargetPoint(parameters=1e9)}, "target.tokens: is not given"),
        (
            lambda t: t[t.tokens == TOKENS[0]],
            {"against": ["parameters", "tokens"], "target": TargetPoint()},
            "give 4 or more",
        ),
    ],
)
def test_what_gives_no_law_is_refused_with_a_sentence(change, keys, message):
    with pytest.raises(UserError) as refused:
        laws_of(change(sweeps(both=False)), **keys)
    assert message in str(refused.value)


def test_the_command_prints_the_laws_and_the_targets_values(tmp_path, monkeypatch, forescale):
    monkeypatch.chdir(tmp_path)
    sweeps(noise=0.1).to_csv("sweeps.csv", index=False)
    words = ("study", "rates", "sweeps.csv", "target.parameters=7e9", "target.tokens=1e12")
    code, out, _ = forescale(*words)
    assert code == 0
    assert re.search(r"^learning rate +9 +\S+ +-0\.\d+ +-0\.\d+ to -0\.\d+", out, re.MULTILINE)
    assert re.search(r"^batch +9 ", out, re.MULTILINE)
    assert "For the target: best batch " in out
    code, out, err = forescale(*words, "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert facts["target"].keys() == {"learning_rate", "batch"}
    assert len(facts["sweeps"]) == 9
