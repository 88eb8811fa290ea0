"""A branch begins at one step of its origin, with the data and the tokenizer of the origin."""

import numpy as np
import pytest

from forescale.config.frozen import thaw
from forescale.config.train import TrainJob
from forescale.data.prepare.builder import BuildConfig, build_dataset
from forescale.data.text.files import Files
from forescale.ground.errors import UserError
from forescale.run.directory import Run
from forescale.run.references import References
from forescale.run.start import start
from tests.preferences import make_preferences
from tests.questions import KIND, make_conversations
from tests.trainer.small_run import make_dataset, make_job, train_a_step


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
    start(branch("run.from.load=weights"))


@pytest.mark.parametrize("load", ["weights", "everything"])
def test_a_branch_needs_the_tokenizer_of_its_trunk(branch, tmp_path, load):
    """The same ids would be other text, and nothing would show it but the loss."""
    other = make_dataset(tmp_path / "foreign", vocab_size=280)
    with pytest.raises(UserError, match=r"first was trained with another tokenizer than that of"):
        start(branch(f"data.path={other}", f"run.from.load={load}"))
    assert not Run(tmp_path / "runs" / "branch").path.exists()


def test_a_branch_that_would_end_before_it_begins_is_refused(branch, small_data):
    here = f"data.path={small_data}"
    with pytest.raises(UserError, match=r"end at step 8, and first is at step 8 already.*steps=12"):
        start(branch(here), newest=lambda run: 8)
    assert start(branch(here, "train.steps=12"), newest=lambda run: 8).job.run.origin.step == 8


def test_a_branch_is_on_as_many_clusters_as_its_trunk(branch, small_data, tmp_path):
    """Else its first windows would be none of the next ones."""
    here = (f"data.path={small_data}", "train.steps=12", f"outer.store={tmp_path / 'store'}")
    outer = ("outer.every=4", "outer.members=[north,south]", "outer.member=north")
    with pytest.raises(UserError, match="first was trained on one cluster, and this run is on 2"):
        start(branch(*here, *outer), newest=lambda run: 4)
    assert start(branch(*here, *outer, "run.from.load=weights"), newest=lambda run: 4)


def test_a_branch_counts_the_windows_that_its_trunk_has_read(job, small_data):
    sizes = ("train.global_batch=8", "train.micro_batch=2", f"data.path={small_data}")
    ramp = ("train.first_batch=4", "train.batch_ramp='6 steps'")
    train_a_step(start(job(*sizes, *ramp)).run)
    off = (*sizes, "run.name=branch", "run.from.run=first", "train.steps=20")
    with pytest.raises(UserError) as caught:
        start(job(*off), newest=lambda run: 8)
    assert "first has read 40 windows at step 8, where the batch of this run would" in str(
        caught.value
    )
    assert "have read 64; write train.first_batch=4 train.batch_ramp='6 steps'" in str(caught.value)
    start(job(*off, "run.from.load=weights"))
    assert start(job(*off, *ramp, "run.name=other"), newest=lambda run: 8).job.total_windows == 136


def test_a_branch_freezes_the_step_that_it_came_from(branch, small_data):
    """And keeps it, whatever its origin saves later and whether the command names it or not."""
    new_job = branch(f"data.path={small_data}", "train.steps=20")
    run = start(new_job, newest=lambda run: 8).run
    for _ in range(2):
        assert start(new_job, newest=lambda run: 12).job.run.origin.step == 8
        assert thaw(TrainJob, run.config).run.origin.step == 8
        train_a_step(run)
    named = branch(f"data.path={small_data}", "train.steps=20", "run.from.step=4")
    with pytest.raises(UserError, match=r"run\.from\.step: 8 -> 4"):
        start(named)


SIZES = ("model.num_layers=1", "model.width=32", "model.num_heads=2")


@pytest.fixture
def preferring(tmp_path):
    """Make the job of a run of preferences: preferring(name, origin, "key=value", ...). The runs
    `a` and `b` have made a step, each with references of its own, the numbers 1 and 2."""
    dataset, root = make_preferences(tmp_path / "preferences"), tmp_path / "runs"
    examples = make_conversations(tmp_path / "examples")
    train_a_step(start(make_job(examples.path, root, "base", *SIZES, *KIND)).run)

    def make(name, origin, *overrides):
        words = (*SIZES, *KIND, "objective=preferences", f"run.from.run={origin}", *overrides)
        return make_job(dataset.path, root, name, *words)

    for number, name in enumerate("ab", 1):
        run = start(make(name, "base", "run.from.load=weights")).run
        train_a_step(run)
        source = {"data": {"data": dataset.identity}, "columns": 64, "origin": {"run": "base"}}
        count = {"train": 48, "validation": 12}
        values = {s: {"data": np.full((n, 2), number, np.float32)} for s, n in count.items()}
        References(source, values).write(run)
    return make


def test_a_corrected_branch_has_the_references_of_its_new_origin(preferring, tmp_path):
    run = start(preferring("branch", "a")).run
    bytes_of = {name: Run(tmp_path / "runs" / name).references.read_bytes() for name in "ab"}
    assert run.references.read_bytes() == bytes_of["a"] != bytes_of["b"]
    assert start(preferring("branch", "b")).notes
    assert run.references.read_bytes() == bytes_of["b"]
    start(preferring("branch", "b", "run.from.load=weights"))
    assert not run.references.exists(), "they are computed with the weights of b"
    start(preferring("branch", "a"))
    assert run.references.read_bytes() == bytes_of["a"]


def test_without_the_references_of_its_rows_a_branch_is_refused(preferring, tmp_path):
    with pytest.raises(UserError) as caught:
        start(preferring("branch", "a", "train.sequence_length=128"))
    message = "of a is of rows of 64 columns, and train.sequence_length is 128; "
    assert message in str(caught.value)
    Run(tmp_path / "runs" / "a").references.unlink()
    with pytest.raises(UserError, match=r"a has no references\.json, .*run\.from\.load=weights to"):
        start(preferring("branch", "a"))
    assert not Run(tmp_path / "runs" / "branch").path.exists()
    start(preferring("branch", "a", "run.from.load=weights", "train.sequence_length=128"))


def test_a_run_that_learns_conversations_no_more_has_no_chat_template(small_data, tmp_path):
    examples, root = make_conversations(tmp_path / "examples"), tmp_path / "runs"
    run = start(make_job(examples.path, root, "first", *SIZES, *KIND)).run
    assert run.chat.is_file()
    start(make_job(small_data, root, "first"))
    assert not run.chat.exists()
