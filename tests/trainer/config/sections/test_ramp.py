"""Rows that grow: their length by step, its shares, and what is refused."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forescale.config.compose import ConfigError, compose
from forescale.config.frozen import may_resume
from forescale.config.sections.batch import BatchRamp
from forescale.config.sections.ramp import LengthRamp, length_ramp
from forescale.config.train import TrainJob

GROWS = ["run.name=grows", "train.steps=100", "train.first_length=64", "train.length_ramp=40 %"]


@given(st.integers(1, 64), st.integers(0, 6), st.integers(0, 300), st.integers(0, 400))
def test_each_length_lasts_as_long_and_shares_count_the_steps(first, doublings, ramp, steps):
    grows = LengthRamp(first, first << doublings, ramp)
    lengths = [grows.length(step) for step in range(max(steps, ramp + 1))]
    assert lengths == sorted(lengths)
    assert lengths[ramp] == grows.last
    if doublings and ramp:
        times = Counter(lengths[:ramp]).values()
        assert max(times) - min(times) <= 1 or len(times) < doublings
    assert lengths[0] == (first if doublings and ramp else grows.last)
    counted = Counter(lengths[:steps]) or {lengths[0]: 1}
    whole = sum(counted.values())
    assert dict(grows.shares(steps)) == {n: count / whole for n, count in counted.items()}


def test_a_job_without_a_ramp_has_one_length():
    ramp = length_ramp(compose(TrainJob, ["run.name=plain", "train.steps=9"]))
    assert ramp.shares(5) == [(256, 1.0)]


def test_a_longer_run_keeps_its_ramp():
    def refusals(*words):
        changes, *_ = may_resume(compose(TrainJob, GROWS), compose(TrainJob, [*GROWS, *words]), 10)
        return [change.key for change in changes]

    assert refusals("train.steps=200") == ["train.steps"]  # 40 % would be other steps
    assert refusals("train.first_length=32") == ["train.first_length"]
    in_steps = [*GROWS, "train.length_ramp=40 steps"]
    longer = compose(TrainJob, [*in_steps, "train.steps=200"])
    assert may_resume(compose(TrainJob, in_steps), longer, 10)[0] == []


def test_a_note_says_when_rows_are_whole():
    (note,) = compose(TrainJob, GROWS).notes()
    assert note.startswith("Windows of 256 tokens are cut into rows of 64 at first, and are whole")
    assert "from step 41 on" in note


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.first_length=100"], "first_length: rows of 100 .* choose one of 32, 64, 128"),
        (["train.first_length=null"], "first_length: .* set train.first_length, such as 64"),
        (["train.length_ramp=5 min"], "length_ramp: must not be a wall time"),
        (["train.length_ramp=0 %"], "length_ramp: must be longer than zero"),
        (["train.sequence_length=99"], "rows of 64 .* train.sequence_length=99; leave it out"),
        (["objective=prefix"], "objective prefix can't cut its rows"),
        (["data.packing=best_fit"], "best_fit packs whole documents"),
        (["engine.sequence_parallel=2"], "at one length alone"),
    ],
)
def test_what_does_not_fit_a_ramp_is_one_sentence(words, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        compose(TrainJob, [*GROWS, *words])


def test_where_the_batch_grows_too_lengths_have_shares_of_windows():
    batch, ramp = BatchRamp(8, (3, 2)), LengthRamp(16, 64, 6)
    sizes = [2, 2, 2, 4, 4, 8, 8, 8]
    counted = Counter()
    for step, windows in enumerate(sizes):
        counted[ramp.length(step)] += windows
    shares = dict(ramp.shares(len(sizes), batch.samples))
    assert shares == {n: count / sum(sizes) for n, count in counted.items()}
