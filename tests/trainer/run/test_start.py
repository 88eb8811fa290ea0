"""A run directory belongs to one config and one dataset; nothing half-made ever bears its name."""

import json
import os
import shutil
from dataclasses import replace

import pytest

from forescale.config.compose import compose
from forescale.config.frozen import thaw
from forescale.config.train import TrainJob
from forescale.ground.errors import UserError
from forescale.ground.storage import write_json
from forescale.run import start as start_module
from forescale.run.directory import Parent
from forescale.run.start import numerics, reopen, start
from tests.trainer.small_run import make_dataset, make_job, train_a_step


def listing(folder):
    return sorted(
        (str(p.relative_to(folder)), p.is_file() and p.read_bytes()) for p in folder.rglob("*")
    )


def test_a_new_run_explains_itself(job, small_data):
    started = start(job())
    run = started.run
    assert thaw(TrainJob, run.config) == started.job
    assert started.job.model.vocab_size == started.sources.vocab_size
    identity = json.loads(run.identity.read_text())
    assert identity["dataset"]["corpus_hash"] == started.sources.corpus_hash
    assert identity["versions"]["torch"]
    assert run.tokenizer.read_bytes() == (small_data / "tokenizer.json").read_bytes()
    assert sorted(p.name for p in run.path.iterdir()) == [
        "config.yaml",
        "run.json",
        "tokenizer.json",
    ]
    assert [p.name for p in run.path.parent.iterdir()] == ["first"]


def test_the_same_again_changes_nothing(job):
    run = start(job()).run
    before = listing(run.path.parent)
    assert start(job()).job == start(job()).job
    assert listing(run.path.parent) == before


def test_what_changes_the_trajectory_is_refused_with_the_list(job):
    run = start(job()).run
    train_a_step(run)
    before = listing(run.path)
    changes = ("train.seed=5", "optimizer.learning_rate=0.5", "train.global_batch=8")
    with pytest.raises(UserError) as caught:
        start(job(*changes, "logging.every=1"))
    message = str(caught.value)
    assert message.startswith(f"{run.path}: the run was started with another config: ")
    for words in (
        "train.seed: 1337 -> 5",
        "optimizer.learning_rate: ",
        "train.global_batch: 4 -> 8",
    ):
        assert words in message
    assert "logging" not in message
    assert listing(run.path) == before


@pytest.mark.parametrize(
    "change",
    [
        *(
            "logging.every=3",
            "checkpoint.keep=5",
            "launch.timeout=1 min",
            "profile.steps=1:2",
        ),  # free
        *("engine=zero2", "precision=fp32", "train.micro_batch=2", "train.compile=off"),  # numerics
    ],
)
def test_what_does_not_is_taken_and_frozen(job, change):
    run = start(job()).run
    started = start(job(change))
    assert thaw(TrainJob, run.config) == started.job
    assert started.job != start_module.settle(job(), started.sources)


def test_a_schedule_without_decay_may_grow(job):
    run = start(job("schedule=constant")).run
    assert start(job("schedule=constant", "train.steps=20")).job.total_steps == 20
    assert thaw(TrainJob, run.config).train.steps == 20
    run.checkpoint_path(12).mkdir(parents=True)
    with pytest.raises(UserError, match=r"train\.steps: 20 -> 8"):
        start(job("schedule=constant"))


def test_a_longer_run_may_not_change_the_batches_of_its_past(job):
    ramp = ("schedule=constant", "train.global_batch=8", "train.micro_batch=2")
    ramp += ("train.first_batch=4", "train.steps=null")
    run = start(job(*ramp, "train.tokens=2560", "train.batch_ramp='40 %'")).run
    train_a_step(run)
    longer = (*ramp, "train.tokens=5120")
    with pytest.raises(UserError) as caught:
        start(job(*longer, "train.batch_ramp='40 %'"))
    message = "would be of 4 windows at first, and 8 after step 16, where they are of 4 windows at"
    assert message in str(caught.value)
    assert "write train.batch_ramp='1024 tokens' too" in str(caught.value)
    grown = start(job(*longer, "train.batch_ramp='1024 tokens'")).job
    assert (grown.batch_ramp.lengths, grown.total_tokens) == ((8,), 5120)


def test_a_run_that_decays_is_told_where_a_longer_one_goes_on(job):
    wsd = ("schedule=wsd", "schedule.decay=4")
    run = start(job(*wsd)).run
    for step in (2, 4, 6, 8):
        run.checkpoint_path(step).mkdir(parents=True)
    with pytest.raises(UserError) as caught:
        start(job(*wsd, "train.steps=20"))
    assert "begun to decay; go on from before the decay with" in str(caught.value)
    assert "run.name=NEW run.from.run=first run.from.step=4," in str(caught.value)
    with pytest.raises(UserError, match=r"undo these changes, or choose another run\.name\.$"):
        start(job(*wsd, "train.steps=20", "train.seed=3"))


def test_other_data_is_refused_and_a_moved_copy_is_not(job, small_data, tmp_path):
    train_a_step(start(job()).run)
    copy = shutil.copytree(small_data, tmp_path / "copy")
    start(job(f"data.path={copy}"))
    other = make_dataset(tmp_path / "other", vocab_size=280)
    with pytest.raises(UserError, match=r"started on other data .*give its data.path"):
        start(job(f"data.path={other}"))


def test_a_directory_with_something_else_is_left_alone(job):
    path = job().run.directory
    path.mkdir(parents=True)
    (path / "thesis.tex").write_text("mine")
    before = listing(path.parent)
    with pytest.raises(UserError, match="neither empty nor a run"):
        start(job())
    assert listing(path.parent) == before


def test_an_empty_directory_will_do_and_so_will_a_link_to_one(job, tmp_path):
    path = job().run.directory
    path.mkdir(parents=True)
    start(job())
    shutil.rmtree(path)
    (tmp_path / "scratch").mkdir()
    path.symlink_to(tmp_path / "scratch")
    start(job())
    assert (tmp_path / "scratch" / "config.yaml").exists()


@pytest.mark.parametrize("at", ["write_file", "write_checked_json", "frozen_file"])
def test_a_kill_while_it_is_made_leaves_no_half_run(job, monkeypatch, at):
    """In a process of its own, which ends there; then the same again."""
    real, calls = getattr(start_module, at), []

    def deadly(*args):
        calls.append(args)
        real(*args)
        os._exit(9)

    if (child := os.fork()) == 0:
        monkeypatch.setattr(start_module, at, deadly)
        start(job())
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not job().run.directory.exists()
    run = start(job()).run
    assert [p.name for p in run.path.parent.iterdir()] == ["first"]


def test_of_two_first_launches_one_wins_and_the_run_is_whole(job):
    """Each in a process, let go at the same time. A loser gets a message, or finds the run made."""
    path = job().run.directory
    begin, gate = os.pipe()
    children = []
    for _ in range(3):
        if (child := os.fork()) == 0:
            os.close(gate)
            os.read(begin, 1)  # nothing comes: it ends when the gate is closed
            try:
                start(job())
            except UserError as e:
                os._exit(2 if "another command has made this run" in str(e) else 3)
            except BaseException:
                os._exit(4)
            os._exit(0)
        children.append(child)
    os.close(gate)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert set(codes) <= {0, 2}
    assert 0 in codes
    assert [p.name for p in path.parent.iterdir()] == ["first"]
    assert start(job()).job.run.name == "first"


def test_the_second_of_two_first_launches_says_so(job, monkeypatch):
    """The other one publishes while this one writes."""
    real, other = start_module.frozen_file, job().run.directory

    def overtaken(new_job):
        monkeypatch.setattr(start_module, "frozen_file", real)
        start(job())
        return real(new_job)

    monkeypatch.setattr(start_module, "frozen_file", overtaken)
    with pytest.raises(UserError, match="another command has made this run"):
        start(job())
    assert [p.name for p in other.parent.iterdir()] == ["first"]
    assert start(job()).run.path == other


def test_a_rank_neither_writes_nor_corrects_the_config(job):
    """It may have slept while another launch changed it."""
    run = start(job()).run
    start(job("checkpoint.keep=5"))
    before = listing(run.path)
    assert reopen(job()).job.checkpoint.keep == 2
    with pytest.raises(UserError, match="another config"):
        reopen(job("train.seed=5"))
    assert listing(run.path) == before


def test_a_config_that_was_changed_is_refused_and_train_may_change_it(job):
    run = start(job()).run
    start(job("checkpoint.keep=5"))
    whole = run.config.read_bytes()
    run.config.write_bytes(whole.replace(b"theta: 10000", b"theta: 10001"))
    assert run.config.read_bytes() != whole
    with pytest.raises(UserError, match=r"config.yaml: was changed since it was written"):
        start(job("checkpoint.keep=5"))
    run.config.write_bytes(whole)
    start(job("checkpoint.keep=6"))
    assert thaw(TrainJob, run.config).checkpoint.keep == 6


def test_must_needs_a_run(job):
    with pytest.raises(UserError, match="there is no run to resume"):
        start(job("run.resume=must"))
    assert not job().run.root or not job().run.directory.exists()
    start(job())
    start(job("run.resume=must"))


def test_never_refuses_a_run_that_has_trained(job):
    """But not one that was killed before it did: the same command goes on."""
    never = job("run.resume=never")
    run = start(never).run
    reopen(never)  # as a rank does
    run.new_attempt()
    start(never)
    train_a_step(run)
    with pytest.raises(UserError, match=r"the run exists already; choose another run\.name"):
        start(never)
    reopen(never)  # a restart after a crash


def test_a_model_that_does_not_fit_the_data_is_refused_before_anything_is_made(job):
    with pytest.raises(UserError, match=r"model\.vocab_size"):
        start(job("model.vocab_size=10"))
    assert not job().run.directory.parent.exists()


def test_a_damaged_identity_is_said(job):
    run = start(job()).run
    write_json(run.identity, {"name": "first"})
    with pytest.raises(UserError, match=r"run\.json"):
        start(job())
    run.identity.write_text("{")
    with pytest.raises(UserError, match=r"run\.json: not valid JSON"):
        start(job())


def test_a_run_that_made_no_step_takes_a_corrected_command(job, tmp_path):
    run = start(job("run.access=all")).run
    before = thaw(TrainJob, run.config)
    run.new_attempt().start_from(Parent(0), run)  # it began, and failed in its first step
    other = make_dataset(tmp_path / "other", vocab_size=280)
    started = start(job("train.seed=5", "model.width=64", f"data.path={other}", "logging.every=3"))
    (note,) = started.notes
    for words in ("made no step yet, so its config is replaced", "train.seed: 1337 -> 5", "data: "):
        assert words in note
    assert "logging" not in note
    assert thaw(TrainJob, run.config) == started.job != before
    assert run.verified_tokenizer().read_bytes() == (other / "tokenizer.json").read_bytes()
    assert run.path.stat().st_mode & 0o777 == 0o700
    assert start(started.job).notes == ()
    train_a_step(run)
    with pytest.raises(UserError, match=r"other data"):
        start(job("train.seed=5", "model.width=64"))


def lose_rows(run):
    (run.path / "attempts" / "0001" / "metrics.jsonl").write_bytes(b"")


def lose_attempts(run):
    shutil.rmtree(run.path / "attempts")


@pytest.mark.parametrize("lose", [lose_rows, lose_attempts])
def test_a_run_that_lost_its_history_is_not_taken_for_one_without_a_step(job, lose):
    run = start(job()).run
    train_a_step(run)
    run.attempts()[0].event("checkpoint_saved", step=1)
    lose(run)
    with pytest.raises(UserError, match="another config"):
        start(job("train.seed=5"))


def test_what_does_not_work_is_found_before_anything_is_written(job):
    def examine(new_job, sources):
        assert new_job.model.vocab_size == sources.vocab_size
        raise UserError("model", "does not work", "correct it")

    with pytest.raises(UserError, match="does not work"):
        start(job(), examine=examine)
    assert not job().run.directory.parent.exists()
    run = start(job()).run
    before = listing(run.path)
    with pytest.raises(UserError, match="does not work"):
        start(job("train.seed=5"), examine=examine)
    assert listing(run.path) == before
    train_a_step(run)
    start(job(), examine=examine)  # it worked when it made its step


def test_numerics_change_with_what_changes_bits(job):
    def of(settled, world=1, device="cpu", threads=1, compiled=False):
        return numerics(settled, world, device, threads, compiled)

    base = of(job())
    assert of(job("train.deterministic=false")) == base, "a CPU is exact either way"
    assert of(job("logging.every=3", "checkpoint.keep=5")) == base
    for other in (
        *(of(job("engine=zero3")), of(job("precision=fp32")), of(job("train.micro_batch=2"))),
        *(of(job(), world=2), of(job(), device="cuda"), of(job(), threads=2)),
        *(of(job(), compiled=True), of(job("engine.gradient_dtype=fp32"))),
        of(job("model.mlp.chunk=8")),
        of(job("train.deterministic=false"), device="cuda") | {"device": "cpu"},
    ):
        assert sum(base[key] != other[key] for key in base) == 1


def test_another_guard_is_told_as_what_ends_exactness():
    """And not what only says how often it looks."""

    def numbers(*overrides):
        job = compose(TrainJob, ["train.steps=400", "train.tokens=null", *overrides])
        return numerics(job, 1, "cpu", 1, False)

    usual = numbers()
    changed = numbers("guard.loss_spike=rollback", "guard.replay=5 steps")
    assert {k for k in usual if usual[k] != changed[k]} == {"guard.loss_spike"}


@pytest.mark.parametrize(("access", "mode"), [("owner", 0o700), ("group", 0o750), ("all", 0o755)])
def test_who_may_read_a_run(small_data, tmp_path, access, mode):
    """By default its owner alone; the key counts when the run is made, and when it is changed."""
    job = make_job(small_data, tmp_path)
    if access != job.run.access:
        job = replace(job, run=replace(job.run, access=access))
    run = start(job).run
    assert run.path.stat().st_mode & 0o777 == mode
    start(replace(job, run=replace(job.run, access="all")))
    assert run.path.stat().st_mode & 0o777 == 0o755
