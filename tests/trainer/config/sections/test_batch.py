"""A batch that grows: its stages, the steps and tokens of a run, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forescale.config.compose import ConfigError, compose
from forescale.config.duration import Duration
from forescale.config.frozen import may_resume
from forescale.config.sections.batch import BatchRamp, Cadence
from forescale.config.train import TrainJob

WINDOW = 32  # tokens
SIZES = [f"train.sequence_length={WINDOW}", "train.global_batch=16", "train.micro_batch=2"]
GROWS = [*SIZES, "train.first_batch=4"]


def job(*words, length="train.steps=40"):
    other = "train.tokens=null" if "steps" in length else "train.steps=null"
    return compose(TrainJob, [*GROWS, length, other, *words])


def batches(run):
    return [run.batch_ramp.windows(step) for step in range(run.total_steps)]


ramps = st.builds(
    lambda first, lengths: BatchRamp(first << len(lengths), tuple(lengths)),
    st.integers(1, 6),
    st.lists(st.integers(1, 7), max_size=4),
)


@given(ramps, st.integers(0, 60), st.data())
def test_steps_and_windows_are_those_of_a_plain_sum(ramp, total, data):
    sizes = [ramp.windows(step) for step in range(total + 1)]
    sums = [sum(sizes[:n]) for n in range(total + 1)]
    assert [ramp.samples(step) for step in range(total + 1)] == sums
    number = data.draw(st.integers(0, sums[-1]))
    assert ramp.steps_for(number) == next(n for n, read in enumerate(sums) if read >= number)
    last = ramp.last_steps_for(number, total)
    assert last == next(n for n in range(total + 1) if sums[-1] - sums[total - n] >= number)
    assert ramp.last_steps_for(sums[-1] + 1, total) > total


@given(ramps, st.integers(1, 5), st.integers(1, 60))
def test_a_cadence_in_tokens_comes_when_so_many_windows_more_are_read(ramp, every, total):
    cadence = Cadence(every, ramp)
    due = [step for step in range(1, total + 1) if step in cadence]
    reached = ramp.samples(total) // (every * ramp.full)
    firsts = [ramp.steps_for(n * every * ramp.full) for n in range(1, reached + 1)]
    assert due == firsts
    assert cadence.times(total) == len(due)
    assert [step in Cadence(every) for step in range(20)] == [s % every == 0 for s in range(20)]


@pytest.mark.parametrize(
    ("length", "ramp", "stages"),
    [
        ("train.steps=40", "10 steps", [4] * 5 + [8] * 5),
        ("train.steps=40", "5 steps", [4] * 2 + [8] * 3),  # what is left over comes later
        ("train.steps=40", "2048 tokens", [4] * 8 + [8] * 4),
        ("train.steps=40", "2050 tokens", [4] * 9 + [8] * 5),
        ("train.tokens=20480", "10 %", [4] * 8 + [8] * 4),
    ],
)
def test_stages_have_equal_steps_or_equal_tokens(length, ramp, stages):
    sizes = batches(job(f"train.batch_ramp='{ramp}'", length=length))
    assert sizes == stages + [16] * (len(sizes) - len(stages))


@pytest.mark.parametrize("tokens", [20_480, 20_481, 30_000])
def test_the_run_reads_its_tokens_up_to_whole_steps(tokens):
    run = job("train.batch_ramp='25 %'", length=f"train.tokens={tokens}")
    read = sum(batches(run)) * WINDOW
    assert run.total_tokens == read
    assert tokens <= read < tokens + 16 * WINDOW


def test_lengths_in_tokens_are_those_of_the_steps_that_read_them():
    run = job("train.batch_ramp='2048 tokens'", "schedule.warmup='1536 tokens'")
    assert run.warmup_steps == 10  # 8 steps of 4 windows, and 2 of 8
    words = ("schedule=wsd", "schedule.warmup=0", "schedule.decay='15000 tokens'")
    run = job("train.batch_ramp='2048 tokens'", *words)
    # Of 40 steps the last 28 have 16 windows: 14,336 tokens; and 3 more of 8 windows.
    assert run.decay_steps == 31
    assert run.steps_of(Duration(50, "percent")) == 20
    assert 12 in run.cadence(Duration(2048, "tokens"))
    assert run.cadence(Duration(3, "tokens")) == Cadence(1, run.batch_ramp)


def test_the_batch_of_all_steps_is_no_ramp():
    run = compose(TrainJob, [*SIZES, "train.first_batch=16", "train.batch_ramp='3 steps'"])
    assert run.batch_ramp == BatchRamp(16)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.batch_ramp=null"], "train.batch_ramp: is not given"),
        (["train.first_batch=null"], "train.batch_ramp: is the length of a ramp"),
        (["train.first_batch=6"], "first_batch: 6 windows are not doubled to the 16"),
        (["train.first_batch=32"], "first_batch: 32 windows are not doubled to the 16"),
        (["train.micro_batch=8"], "first_batch: 4 windows are not a multiple of the micro-b"),
        (["launch.processes=4"], "first_batch: 4 windows don't divide by 4 ranks that feed 2 at"),
        (["train.batch_ramp='1 h'"], "batch_ramp: must not be a wall time"),
        (
            ["train.batch_ramp='10 %'"],
            "percent are of train.tokens.*; write '1000 steps' or '1e9 t",
        ),
        (["train.batch_ramp='1 step'"], "1 step are too few for 2 stages"),
        (["train.batch_ramp='0 tokens'"], "0 tokens are too few for 2 stages"),
        (["train.batch_ramp='40 steps'"], "the batch grows for 40 steps of a run of 40"),
    ],
)
def test_a_ramp_that_can_not_be_is_one_sentence(words, message):
    with pytest.raises(ConfigError, match=message) as caught:
        job("train.batch_ramp='10 steps'", *words)
    assert len(caught.value.problems) == 1


def test_a_run_grows_if_no_batch_of_its_past_would_be_another():
    old = job("train.batch_ramp='10 %'", length="train.tokens=20480")
    longer = job("train.batch_ramp='10 %'", length="train.tokens=40960")
    refused, *_ = may_resume(old, longer, 3)
    assert [change.key for change in refused] == ["train.tokens"]
    same = longer.with_ramp_of(old)
    assert same.train.batch_ramp == Duration(2048, "tokens")
    refused, _, taken = may_resume(old, same, 3)
    assert not refused
    assert [change.key for change in taken] == ["train.tokens", "train.batch_ramp"]
