"""The search of a recipe at one budget: from any start to the best, by as many runs for each."""

import math

import pytest

from forescale.scaling.design.search import Search, Trial

ROUNDS = ("rate", "size", "tables", "batch", "rate")
MOST, EXTRA = 20, 6


def searched(loss, rounds=ROUNDS, most=MOST, extra=EXTRA, sizes=3):
    """The search once all its runs have ended, and their losses."""
    losses = dict[Trial, float]()
    while True:
        search = Search(Trial(1e5, tables=1.0), rounds, sizes, 2.5, most, extra, losses)
        if not search.pending:
            return search, losses
        losses |= {trial: loss(trial) for trial in search.pending}


def bowl(size, rate, tables):
    """A loss with its minimum there."""

    def loss(trial):
        offs = (trial.size / size, trial.rate / rate, trial.tables / tables, trial.batch)
        return 3 * math.exp(0.01 * sum(math.log(x) ** 2 for x in offs))

    return loss


@pytest.mark.parametrize(
    ("size", "rate", "tables"), [(1e5, 1, 1), (6e5, 3, 3), (2e4, 0.4, 4), (1.4e5, 1.3, 0.25)]
)
def test_size_and_rates_are_brought_near_their_best_by_equally_many_runs(size, rate, tables):
    search, losses = searched(bowl(size, rate, tables))
    assert len(losses) == MOST
    assert search.best.size == pytest.approx(size, rel=0.01)
    assert search.best.rate == pytest.approx(rate, rel=0.01)
    assert abs(math.log(search.best.tables / tables)) <= math.log(2.01), "the nearest tried"
    assert search.edges == ()


def test_what_is_best_beyond_all_that_the_runs_reach_is_named():
    search, losses = searched(bowl(1e5, 1e6, 1), rounds=("size", "rate"), most=8, extra=2)
    assert len(losses) == 8
    assert search.edges == ("rate",)


def test_trials_that_do_not_exist_cost_no_run_and_are_no_optimum():
    """Only sizes up to the first exist, and twice the rate diverges."""

    def loss(trial):
        return math.inf if trial.rate > 1.9 else bowl(1e6, 1, 1)(trial)

    losses = dict[Trial, float]()
    for _ in range(30):
        search = Search(Trial(1e5, tables=1.0), ROUNDS, 3, 2.5, MOST, EXTRA, losses,
                        lambda trial: trial.size < 1.01e5)  # fmt: skip
        losses |= {trial: loss(trial) for trial in search.pending}
    assert len(losses) == MOST
    assert search.best.size == pytest.approx(1e5)
    assert search.best.rate < 1.9
    assert search.has_loss


def test_one_size_stays_one():
    search, losses = searched(bowl(6e5, 3, 1), rounds=("rate", "rate"), most=8, sizes=1)
    assert {trial.size for trial in losses} == {1e5}
    assert search.best.rate == pytest.approx(3, rel=0.01)
