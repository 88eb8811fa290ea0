"""Numbers of ranks and nodes that may change."""

import pytest

from forescale.config.compose import compose
from forescale.config.schema import ConfigError
from forescale.config.sizes import Sizes, in_words
from forescale.config.train import TrainJob


@pytest.mark.parametrize(("text", "plain"), [(4, 4), ("4", 4), (" 2 - 8 ", "2-8"), ("3-3", 3)])
def test_a_number_or_a_range(text, plain):
    sizes = Sizes.parse(text)
    assert sizes.plain == plain
    assert Sizes.parse(sizes.plain) == Sizes.parse(str(sizes)) == sizes
    assert [*sizes] == [*range(sizes.most, sizes.least - 1, -1)]


@pytest.mark.parametrize("text", [0, "8-2", "2-", "-3", "2.5", "two", True, None, "1-9999999"])
def test_what_is_neither(text):
    with pytest.raises(ValueError, match="expects"):
        Sizes.parse(text)


@pytest.mark.parametrize(
    ("sizes", "phrase"), [([4], "4"), ([2, 1], "2 or 1"), ([16, 8, 7, 6, 2], "16, 6-8 or 2")]
)
def test_sizes_in_words(sizes, phrase):
    assert in_words(sizes) == phrase


def job(ranks, *words):
    """A job of 24 windows a step, four at once."""
    return compose(TrainJob, ["train.global_batch=24", f"launch.processes={ranks}", *words])


@pytest.mark.parametrize(
    ("ranks", "words", "usable"),
    [
        ("1-4", (), [3, 2, 1]),
        ("2-4", (), [3, 2]),
        ("1-4", ("train.invariant=true",), [4, 3, 2, 1]),
        ("2-8", ("train.invariant=true",), [6, 5, 4, 3, 2]),  # six micro-batches
        ("1-99", ("engine.sequence_parallel=2",), [12, 6, 4, 2]),
        ("1-3", ("train.invariant=true", "faults=[kill@3:rank2]"), [3, 2, 1]),
    ],
)
def test_the_sizes_at_which_a_job_can_run(ranks, words, usable):
    elastic = job(ranks, *words)
    assert elastic.usable_sizes() == usable
    assert not any(elastic.problems(size) for size in usable)
    assert elastic.at(2).launch.processes == Sizes(2, 2)
    notes = [note for note in elastic.notes() if note.startswith("launch.processes")]
    assert len(notes) == (usable != [*elastic.elastic.sizes])
    assert all(f"can be {in_words(usable)}" in note for note in notes)


@pytest.mark.parametrize(("ranks", "near"), [("4-5", "3 or 6"), ("7-9", "6")])
def test_a_range_without_a_size_that_works_names_the_nearest(ranks, near):
    with pytest.raises(ConfigError, match="any number in") as caught:
        job(ranks)
    (problem,) = caught.value.problems
    assert problem.key == "launch.processes"
    assert problem.todo.endswith(near)


def test_what_is_wrong_at_every_size_is_no_problem_of_the_sizes():
    with pytest.raises(ConfigError) as caught:
        job("1-4", "train.tokens=100", "schedule.warmup=0")
    assert [problem.key for problem in caught.value.problems][-1] == "train.tokens"
