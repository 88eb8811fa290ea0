"""Doubts about runs: nothing on clean tables, and each fault found where it was put."""

import numpy as np
import pandas as pd
import pytest

from forescale.scaling.doubts.data import data_doubts
from forescale.scaling.fitting.points import Points
from tests.trainer.scaling.iso_flop_runs import iso_flop_table

HALF = np.arange(42) % 2 == 0


def table():
    return iso_flop_table(np.geomspace(1e18, 1e21, 6), sizes=7, width=4.0, noise=0.003)


def sentences_of(t, **options):
    columns = {k: t[k].to_numpy() for k in ("parameters", "tokens", "flops") if k in t}
    return data_doubts(t, Points(t["loss"].to_numpy(), **columns), **options)


def changed(column, factor, which=HALF, t=None):
    t = table() if t is None else t
    return t.assign(**{column: t[column] * np.where(which, factor, 1)})


def public(published):
    for path in sorted((published / "backtest").glob("*.csv")):
        yield path.stem, pd.read_csv(path)
    t = pd.read_csv(published / "epoch_chinchilla" / "svg_extracted_data.csv")
    t = t.rename(columns={"Model Size": "parameters", "Training FLOP": "flops"})
    yield "epoch", t.assign(tokens=t["flops"] / 6 / t["parameters"])
    t = pd.read_csv(published / "gadre2024" / "gadre_104_models.csv")
    t = t.rename(columns={"N": "parameters", "D": "tokens"})
    for data, mask in t.groupby("dataset"):
        for column in (c for c in mask if c.startswith("loss_")):
            yield f"{data} {column}", mask.assign(loss=mask[column]).dropna(subset=["loss"])


def test_public_tables_give_no_doubt(published):
    assert {name: doubts for name, t in public(published) if (doubts := sentences_of(t))} == {}


def test_clean_runs_give_no_doubt_however_compute_is_counted():
    t = table()
    for c in (t["flops"], t["flops"] / 3, t["flops"] * (1 + 20 * (t["parameters"] / 1e7) ** -0.8)):
        assert sentences_of(t.assign(flops=c)) == []
    assert sentences_of(t.drop(columns=["flops", "budget"])) == []


@pytest.mark.parametrize("has_compute", [True, False])
@pytest.mark.parametrize("column", ["parameters", "tokens"])
@pytest.mark.parametrize(("unit", "name"), [(1e6, "millions"), (1e9, "billions")])
def test_a_column_in_other_units_for_half_of_the_runs_is_named(column, unit, name, has_compute):
    t = changed(column, 1 / unit)
    (one,) = sentences_of(t if has_compute else t.drop(columns=["flops", "budget"]))
    symbol = {"parameters": "N", "tokens": "D"}[column]
    assert one.startswith(f"{symbol} of 21 of 42 runs (rows 0, 2, 4, 6 and 17 more) is in {name}")


def test_the_larger_half_in_other_units_is_named_too():
    t = table()
    large = t["parameters"] > t["parameters"].median()
    assert sentences_of(changed("parameters", 1e-6, large, t))[0].startswith(
        f"N of {large.sum()} of 42"
    )


def test_compute_tells_units_that_no_gap_in_sizes_tells():
    few = np.isin(np.arange(42), [10, 25, 33])
    (one,) = sentences_of(changed("parameters", 1e-3, few))
    assert one.startswith("N of 3 of 42 runs (rows 10, 25, 33) is in thousands")


def test_units_of_a_whole_column_are_named():
    everywhere = np.ones(42, dtype=bool)
    assert sentences_of(changed("parameters", 1e-6, everywhere))[0].startswith(
        "N of all 42 runs is in mill"
    )
    assert sentences_of(changed("tokens", 1e-9, everywhere))[0].startswith(
        "D of all 42 runs is in billions"
    )
    assert (
        "C of all 42 runs is in units of 1e15"
        in sentences_of(changed("flops", 1e-15, everywhere))[0]
    )
    t = changed("parameters", 1e-6, everywhere).drop(columns=["flops", "budget"])
    assert "N or D is in other units" in sentences_of(t)[0]


def test_tokens_computed_from_sizes_in_millions_dont_hide_them():
    t = changed("parameters", 1e-6)
    t = t.assign(tokens=t["flops"] / 6 / t["parameters"])
    assert sentences_of(t)[0].startswith("N of 21 of 42 runs")


def test_larger_models_than_the_others_are_no_other_unit():
    t = table().drop(columns=["flops", "budget"])
    big = t.iloc[:3] * [1000, 1000, 1]
    assert sentences_of(pd.concat([t, big], ignore_index=True)) == []


def test_compute_far_from_that_of_n_and_d_is_named():
    everywhere = np.ones(42, dtype=bool)
    assert sentences_of(changed("flops", 0.1, everywhere))[0].startswith(
        "C is 0.6 N D for the largest"
    )
    assert sentences_of(changed("flops", 1 / 8.64e19, everywhere))[0].startswith(
        "C is 6.94e-20 N D"
    )
    three = np.isin(np.arange(42), [4, 11, 30])
    (one,) = sentences_of(changed("flops", 3, three))
    assert one.startswith("C of 3 of 42 runs (rows 4, 11, 30) is not that of its N and D")
    t = table()
    shuffled = t.assign(flops=np.random.default_rng(0).permutation(t["flops"]))
    assert "no smooth function of them" in sentences_of(shuffled)[0]


def test_active_parameters_are_what_compute_is_compared_with():
    t = table()
    t = t.assign(parameters_active=t["parameters"], parameters=8 * t["parameters"])
    assert sentences_of(t) == []


def test_rows_that_are_listed_twice_are_named():
    t = table().assign(name=[f"run-{i}" for i in range(42)])
    again = pd.concat([t, t.iloc[[3, 5]].assign(name=["x", "y"])], ignore_index=True)
    (one,) = sentences_of(again)
    assert one.startswith("2 of 44 runs (x, y) repeat an earlier row")
    other_seed = again.assign(seed=[0] * 42 + [1, 1])
    assert sentences_of(other_seed) == []


def test_repeats_whose_rounded_losses_are_equal_are_not_twice():
    t = table().assign(loss=lambda t: t["loss"].round(2), learning_rate=1e-3)
    assert (
        sentences_of(pd.concat([t, t.iloc[:3].assign(learning_rate=2e-3)], ignore_index=True)) == []
    )
    assert "repeat an earlier row" in sentences_of(pd.concat([t, t.iloc[:3]], ignore_index=True))[0]


def test_a_loss_that_is_a_perplexity_is_named():
    t = table()
    (one,) = sentences_of(t.assign(loss=np.exp(t["loss"])))
    assert one.startswith("The loss of all 42 runs looks like a perplexity")
    (one,) = sentences_of(t.assign(loss=np.where(HALF, np.exp(t["loss"]), t["loss"])))
    assert one.startswith("The loss of 21 of 42 runs (rows 0, 2, 4, 6")
    assert "a name of perplexities" in sentences_of(t, columns={"loss": "val/ppl"})[0]


def test_a_loss_whose_name_tells_of_bits_is_named():
    assert "in bits" in sentences_of(table(), columns={"loss": "eval/bits_per_byte"})[0]
    assert sentences_of(table(), columns={"loss": "val_loss"}) == []
