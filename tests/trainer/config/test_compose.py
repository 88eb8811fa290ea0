import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forescale.config.compose import compose, defaults, groups
from forescale.config.help import ALL, explain
from forescale.config.schema import ConfigError, TargetConfig, leaves
from forescale.config.train import TrainJob
from forescale.ground.errors import UserError
from forescale.slurm.config import SubmitJob
from forescale.verbs import VERBS, load


def refusal(*overrides, **kwargs):
    with pytest.raises(ConfigError) as caught:
        compose(TrainJob, overrides, **kwargs)
    return caught.value


def test_all_mistakes_at_once_with_suggestions():
    error = refusal(
        "train.stpes=3",
        "+new.key=1",
        "trian.seed=1",
        "train.lr=3",
        "modle=tiny",
        "model=gpt3",
        "train.seed=abc",
        "checkpoint.keep=1",
        "a b",
        "-m",
        "optimizer=adamw,muon",
        "train.micro_batch=1,2",
        "~schedule.decay",
        "optimizer.clip=f(",
        "engine.stage=4",
        "logging.wandb=3",
        "schedule.warmup=30 min",
        "train.global_batch=1e9",  # whole, so not a mistake
    )
    lines = str(error).splitlines()
    assert len(lines) == len(error.problems) == 17
    message = {p.key: f"{p.problem}; {p.todo}" for p in error.problems}
    for key, words in {
        "train.stpes": "did you mean train.steps",
        "new.key": "--help",
        "trian.seed": "did you mean train.seed",
        "train.lr": "did you mean optimizer.learning_rate",
        "modle": "did you mean model",
        "model": "choose one of gpt2-",
        "train.seed": "expects a whole number, got 'abc'",
        "checkpoint.keep": "at least 2, got 1",
        "a b": "KEY=VALUE",
        "-m": "study",
        "optimizer": "study",
        "train.micro_batch": "study",
        "~schedule.decay": "null",
        "optimizer.clip": "can't be read",
        "engine.stage": "0, 1, 2, 3",
        "logging.wandb": "logging.wandb.enabled",
        "schedule.warmup": "must not be a wall time",
    }.items():
        assert words in message[key], (key, message[key])
    for foreign in ("hydra", "Hydra", "omegaconf", "struct", "Traceback"):
        assert foreign not in str(error)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("optimizer.weight_dekay", "optimizer.weight_decay"),
        ("train.weight_decay", "optimizer.weight_decay"),
        ("learning_rate", "optimizer.learning_rate"),
        ("batch_size", "train.global_batch"),
        ("model.hidden_size", "model.width"),
        ("save_every", "checkpoint.every"),
        ("checkpoints.every", "checkpoint.every"),
        ("schedular", "schedule"),
        ("run.from.runs", "run.from.run"),
    ],
)
def test_the_nearest_name(typed, meant):
    (problem,) = refusal(f"{typed}=1").problems
    assert problem.todo == f"did you mean {meant}?"


KEYS = st.sampled_from([*leaves(TrainJob), *groups(TrainJob), "train", "run.from", "x", "a.b"])
VALUES = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["", "null", "1", "-1", "1e9", "nan", "inf", "[1,2]", "{a: 1}", "${x.y}", "1,2"]
    ),
    st.sampled_from(
        ["${oc.env:NO_SUCH}", "???", "true", "'", "range(1,3)", "${", "a=b", "glob(*)"]
    ),
)
WORDS = st.builds("{}{}={}".format, st.sampled_from(["", "+", "++", "~"]), KEYS, VALUES)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.one_of(WORDS, st.text(max_size=12)), max_size=4))
def test_whatever_is_typed_ends_in_a_job_or_in_our_words(overrides):
    reported = []
    try:
        compose(TrainJob, overrides)
    except ConfigError as e:
        reported = e.problems
    assert all(p.key and p.problem and p.todo for p in reported)


def test_values_are_read_as_meant():
    job = compose(
        TrainJob,
        [
            "train.tokens=1e9",
            "optimizer.clip=null",
            "optimizer.learning_rate=1",
            "train.compile=off",
            "run.root=/scratch/a b,c(1)",
            "data.path=null",
            "++train.seed=7",
            "checkpoint.every=2e9 tokens",
            "run.from.run=runs/trunk",
            "logging.wandb={enabled: true, entity: us}",
            "validation.windows=10",
            "validation.windows=20",
        ],
    )
    assert job.train.tokens == 10**9
    assert isinstance(job.train.tokens, int)
    assert job.optimizer.clip is None
    assert isinstance(job.optimizer.learning_rate, float)
    assert job.train.compile == "off"
    assert job.run.root == "/scratch/a b,c(1)"
    assert job.data.path is None
    assert job.train.seed == 7
    assert str(job.checkpoint.every) == "2e9 tokens"
    assert job.run.origin.run == "runs/trunk"
    assert (job.logging.wandb.enabled, job.logging.wandb.entity) == (True, "us")
    assert job.validation.windows == 20


def test_references_to_other_keys_and_the_environment(monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    job = compose(TrainJob, ["run.root=${oc.env:SCRATCH}/runs", "run.name=seed-${train.seed}"])
    assert str(job.run.directory) == "/scratch/me/runs/seed-1337"
    assert "refers to a key that doesn't exist" in str(refusal("run.name=${train.sed}"))


def test_typing_one_length_unsets_the_other():
    assert compose(TrainJob, ["train.steps=200"]).train.tokens is None
    assert compose(TrainJob, ["train.steps=null"]).train.tokens is not None
    job = compose(TrainJob, ["experiment=quick", "train.tokens=1e6"])
    assert (job.train.steps, job.train.tokens, job.run.name) == (None, 10**6, "quick")


def test_a_group_s_file_is_laid_under_typed_keys_whatever_their_order():
    job = compose(TrainJob, ["optimizer.learning_rate=0.1", "optimizer=adamw"])
    assert (job.optimizer.kind, job.optimizer.learning_rate) == ("adamw", 0.1)


def test_a_model_of_the_user_s_own():
    job = compose(TrainJob, ["model._target_=mypackage.Model", "model.width=3", "model.a.b=[1,2]"])
    assert job.model == TargetConfig("mypackage.Model", {"width": 3, "a": {"b": [1, 2]}})
    assert "model._target_" in str(refusal("model=custom"))


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("_target_: mypackage.Model\nwidth: 3\ndepth: 1\n")
    (tmp_path / "model" / "slip.yaml").write_text("depth: 4\nwidht: 3\n")
    (tmp_path / "model" / "torn.yaml").write_text("depth: [\n")
    (tmp_path / "model" / "unset.yaml").write_text("_target_: ${oc.env:NO_SUCH}\n")
    return tmp_path


def test_choices_of_the_user_s_own(mine):
    job = compose(TrainJob, ["model=mine", "model.width=4"], conf_dirs=[mine])
    assert job.model == TargetConfig("mypackage.Model", {"width": 4, "depth": 1})
    (problem,) = refusal("model=slip", conf_dirs=[mine]).problems
    assert (problem.key, problem.todo) == ("model.widht", "did you mean model.width?")
    with pytest.raises(UserError, match=r"torn\.yaml"):
        compose(TrainJob, ["model=torn"], conf_dirs=[mine])
    assert "refers to a key that doesn't exist" in str(refusal("model=unset", conf_dirs=[mine]))
    assert "mine" in explain(TrainJob, "", conf_dirs=[mine], section=ALL)


def test_a_choice_that_exists_already_and_a_missing_directory(mine):
    (mine / "model" / "tiny.yaml").write_text("depth: 4\n")
    with pytest.raises(UserError, match="is also defined in"):
        compose(TrainJob, [], conf_dirs=[mine])
    with pytest.raises(UserError, match="no such directory"):
        compose(TrainJob, [], conf_dirs=[mine / "nowhere"])


def test_works_from_any_directory(tmp_path, monkeypatch):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "train.yaml").write_text("nonsense: 1\n")
    monkeypatch.chdir(tmp_path)
    assert compose(TrainJob, []).run.name == "first"


def test_the_manual_says_every_key_and_every_choice():
    for verb in VERBS:
        schema = load(verb).JOB
        actions = schema.ACTIONS or ("",)
        page = "\n".join(
            explain(schema, VERBS[verb], action=action, section=ALL) for action in actions
        )
        assert max(map(len, page.splitlines())) <= 100
        known = leaves(schema, job=defaults(schema))
        assert all(f" {path} " in page for path in known)
        begun = [row[2:].split() for row in page.splitlines() if row[2:3].strip()]
        rows = {words[0]: words for words in begun}
        assert not [path for path in known if len(rows[path]) < 3], "keys without help"
        assert all(choice in page for g in groups(schema).values() for choice in g.files)
    page = " ".join(explain(TrainJob, "", section=ALL).split())
    assert "! optimizer.learning_rate 0.02 " in page
    assert "pre Before each part of a block, after it" in page, (
        "a comment of several lines is whole"
    )


def test_what_one_command_types_is_not_in_the_next():
    words = ["optimizer=adamw", "schedule.warmup=7 steps", "data.skip=[[1,2]]", "train.steps=9"]
    before = compose(TrainJob, words[:1])
    assert compose(TrainJob, words) != before
    assert compose(TrainJob, words[:1]) == before


def test_files_of_the_users_own_by_the_environment(tmp_path, monkeypatch, capsys):
    from forescale.cli import main

    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/ours.yaml").write_text("# The cluster upstairs.\npartition: gpu\nnodes: 3\n")
    words = ["slurm=ours", "machine=cpu", "slurm.gpus_per_node=0", "train.global_batch=24"]
    with pytest.raises(ConfigError, match="'ours' is not a choice"):
        compose(SubmitJob, words)
    monkeypatch.setenv("FORESCALE_CONF", str(tmp_path))
    job = compose(SubmitJob, words)
    assert (job.slurm.partition, job.slurm.nodes.most) == ("gpu", 3)
    main(["submit", "--help", "slurm"])
    assert "The cluster upstairs." in capsys.readouterr().out


def test_all_problems_reach_the_other_ranks():
    error = refusal("train.stpes=3", "model=gpt3")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), len(again.problems)) == (ConfigError, str(error), 2)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (TrainJob, ["data=dataset", "data.path=https://me:pA55@host/d"]),
        (TrainJob, ["data=mixture", "data.sources={a: 'https://host/d?sig=pA55'}"]),
        (
            TrainJob,
            ["data=dataset", "data.path=https://host/d?token=pA55", "modl=https://u:pA55@h/"],
        ),
        (TrainJob, ["model._target_=a.B", "model.data=s3://k:pA55@bucket/x"]),
        (TrainJob, ["data=dataset", "data.path=${oc.env:ADDRESS}"]),
    ],
)
def test_an_address_with_a_secret_is_refused_and_not_shown(schema, words, monkeypatch):
    """Whatever a job says is stored, in files and at wandb."""
    monkeypatch.setenv("ADDRESS", "https://me:pA55@host/d")
    with pytest.raises(ConfigError) as caught:
        compose(schema, words)
    message = str(caught.value)
    assert "export it as FORESCALE_SECRET_NAME and write $FORESCALE_SECRET_NAME" in message
    assert "pA55" not in message


def test_an_address_that_names_its_secrets_is_kept_as_it_is():
    address = "https://$FORESCALE_SECRET_LOGIN@host/d?$FORESCALE_SECRET_SAS"
    job = compose(TrainJob, ["data=dataset", f"data.path={address}"])
    assert job.data.path == address
