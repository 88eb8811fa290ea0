import itertools
import random
from hashlib import sha256

import pytest
import yaml

from forescale.config.compose import CONF, compose, defaults, groups
from forescale.config.frozen import (
    diff,
    freeze,
    frozen_file,
    has_checksum,
    may_resume,
    read_yaml,
    thaw,
)
from forescale.config.schema import ConfigError
from forescale.config.train import TrainJob
from forescale.ground.errors import UserError
from forescale.verbs import VERBS, load

NEEDS = {
    "dataset": "data.path=/data/x",
    "mixture": "data.sources={web: /data/x, code: /data/y}",
    "custom": "model._target_=my.Model",
    "bert-base": "objective=masked",
    "t5-small": "objective=seq2seq",
    "own": "optimizer._target_=my.Optimizer",
}
# They set keys of several groups: tests/conf/test_recipe.py, test_experiment.py.
WHOLE = ("recipe", "experiment")


def combinations():
    """Every model on every engine; of the other groups each choice with several of these."""
    known, dice = groups(TrainJob), random.Random(0)
    for name in WHOLE:
        del known[name]
    for model, engine in itertools.product(known["model"].files, known["engine"].files):
        picks = {name: dice.choice(sorted(group.files)) for name, group in known.items()}
        picks |= {"model": model, "engine": engine}
        needs = [NEEDS[choice] for choice in picks.values() if choice in NEEDS]
        yield picks, [*(f"{name}={choice}" for name, choice in picks.items()), *needs]


@pytest.mark.slow  # seconds: every choice
def test_every_choice_composes_and_survives_freezing():
    composed = set()
    for picks, overrides in combinations():
        job = compose(TrainJob, overrides)
        text = freeze(job)
        assert thaw(TrainJob, text, trust=True) == job, overrides
        assert freeze(thaw(TrainJob, text, trust=True)) == text
        composed |= picks.items()
    known = [g for g in groups(TrainJob).values() if g.name not in WHOLE]
    assert composed == {(g.name, choice) for g in known for choice in g.files}


def test_frozen_is_complete_and_in_the_schema_s_order():
    tree = yaml.safe_load(freeze(compose(TrainJob, [])))
    assert list(tree)[:3] == ["run", "train", "model"]
    assert list(tree["run"]) == ["name", "root", "resume", "access", "from"]
    assert tree["checkpoint"]["every"] == "500 steps"
    assert tree["checkpoint"]["keep"] == 2


def test_text_that_looks_like_something_else_survives():
    job = compose(TrainJob, ["run.name=1e3", "logging.wandb.project=null", "train.compile=off"])
    assert (job.run.name, job.logging.wandb.project) == ("1e3", "null")
    assert thaw(TrainJob, freeze(job)) == job


def test_small_verbs_defaults_are_those_of_their_classes():
    for verb in VERBS:
        if not issubclass(schema := load(verb).JOB, TrainJob):
            assert defaults(schema) == schema(), verb
            if (file := CONF / f"{verb}.yaml").exists():
                assert [*yaml.safe_load(file.read_text())] == ["defaults"], "the rest repeats them"


@pytest.mark.parametrize(
    "overrides",
    [["model._target_=my.Code", "model.width=3"], ["callbacks=[{_target_: my.Code, width: 3}]"]],
)
def test_a_stored_target_needs_trust(tmp_path, overrides):
    job = compose(TrainJob, overrides)
    path = tmp_path / "config.yaml"
    path.write_text(freeze(job))
    with pytest.raises(UserError, match=r"my\.Code; add trust=true"):
        thaw(TrainJob, path)
    assert thaw(TrainJob, path, trust=True) == job


@pytest.mark.parametrize("value", ["3", "[my.Code]", "[{width: 3}]", "[{_target_: Code}]"])
def test_callbacks_are_mappings_that_name_a_class(value):
    with pytest.raises(ConfigError, match=r"callbacks: .*_target_"):
        compose(TrainJob, [f"callbacks={value}"])


@pytest.mark.parametrize("content", ["", "- 1", "a: [", "\x00", "3: {}"])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=r"config\.yaml(, line 1)?: (is not valid YAML|has no sec)"):
        thaw(TrainJob, path)


def test_missing_file_and_wrong_keys(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        thaw(TrainJob, tmp_path / "config.yaml")
    text = (
        freeze(compose(TrainJob, [])).replace("seed: 1337", "sed: 1").replace("keep: 2", "keep: 0")
    )
    with pytest.raises(ConfigError) as caught:
        thaw(TrainJob, text)
    assert [p.key for p in caught.value.problems] == [
        "config: train.sed",
        "config: checkpoint.keep",
    ]


def changed(*overrides, base=(), at_step=100):
    """What may_resume says of a changed command: the keys of (refusals, numerics, free)."""
    base = ["precision=bf16", *base]  # the same on every machine
    old, new = compose(TrainJob, base), compose(TrainJob, [*base, *overrides])
    return [[c.key for c in changes] for changes in may_resume(old, new, at_step)]


def test_a_file_of_another_version_is_one_sentence(tmp_path):
    """Its keys are not this version's; one that a user has edited has the nearest names."""
    path = tmp_path / "config.yaml"
    edited = freeze(compose(TrainJob)).replace("bigram_rows", "rope_theta")
    path.write_text(f"# sha256: {sha256(edited.encode()).hexdigest()}\n{edited}")
    with pytest.raises(UserError, match=r"another version .*rope_theta.*run\.json") as refusal:
        thaw(TrainJob, path)
    assert not isinstance(refusal.value, ConfigError)
    path.write_text(edited)
    with pytest.raises(ConfigError, match="rope_theta"):
        thaw(TrainJob, path)


def test_kinds_of_changes():
    assert changed() == [[], [], []]
    assert changed("optimizer.learning_rate=0.01", "train.seed=1")[0] == [
        "train.seed",
        "optimizer.learning_rate",
    ]
    assert changed(
        "train.micro_batch=2", "engine.stage=2", "precision=fp32", "model.loss_chunk=0"
    ) == [[], ["train.micro_batch", "model.loss_chunk", "engine.stage", "precision.kind"], []]
    assert changed("checkpoint.every=30 min", "data.path=/moved", "logging=wandb")[2] == [
        "data.path",
        "checkpoint.every",
        "logging.wandb.enabled",
    ]
    assert changed("run.from.run=other")[0] == ["run.from.run"]


def test_a_change_reads_well():
    (change,) = diff(compose(TrainJob, []), compose(TrainJob, ["schedule.decay=20 %"]))
    assert str(change) == "schedule.decay: '40 %' -> '20 %'"
    assert change.kind == "identity"


def test_another_kind_of_model_is_refused():
    assert "model._target_" in changed("model._target_=my.Model")[0]
    base = ["model._target_=my.Model", "model.width=3"]
    assert changed("model.width=4", base=base)[0] == ["model.width"]
    settings = "engine.deepspeed={zero_optimization: {overlap_comm: true}}"
    assert "engine.deepspeed.zero_optimization.overlap_comm" in changed(settings)[1]


def test_a_wsd_run_may_grow_until_it_decays():
    base = ["train.steps=1000"]  # decays from step 600 on
    assert changed("train.steps=2000", base=base, at_step=600) == [[], [], ["train.steps"]]
    assert changed("train.steps=2000", base=base, at_step=601)[0] == ["train.steps"]
    assert changed("train.steps=900", base=base)[0] == ["train.steps"]
    both = changed("train.tokens=1e9", "train.steps=null", base=base, at_step=600)
    assert both == [[], [], ["train.steps", "train.tokens"]]


def test_no_growth_where_the_past_would_differ():
    warmup = ["train.steps=1000", "schedule.warmup=10 %"]
    assert changed("train.steps=2000", base=warmup)[0] == ["train.steps"]
    cosine = ["train.steps=1000", "schedule=cosine"]
    assert changed("train.steps=2000", base=cosine)[0] == ["train.steps"]
    longer_decay = changed("train.steps=2000", "schedule.decay=90 %", base=["train.steps=1000"])
    assert longer_decay[0] == ["train.steps", "schedule.decay"]
    decaying = ["train.steps=1000", "optimizer.final_weight_decay=0"]
    assert changed("train.steps=2000", base=decaying)[0] == ["train.steps"]
    constant = ["train.steps=1000", "schedule=constant"]
    assert changed("train.steps=2000", base=constant, at_step=1000)[0] == []


def test_every_flipped_byte_of_a_frozen_file_is_found(tmp_path):
    """Within its checksum as well; only a line that is no checksum any more is a comment."""
    path, job = tmp_path / "config.yaml", compose(TrainJob, ["run.name=a"])
    whole = frozen_file(job)
    path.write_bytes(whole)
    assert thaw(TrainJob, path) == job
    assert has_checksum(path)
    places = [*range(80), *range(80, len(whole), 37)]
    for i in places:
        path.write_bytes(whole[:i] + bytes([whole[i] ^ (1 << i % 8)]) + whole[i + 1 :])
        try:
            thawed = thaw(TrainJob, path)
        except UserError:
            continue
        assert thawed == job
        assert not has_checksum(path)


PIECES = (
    *("\t", ": ", "- ", "{", "}", "[", "]", "&a ", "*a", "!!int ", "!!set ", "!!python/object:x "),
    *(
        "'",
        '"',
        "#",
        "|\n",
        ">\n",
        "\\",
        "\n",
        " ",
        "%YAML 1.2\n",
        "---\n",
        "...\n",
        "? ",
        "?",
        "<<: ",
    ),
    *(
        "\x85",
        "\u2028",
        "\0",
        "\ufeff",
        "\r",
        "\x7f",
        "1e5",
        "0o7",
        "1_000",
        "12:30:45",
        "2026-01-01",
    ),
    *("=", "~", "on", "!", "@", "`", ",", "😀", "[" * 99, "[" * 100 + "]" * 100, "[" * 101),
)


def content(text, monkeypatch, libyaml):
    """What is read of a text, or the sentence of its refusal."""
    monkeypatch.setattr(yaml, "__with_libyaml__", libyaml)
    try:
        return read_yaml(text.encode(), "f")
    except UserError as e:
        return f"refused: {e}"


def test_libyaml_reads_what_pyyaml_reads(monkeypatch):
    """All files of conf/ and a frozen config, and these with pieces put in or cut out."""
    files = [path.read_text() for path in sorted(CONF.rglob("*.yaml"))]
    files.append(frozen_file(compose(TrainJob, ["run.name=a"])).decode())
    dice, short = random.Random(0), [text[:400] for text in files]
    for _ in range(600):
        text = dice.choice(short)
        place = dice.randrange(len(text) + 1)
        end = place + dice.choice((0, 0, 0, 1, 4))
        files.append(text[:place] + dice.choice((*PIECES, "")) + text[end:])
    for text in files:
        by_python = content(text, monkeypatch, libyaml=False)
        by_libyaml = content(text, monkeypatch, libyaml=yaml.CSafeLoader is not None)
        assert repr(by_libyaml) == repr(by_python), text


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{one}: &{one} [{', '.join([f'*{before}'] * 9)}]\n"
    for one, before in zip("bcdefghi", "abcdefgh", strict=True)
)


def test_anchors_are_read():
    assert read_yaml(b"a: &a {b: 1}\nc: *a\n", "f") == {"a": {"b": 1}, "c": {"b": 1}}
    assert read_yaml(b"", "f") is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "f: is too large with its anchors written out"),
        ("a: &a [*a]", "f: is too large with its anchors written out"),
        ("a: " + "[" * 5000, "f: is nested too deeply"),
        ("a: {" * 2000, "f: is nested too deeply"),
        ("a: 1\nb: [", "f, line 2: is not valid YAML"),
        ("a: 2026-99-99", "f: is not valid YAML"),  # a date that there is not
        ("a: " + "9" * 5000, "f: is not valid YAML"),
        ("a: !!python/object:os.system x", "f, line 1: is not valid YAML"),
        ("a: \udcff", "f: is not valid YAML"),
    ],
)
def test_a_file_that_nobody_needs_is_refused(text, words):
    with pytest.raises(UserError) as error:
        read_yaml(text.encode(errors="surrogateescape"), "f")
    assert str(error.value).startswith(words)
