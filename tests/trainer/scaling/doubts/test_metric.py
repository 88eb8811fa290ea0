"""What the data can't tell of a task is said in words."""

import numpy as np
import pytest

from forescale.scaling.doubts.metric import others, unseen

LOSS = np.linspace(2.5, 4.5, 20)
NOISE = 0.01 * np.random.default_rng(0).standard_normal(20)


def sentences(metric, rises=False, budgets=6, name="accuracy"):
    return others(LOSS, metric, rises, budgets, name)


def test_a_metric_that_follows_the_loss_leaves_no_doubt():
    metric = 0.9 - 0.1 * LOSS
    assert unseen(LOSS, metric + NOISE, metric, 3) is None
    assert sentences(metric + NOISE) == []
    assert sentences(1 - metric, rises=True, name="loss") == []


def test_a_metric_at_the_level_of_guessing_is_not_predicted():
    metric = 0.25 + NOISE
    sentence = unseen(LOSS, metric, np.full(20, metric.mean()), 3)
    assert "no more than chance ties it to the loss: the data can't tell" in sentence
    assert unseen(LOSS, np.full(20, 0.25), np.full(20, 0.25), 3).startswith("The metric is 0.25 in")


def test_about_one_in_twenty_metrics_without_a_tie_seems_to_have_one():
    """The F test keeps its level; the link is a straight line here."""
    rng = np.random.default_rng(1)
    tied = 0
    for _ in range(400):
        metric = rng.standard_normal(20)
        fitted = np.polyval(np.polyfit(LOSS, metric, 1), LOSS)
        tied += unseen(LOSS, metric, fitted, 2) is None
    assert tied / 400 == pytest.approx(0.05, abs=0.03)


def test_few_budgets_a_turn_and_a_wrong_direction_are_said():
    good = 0.9 - 0.1 * LOSS
    assert "3 different budgets: fewer than 4 can't show" in sentences(good, budgets=3)[0]
    (turned,) = sentences(0.4 + 0.1 * np.abs(LOSS - 3.5))
    assert "among the runs with lower losses it gets better" in turned
    (other_way,) = sentences(0.4 - 0.1 * np.abs(LOSS - 3.5))
    assert "among the runs with higher losses it gets better" in other_way
    (wrong,) = sentences(1 - good)
    assert "gets worse as the loss falls: if the column holds error, write metric=error" in wrong
