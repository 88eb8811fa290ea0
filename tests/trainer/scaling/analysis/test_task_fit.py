"""Accuracies predicted in two steps: the link, the chained prediction and its interval."""

import numpy as np
import pandas as pd
import pytest

from forescale.errors import UserError
from forescale.scaling.analysis.task_fit import Task, TaskFit
from forescale.scaling.config import StudyJob, TargetPoint
from forescale.scaling.fitting.laws import CHINCHILLA
from forescale.scaling.fitting.links import LINKS
from forescale.scaling.tasks.answer import as_dict, fit_tasks
from tests.matrix import FULL
from tests.trainer.scaling.iso_flop_runs import TRUTH

SIGMOID = {"a": -0.72, "L_0": 2.9, "k": 3.0, "b": 1.0}
TO_ONE = {"c": 0.24, "L_0": 2.5, "k": 3.0}
EXPONENTIAL = {"epsilon": 0.86, "k": 2.2, "gamma": 0.71}
TRUTHS = {"sigmoid-to-1": TO_ONE, "sigmoid": SIGMOID, "exponential": EXPONENTIAL}
TARGET = TargetPoint(parameters=4e9, tokens=2e11)


def table(link="sigmoid-to-1", noise=0.0, seed=0) -> pd.DataFrame:
    """A ladder of 16 runs with their loss and accuracy. noise: of log loss and of accuracy."""
    rng = np.random.default_rng(seed)
    n = np.repeat(np.geomspace(1e8, 1e9, 4), 4)
    d = n * np.tile([20.0, 40.0, 100.0, 200.0], 4)
    loss = CHINCHILLA.predict(TRUTH, parameters=n, tokens=d)
    loss *= np.exp(noise * rng.standard_normal(16))
    accuracy = LINKS[link].predict(TRUTHS[link], task_loss=loss) + noise * rng.standard_normal(16)
    return pd.DataFrame({"parameters": n, "tokens": d, "loss": loss, "outcome": accuracy})


def fitted(rows, outcomes=None, **keys) -> TaskFit:
    job = StudyJob(input=["none"], **({"bootstraps": 100, "target": TARGET} | keys))
    return TaskFit(Task("arc", rows, rows if outcomes is None else outcomes, "mine"), job)


def truth(link="sigmoid-to-1") -> tuple[float, float]:
    """The target's loss and accuracy."""
    loss = CHINCHILLA.predict(TRUTH, parameters=TARGET.parameters, tokens=TARGET.tokens)
    return float(loss[0]), float(LINKS[link].predict(TRUTHS[link], task_loss=loss)[0])


@pytest.mark.parametrize("link", TRUTHS)
def test_runs_with_little_noise_give_the_targets_loss_and_accuracy(link):
    found = fitted(table(link, noise=1e-4), link=link)
    assert found.link.values == pytest.approx(TRUTHS[link], rel=0.01)
    loss, accuracy = truth(link)
    assert found.chained.loss.loss == pytest.approx(loss, rel=1e-3)
    assert found.chained.value == pytest.approx(accuracy, rel=1e-3)


def test_a_metric_of_errors_is_one_minus_the_accuracy():
    one, other = (fitted(table(noise=0.003), metric=m) for m in ("accuracy", "error"))
    assert one.chained.value + other.chained.value == pytest.approx(1)
    low, high = one.chained.outer
    assert other.chained.outer == pytest.approx((1 - high, 1 - low))


def test_a_metric_that_is_a_loss_follows_a_power_law_without_an_upper_end():
    rows = table(noise=1e-4)
    found = fitted(rows.assign(outcome=0.6 + 0.3 * rows.loss**1.7), metric="loss")
    assert found.link.values == pytest.approx({"E": 0.6, "K": 0.3, "kappa": 1.7}, rel=1e-3)
    assert found.chained.value == pytest.approx(0.6 + 0.3 * truth()[0] ** 1.7, rel=1e-3)
    low, high = found.chained.outer
    assert 0 < low < found.chained.value < high
    assert not any("gets worse" in doubt for doubt in found.doubts)


def test_an_accuracy_of_0_counts_as_any_other():
    rows = table(noise=1e-4)
    found = fitted(rows.assign(outcome=np.maximum(0.0, rows.outcome - 0.45)))
    assert (found.metric == 0).any()
    assert found.link.certificate.holds
    assert 0 <= found.chained.outer[0] < found.chained.outer[1] <= 1


def test_the_interval_of_a_task_is_wider_than_that_of_its_loss_put_into_the_link():
    """It knows the link's own doubt and the scatter of runs around it."""
    found = fitted(table(noise=0.01), bootstraps=400)
    (low, high), chained = found.chained.loss.outer, found.chained.outer
    through = [float(found.link.predict(task_loss=loss)[0]) for loss in (high, low)]
    assert chained[1] - chained[0] > through[1] - through[0]
    assert chained[0] < found.chained.inner[0] < found.chained.value < chained[1]


def test_checkpoints_are_resampled_with_their_run():
    """Ten equal checkpoints a run know no more than the run itself."""
    rows = table(noise=0.01).assign(name=[f"run-{i}" for i in range(16)])
    many = rows.loc[rows.index.repeat(10)].reset_index(drop=True)
    keys = {"link": "exponential", "bootstraps": 400, "target": TargetPoint()}
    once, often = fitted(rows, **keys), fitted(rows, many, **keys)
    alone = fitted(rows, many.drop(columns="name"), **keys)
    assert often.replicates.errors["gamma"] == pytest.approx(
        once.replicates.errors["gamma"], rel=0.25
    )
    assert alone.replicates.errors["gamma"] < 0.6 * once.replicates.errors["gamma"]


def test_a_link_beyond_the_losses_it_has_seen_is_a_doubt():
    found = fitted(table(noise=0.001))
    assert any("it has seen no loss below" in doubt for doubt in found.doubts)
    within = fitted(table(noise=0.001), target=TargetPoint(parameters=5e8, tokens=2e10))
    assert not any("no loss below" in doubt for doubt in within.doubts)


def test_rows_without_the_metric_count_for_the_loss_alone():
    rows = table(noise=0.001)
    rows.loc[:3, "outcome"] = np.nan
    found = fitted(rows)
    assert (len(found.outcomes), len(found.law.points)) == (12, 16)
    assert "4 rows without a finite loss or without the metric are left out." in found.doubts


def test_without_a_target_only_links_are_fitted():
    """The table needs no N and D then."""
    rows = table(noise=1e-4)[["loss", "outcome"]]
    (found,) = fit_tasks([Task("arc", rows, rows, "mine")], StudyJob(input=["x"], bootstraps=100))
    assert found.chained is None
    made = as_dict([found])
    assert made["tasks"][0]["prediction"] is None
    assert made["tasks"][0]["values"] == pytest.approx(TO_ONE, rel=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.assign(outcome=np.nan), "mine: no row has a loss and arc"),
        (lambda t: t.head(2), "2 different runs don't determine the"),
        (lambda t: t.drop(columns="tokens"), "there is no column 'tokens'"),
    ],
)
def test_what_determines_no_task_is_refused_with_a_sentence(change, message):
    rows = change(table())
    job = StudyJob(input=["none"], bootstraps=100, target=TARGET, link="exponential")
    with pytest.raises(UserError) as refused:
        fit_tasks([Task("arc", rows, rows, "mine")], job)
    assert message in str(refused.value)


@pytest.mark.slow  # a ladder a draw
def test_the_interval_of_a_task_covers_new_runs():
    """Nominal 90 %: at four times the compute of the largest run, and within that of the runs. The
    first has the prior for the law's error, which these runs don't have: too wide rather than too
    narrow."""
    n, d, noise, inside = np.array([4e9, 5e8]), np.array([2e11, 2.5e10]), 0.005, []
    link = LINKS["sigmoid-to-1"]
    for seed in range(60 if FULL else 20):
        made = fitted(table(noise=noise, seed=seed), target=TargetPoint())
        low, high = made.curve(made.law.predicted({"parameters": n, "tokens": d}, 6 * n * d)).outer
        off = noise * np.random.default_rng(10_000 + seed).standard_normal((2, 2))
        loss = CHINCHILLA.predict(TRUTH, parameters=n, tokens=d) * np.exp(off[0])
        accuracy = link.predict(TO_ONE, task_loss=loss) + off[1]
        inside.append((low <= accuracy) & (accuracy <= high))
    beyond, within = np.mean(inside, axis=0)
    assert beyond > 0.85
    assert within > (0.8 if FULL else 0.75)
