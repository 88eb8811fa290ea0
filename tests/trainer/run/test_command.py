"""A command that names an existing run means that run: only what it types is changed."""

import shutil
from dataclasses import fields, replace

import pytest

from forescale.config.frozen import diff, freeze, frozen_file, thaw
from forescale.config.schema import ConfigError, TargetConfig
from forescale.config.train import TrainJob
from forescale.ground.errors import UserError
from forescale.plan.config import PlanJob
from forescale.run.command import job_of
from forescale.run.start import start
from forescale.slurm.config import SubmitJob
from tests.trainer.small_run import make_job


@pytest.fixture(autouse=True)
def own_state(tmp_path, monkeypatch):
    """What this user's commands have named is remembered under tmp_path."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def frozen(run):
    return thaw(TrainJob, run.config, trust=True)


def typed(*words, schema=TrainJob):
    return job_of(schema, ["run.name=small", "run.root=runs", *words])


@pytest.mark.parametrize("schema", [TrainJob, PlanJob, SubmitJob])
def test_what_is_not_typed_is_the_runs(own_run, schema):
    for words in ((), ("logging.every=3", "train.steps=9")):
        nodes = () if schema is TrainJob else ("machine=cpu",)
        job = typed(*words, *nodes, schema=schema)
        changed = {c.key for c in diff(frozen(own_run), trained(job))} - {"run.root"}
        assert changed == {word.partition("=")[0] for word in words}


def trained(job):
    """The part of a job that `train` has too."""
    return TrainJob(**{f.name: getattr(job, f.name) for f in fields(TrainJob)})


def test_a_name_alone_is_diffed_only_in_what_is_typed(own_run, forescale):
    code, _, err = forescale("train", "small", "train.seed=5", "logging.every=3")
    assert code == 2
    assert err == (
        "forescale: runs/small: the run was started with another config: train.seed: 1337 -> 5; "
        "undo these changes, or choose another run.name.\n"
    )


def test_what_a_job_has_from_an_existing_run_is_said(own_run):
    def notes(schema, *words):
        sentences: list[str] = []
        job_of(schema, words, notes=sentences)
        return sentences

    assert "small" in notes(TrainJob, "run.name=small")[0]
    assert "small" in notes(TrainJob, "run.name=new", "run.from.run=small")[0]
    assert notes(TrainJob, "run.name=new") == notes(PlanJob) == []


def test_a_plan_without_a_name_knows_no_run(dataset, tmp_path, monkeypatch):
    """Not even one of the default name, whose precision is that of the laptop that trained it."""
    monkeypatch.chdir(tmp_path)
    start(make_job(dataset, tmp_path / "runs", "first", "precision=fp32"))
    words = ("machine=h100-sxm", "plan.gpus=1")
    assert job_of(PlanJob, words).precision.kind == "bf16"
    sentences: list[str] = []
    assert job_of(PlanJob, [*words, "run.name=first"], notes=sentences).precision.kind == "fp32"
    assert "runs/first" in sentences[0]
    assert job_of(TrainJob, [], notes=sentences).precision.kind == "fp32"
    assert "fp32" in sentences[1]


def test_a_branch_has_the_model_of_its_origin_unless_one_is_chosen(own_run):
    def model(*words):
        return job_of(TrainJob, ["run.name=new", "train.sequence_length=16", *words]).model

    trunk = frozen(own_run).model
    assert model("run.from.run=small") == model("run.from.run=runs/small") == trunk
    assert model("run.from.run=small", "model.dropout=0.5") == replace(trunk, dropout=0.5)
    longer = model("run.from.run=small", "train.sequence_length=64")
    assert longer == replace(trunk, max_sequence_length=None)
    for chosen in ("model=llama-160m", "recipe=llama-160m"):
        assert model("run.from.run=small", chosen) == model(chosen)


def test_a_run_that_is_not_named_is_not_taken(own_run):
    """The defaults name the run `first`: who types no name means the defaults."""
    shutil.copytree(own_run.path, "runs/first", symlinks=True)
    assert job_of(TrainJob, []).train.steps is None
    assert job_of(TrainJob, ["run.name=first"]).train.steps == 8


def test_the_length_that_is_typed_unsets_the_runs(own_run):
    job = typed("train.tokens=5120")
    assert (job.train.steps, job.train.tokens) == (None, 5120)


def test_a_choice_of_a_group_sets_its_whole_section(own_run):
    own_run.config.write_bytes(frozen_file(replace(frozen(own_run), engine=offloaded(own_run))))
    assert typed().engine.offload_parameters
    job = typed("engine=zero2")
    assert (job.engine.stage, job.engine.offload_parameters) == (2, False)
    assert job.data.path == frozen(own_run).data.path


def offloaded(run):
    return replace(frozen(run).engine, stage=3, offload_parameters=True)


def test_an_experiment_sets_its_keys_and_no_others(own_run):
    job, old = typed("experiment=quick"), frozen(own_run)
    assert job.train.tokens == 500_000
    assert job.train.steps is None
    assert job.train.sequence_length == old.train.sequence_length
    assert job.model.width == 128  # it chooses model=tiny
    assert job.optimizer == old.optimizer


def test_how_the_first_command_resumed_is_not_frozen(own_run):
    old = frozen(own_run)
    own_run.config.write_bytes(frozen_file(replace(old, run=replace(old.run, resume="never"))))
    assert typed().run.resume == "auto"
    assert typed("run.resume=must").run.resume == "must"


def test_a_moved_run_keeps_its_new_place(own_run, tmp_path):
    own_run.path.rename(tmp_path / "other")
    job = job_of(TrainJob, [f"run.root={tmp_path}", "run.name=other"])
    assert (job.run.root, job.run.name) == (str(tmp_path), "other")


def test_wrong_keys_over_a_run_are_reported_together(own_run):
    with pytest.raises(ConfigError) as caught:
        typed("model.widht=3", "train.seed=many")
    assert [p.key for p in caught.value.problems] == ["model.widht", "train.seed"]


@pytest.fixture
def with_class(own_run):
    """The run `small`, as if its model were a class of the user's own."""
    job = replace(frozen(own_run), model=TargetConfig("mine.Model", {"width": 64}))
    own_run.config.write_bytes(frozen_file(job))
    return own_run


def test_a_class_that_only_the_run_names_needs_trust_and_a_typed_one_needs_none(with_class):
    typed_class = typed("model._target_=mine.Model", "model.depth=3").model
    assert typed_class == TargetConfig("mine.Model", {"depth": 3})
    with pytest.raises(UserError, match=r"model\._target_: .*mine\.Model.*or trust=true"):
        typed()
    job = typed("trust=true")
    assert job.model.arguments == {"width": 64}
    assert typed("trust=true", "model.depth=3").model.arguments == {"width": 64, "depth": 3}
    assert not job.trust
    assert "trust: false" in freeze(job)


def test_a_stored_trust_counts_for_nothing(with_class):
    text = with_class.config.read_bytes().partition(b"\n")[2]
    with_class.config.write_bytes(text.replace(b"trust: false", b"trust: true"))
    with pytest.raises(UserError, match=r"trust=true"):
        typed()


def test_a_class_that_this_user_has_named_is_remembered_for_this_run_and_these_arguments(
    with_class, tmp_path
):
    from forescale.config.target import remember

    remember(frozen(with_class), with_class.path)
    assert typed().model.target == "mine.Model"
    shutil.copytree(with_class.path, "runs/copy", symlinks=True)
    with pytest.raises(UserError, match=r"trust=true"):
        job_of(TrainJob, ["run.name=copy"])
    job = replace(frozen(with_class), model=TargetConfig("mine.Model", {"width": "evil"}))
    with_class.config.write_bytes(frozen_file(job))
    with pytest.raises(UserError, match=r"trust=true"):
        typed()


def test_an_experiment_of_the_users_that_names_the_class_is_the_users_command(
    with_class, tmp_path, monkeypatch
):
    folder = tmp_path / "my" / "experiment"
    folder.mkdir(parents=True)
    text = "# @package _global_\ndefaults:\n  - override /model: custom\n\nmodel:\n"
    (folder / "mine.yaml").write_text(f"{text}  _target_: mine.Model\n  width: 32\n")
    monkeypatch.setenv("FORESCALE_CONF", str(tmp_path / "my"))
    assert typed("experiment=mine").model.arguments == {"width": 32}


@pytest.mark.parametrize(
    ("mine", "length"),
    [("steps: 7", (7, None)), ("tokens: 4096", (None, 4096)), ("seed: 3", (None, 5_000_000))],
)
def test_an_experiments_length_replaces_that_of_the_files_below(
    tmp_path, monkeypatch, mine, length
):
    folder = tmp_path / "my" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(f"# @package _global_\ntrain:\n  {mine}\n")
    monkeypatch.setenv("FORESCALE_CONF", str(tmp_path / "my"))
    train = job_of(TrainJob, ["experiment=mine"]).train
    assert (train.steps, train.tokens) == length
    train = job_of(TrainJob, ["experiment=mine", "train.steps=3"]).train
    assert (train.steps, train.tokens) == (3, None)


def test_a_run_with_a_key_that_has_no_effect_goes_on_by_the_same_command(own_run):
    with pytest.raises(ConfigError, match=r"model\.depth: has no effect"):
        job_of(TrainJob, ["run.name=other", "model.depth=8"])
    job = replace(frozen(own_run), model=replace(frozen(own_run).model, depth=8))
    own_run.config.write_bytes(frozen_file(job))
    assert typed("model.depth=8").model == job.model


def test_a_recipe_sets_its_keys_and_no_others(own_run):
    job, old = typed("recipe=llama-1b"), frozen(own_run)
    assert (job.optimizer.learning_rate, job.train.global_batch) == (4e-4, 1024)
    assert (job.train.seed, job.data) == (old.train.seed, old.data)
    assert job.logging == old.logging


def test_an_experiment_sets_the_keys_of_the_recipe_that_it_chooses(own_run):
    job = typed("experiment=gpus64", "data.path=/data/web")
    assert (job.optimizer.learning_rate, job.train.global_batch) == (3e-4, 2048)
    assert job.guard.loss_spike == "rollback"
