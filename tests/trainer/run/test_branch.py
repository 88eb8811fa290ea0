"""A branch begins at one step of its origin, with the data and the tokenizer of the origin."""

import pytest

from forescale.config.frozen import thaw
from forescale.config.train import TrainJob
from forescale.data.prepare.builder import BuildConfig, build_dataset
from forescale.data.text.files import Files
from forescale.errors import UserError
from forescale.run.directory import Run
from forescale.run.start import start
from tests.trainer.small_run import make_dataset, train_a_step


@pytest.fixture
def branch(job, small_data, tmp_path):
    """Make the job of a branch of `first`, on other data with the same tokenizer unless told:
    branch("key=value", ...)."""
    train_a_step(start(job()).run)
    config = BuildConfig(tokenizer=str(small_data / "tokenizer.json"), validation=0.3)
    build_dataset(Files([small_data.with_name("text")]), tmp_path / "other", config)
    named = ("run.name=branch", "run.from.run=first", f"data.path={tmp_path / 'other'}")

    def make(*overrides):
        return job(*named, *overrides)

    return make


def test_a_branch_needs_the_data_of_its_trunk(branch, tmp_path):
    with pytest.raises(UserError, match=r"first was trained on other data"):
        start(branch())
    assert not Run(tmp_path / "runs" / "branch").path.exists()
    start(branch("run.from.what=weights"))


@pytest.mark.parametrize("what", ["weights", "everything"])
def test_a_branch_needs_the_tokenizer_of_its_trunk(branch, tmp_path, what):
    """The same ids would be other text, and nothing would show it but the loss."""
    other = make_dataset(tmp_path / "foreign", vocab_size=280)
    with pytest.raises(UserError, match=r"first was trained with another tokenizer than that of"):
        start(branch(f"data.path={other}", f"run.from.what={what}"))
    assert not Run(tmp_path / "runs" / "branch").path.exists()


def test_a_branch_that_would_end_before_it_begins_is_refused(branch, small_data):
    here = f"data.path={small_data}"
    with pytest.raises(UserError, match=r"end at step 8, and first is at step 8 already.*steps=12"):
        start(branch(here), newest=lambda run: 8)
    assert start(branch(here, "train.steps=12"), newest=lambda run: 8).job.run.origin.step == 8


def test_a_branch_freezes_the_step_that_it_came_from(branch, small_data):
    """And keeps it, whatever its origin saves later and whether the command names it or not."""
    made = branch(f"data.path={small_data}", "train.steps=20")
    run = start(made, newest=lambda run: 8).run
    for _ in range(2):
        assert start(made, newest=lambda run: 12).job.run.origin.step == 8
        assert thaw(TrainJob, run.config).run.origin.step == 8
        train_a_step(run)
    named = branch(f"data.path={small_data}", "train.steps=20", "run.from.step=4")
    with pytest.raises(UserError, match=r"run\.from\.step: 8 -> 4"):
        start(named)
