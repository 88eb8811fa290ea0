import subprocess
import sys
from dataclasses import replace

import pytest

from forescale.config.compose import compose
from forescale.config.duration import Duration
from forescale.config.generate import GenerateJob
from forescale.config.schema import ConfigError
from forescale.config.sections.engine import EngineConfig
from forescale.config.train import TrainJob
from forescale.verbs.shards import ShardsJob


def problems(*overrides, schema=TrainJob):
    """key -> what is wrong and what to do, of a config that is refused."""
    with pytest.raises(ConfigError) as caught:
        compose(schema, overrides)
    return {p.key: f"{p.problem}; {p.todo}" for p in caught.value.problems}


def test_lengths_of_a_run():
    job = compose(TrainJob, ["train.tokens=5e6"])
    assert job.tokens_per_step == 8 * 256
    assert job.total_steps == 2442  # 2441.4 rounded up: never silently fewer tokens
    assert job.steps_of(Duration(10, "percent")) == 245
    assert job.steps_of(Duration(30 * 60, "seconds")) is None
    assert compose(TrainJob, ["train.steps=300"]).total_steps == 300


ALONE = "launch.processes=1"
EXPERTS = ["model.mlp=moe", "engine.expert_parallel=2"]
SCATTER = "zero_optimization.reduce_scatter"
NO_SCATTER = "{zero_optimization: {reduce_scatter: false}}"


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["train.tokens=null"], "train.steps"),
        (["train.seed=1.5"], "train.seed"),
        (["train.tokens=inf"], "train.tokens"),
        (["optimizer.learning_rate=nan"], "optimizer.learning_rate"),
        (["model.bias=yes"], "model.bias"),
        (["train.steps=100", "train.tokens=1e6"], "train.steps"),
        (["train.tokens=100", "schedule.warmup=0"], "train.tokens"),
        (["train.global_batch=10"], "train.global_batch"),
        (["launch.processes=3"], "train.global_batch"),
        (["schedule.warmup=80 %"], "schedule.warmup"),
        (["train.steps=60", "schedule.decay=61"], "schedule.decay"),
        (["schedule.warmup=30 min"], "schedule.warmup"),
        (["schedule.decay=null"], "schedule.decay"),
        (["schedule=cosine", "schedule.decay=10 %"], "schedule.decay"),
        (["schedule.final=1.5"], "schedule.final"),
        (["optimizer.momentum=null"], "optimizer.momentum"),
        (["optimizer=adamw", "optimizer.momentum=0.9"], "optimizer.momentum"),
        (["optimizer.learning_rate=0"], "optimizer.learning_rate"),
        (["engine=zero0", "engine.offload_optimizer=true"], "engine.offload_optimizer"),
        (["engine=zero2", "engine.offload_parameters=true"], "engine.offload_parameters"),
        (["engine.hierarchical_partition=8"], "engine.hierarchical_partition"),
        (
            ["engine=zero3", "engine.hierarchical_partition=2", ALONE],
            "engine.hierarchical_partition",
        ),
        (["engine.quantized_weights=true"], "engine.quantized_weights"),  # needs stage 3, and a GPU
        (["engine=zero3", "engine.quantized_weights=true"], "engine.quantized_weights"),
        (["engine.expert_parallel=2"], "engine.expert_parallel"),  # a dense model
        ([*EXPERTS, "engine=zero3", "engine.hierarchical_partition=2"], "engine.expert_parallel"),
        ([*EXPERTS, "model.mlp.experts=7"], "engine.expert_parallel"),
        ([*EXPERTS, ALONE], "engine.expert_parallel"),
        ([*EXPERTS, f"engine.deepspeed={NO_SCATTER}"], f"engine.deepspeed.{SCATTER}"),
        (["checkpoint.keep=1"], "checkpoint.keep"),
        (["checkpoint.every=0"], "checkpoint.every"),
        (["logging.every=0 min"], "logging.every"),
        (["launch.timeout=100 steps"], "launch.timeout"),
        (["profile.steps=105:100"], "profile.steps"),
        (["profile.steps=9999:10000"], "profile.steps"),
        (["run.name=a/b"], "run.name"),
        (["run.name=.."], "run.name"),
        (["run.from.step=100"], "run.from.step"),
        (["model.num_heads=3"], "model.num_heads"),
        (["model.max_sequence_length=128"], "model.max_sequence_length"),
        (["model._target_=Model"], "model._target_"),
    ],
)
def test_rules(overrides, key):
    refusals = problems(*overrides)
    assert list(refusals) == [key]


def test_the_real_world_size_is_checked_again():
    job = compose(TrainJob, [])
    assert job.problems(world_size=1) == []
    ((key, problem, todo),) = job.problems(world_size=3)
    assert key == "train.global_batch"
    assert "3 ranks" in problem
    assert "multiple of 12" in todo


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"train_batch_size": 8}, "train.global_batch"),
        ({"gradient_clipping": 1.0}, "optimizer.clip"),
        ({"bf16": {"enabled": True}}, "precision"),
        ({"zero_optimization": {"stage": 2}}, "engine.stage"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "engine.offload_parameters"),
        ({"zero_optimization": {"cpu_offload": True}}, "engine.offload_optimizer"),
        ({"bfloat16": {"enabled": False}}, "precision"),
        ({"optimizer": {"type": "AdamW"}}, "the optimizer section"),
        ({"data_types": {"grad_accum_dtype": "fp32"}}, "engine.gradient_dtype"),
    ],
)
def test_deepspeed_s_words_for_our_keys_are_refused(settings, name):
    ((key, _, todo),) = EngineConfig(deepspeed=settings).problems()
    assert key.startswith("deepspeed.")
    assert todo == f"use {name}"


def test_fp16_is_noted():
    assert compose(TrainJob, []).notes() == []
    assert "fp16" in compose(TrainJob, ["precision=fp16"]).notes()[0]


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("FORESCALE_CACHE", str(tmp_path))
    assert compose(TrainJob, []).data.cache_directory == tmp_path
    assert str(compose(TrainJob, ["data.cache=/elsewhere"]).data.cache_directory) == "/elsewhere"


def test_small_verbs():
    job = compose(ShardsJob, ["input=my docs/a,b (1).txt", "output=/data/x", "tokenizer=bytes"])
    assert job.input == ["my docs/a,b (1).txt"]
    assert compose(ShardsJob, ["input=[a, b]", "output=x"]).input == ["a", "b"]
    assert set(problems(schema=ShardsJob)) == {"input", "output"}
    assert set(problems(schema=GenerateJob)) == {"target"}
    job = compose(GenerateJob, ["target=first", "prompt=def f(x, y='${y}'):".replace("$", "\\$")])
    assert job.prompt == "def f(x, y='${y}'):"
    assert job.target == "first"
    for text in ('"a", "b"', "'", "", '"a" + "b"', "1,2", "null", "x = [1, 2", "two\nlines"):
        assert compose(GenerateJob, ["target=first", f"prompt={text}"]).prompt == text
    assert compose(GenerateJob, ["target=first", "prompt='quoted '"]).prompt == "quoted "


def test_torch_stays_out():
    code = (
        "import sys, forescale.config.compose, forescale.config.help, forescale.engine.optim\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_job_made_in_python_can_be_checked():
    from forescale.config.schema import check

    assert {p.key for p in check(TrainJob())} == {"train.steps", "model.depth"}


@pytest.mark.parametrize(
    ("overrides", "warmup"),
    [
        (["train.steps=20"], 2),  # 50 steps, and a decay of 8
        (["train.steps=60"], 6),
        (["train.steps=3"], 1),
        (["train.steps=1"], 0),
        (["train.steps=90", "schedule.warmup=1e6 tokens"], 9),
        (["train.steps=90"], None),
        (["schedule=constant", "train.steps=50"], None),
    ],
)
def test_a_warm_up_that_is_longer_than_the_run_is_shortened_and_said(overrides, warmup):
    job = compose(TrainJob, overrides)
    fitted = job.fitted()
    assert fitted.fitted() == fitted
    assert fitted.notes() == []
    if warmup is None:
        assert fitted == job
        assert job.notes() == []
    else:
        assert fitted.steps_of(fitted.schedule.warmup) == warmup
        assert replace(fitted, schedule=job.schedule) == job
        (note,) = job.notes()
        assert f"doesn't fit in a run of {job.total_steps} steps" in note


MASKED = ["objective=masked", "model.causal=false"]
PAIRS = ["objective=pairs", "objective.separator=|", "train.sequence_length=256"]


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (["objective=masked"], "model.causal", "write model.causal=false"),
        (["model.causal=false"], "model.causal", "objective=masked"),
        (["objective=seq2seq", "model.causal=false"], "model.causal", "objective=masked"),
        ([*MASKED, "objective.hidden=0.95"], "objective.hidden", "at most 1"),
        ([*MASKED, "objective.rate=0"], "objective.rate", "more than 0"),
        (["objective.rate=0.3"], "objective.rate", "of objective=masked or seq2seq"),
        (["objective=seq2seq", "data.document_mask=true"], "data.document_mask", "leave it"),
        (["objective=prefix", "data.document_mask=true"], "data.document_mask", "of prefix"),
        (["objective=prefix", "model.causal=false"], "model.causal", "objective=masked"),
        (["objective.share=0.3"], "objective.share", "of objective=prefix"),
        (["model.encoder_layers=2"], "model.encoder_layers", "seq2seq, prefix or pairs"),
        (["objective=pairs"], "objective.separator", "pairs need one"),
        (["objective.separator=|"], "objective.separator", "of objective=pairs"),
        ([*PAIRS, "objective.source=256"], "objective.source", "at most 255"),
        ([*PAIRS, "data.document_mask=true"], "data.document_mask", "of pairs"),
        ([*PAIRS, "data.packing=best_fit"], "data.packing", "windows"),
        ([*PAIRS, "model.causal=false"], "model.causal", "objective=masked"),
        ([*MASKED, "model.mixer=mingru"], "model.causal", "later ones"),
        ([*MASKED, "data.packing=best_fit"], "data.packing", "windows"),
    ],
)
def test_rules_of_encoders(overrides, key, words):
    refusals = problems(*overrides)
    assert list(refusals) == [key]
    assert words in refusals[key]


UNREAD = {
    "model.num_kv_heads=1 model.mixer=mingru": ("num_kv_heads", "mixer mingru", "mixer=attention"),
    "model.num_kv_heads=1 model.mixer=latent": ("num_kv_heads", "mixer latent", "mixer=attention"),
    "model.num_heads=4 model.mixer=lstm": ("num_heads", "mixer lstm", "mixer=attention"),
    "model.mixer.qk_norm=head model.mixer_pattern=[lstm,mingru]": ("mixer", "mixer_pattern", "one"),
    "model.position=rotary model.mixer=gated_deltanet": ("position", "gated_deltanet", "attention"),
    "model.position.theta=5e5 model.mixer=mingru": ("position", "mixer mingru", "mixer=attention"),
    "model.mixer=latent model.mixer_pattern=[attention]": ("mixer", "beside mixer_pattern", "one"),
    "model.depth=8": ("depth", "num_layers and width", "model=depth"),
}  # fmt: skip


@pytest.mark.parametrize("words", UNREAD)
def test_a_typed_key_without_an_effect_is_refused(words):
    key, problem, todo = UNREAD[words]
    refusals = problems(*words.split(), "model.widht=3")
    assert set(refusals) == {f"model.{key}", "model.widht"}, "with all other problems"
    message, _, remedy = refusals[f"model.{key}"].partition("; ")
    assert message.startswith("has no effect ")
    assert problem in message
    assert todo in remedy


@pytest.mark.parametrize(
    ("words", "key", "kind"),
    [
        ("model.position.theta=5e5 model=gpt2-124m", "position.theta", "rotary"),
        ("model.parametrization.base_width=256", "parametrization.base_width", "mup or completep"),
        ("model.mixer=mingru model.mixer.qk_norm=none", "mixer.qk_norm", "attention"),
        ("model.mlp.chunk=64 model.mlp=moe", "mlp.chunk", "swiglu"),
    ],
)
def test_a_key_of_another_part_is_refused_by_its_name(words, key, kind):
    assert kind in problems(*words.split())[f"model.{key}"]


def test_arguments_are_those_of_the_users_own_objective():
    for word in ("objective.arguments={every: 2}", "objective.arguments.every=2"):
        assert "objective=own" in problems(word, "objective=seq2seq")["objective.arguments"]


@pytest.mark.parametrize(
    "words",
    [
        "model=llama-160m model.position=learned",  # whose file has a theta
        "model.mixer=mingru model.position=none",
        "model.mixer=mingru model.position=learned",
        "model.mixer=mingru model.width=100",  # of no head
        "model.num_kv_heads=1 model.mixer_pattern=[mingru,attention]",
        "model.num_kv_heads=1 model.mixer_pattern=[latent] model.encoder_layers=2 "
        "objective=seq2seq",  # of the attention to the encoder
        "model.parametrization.base_width=128 model.parametrization=mup",
        "model=depth model.depth=2 model.width=64",
    ],
)
def test_a_typed_key_with_an_effect_is_not_refused(words):
    compose(TrainJob, words.split())


def test_a_row_has_room_for_a_span():
    refusals = problems("objective=seq2seq", "train.sequence_length=3")
    assert "give at least 4" in refusals["train.sequence_length"]


@pytest.mark.parametrize(
    ("settings", "key", "problem"),
    [
        ("{zero_optimization: 3}", "zero_optimization", "3 is not a section of settings"),
        ("{zero_optimization: null}", "zero_optimization", "None is not a section of settings"),
        ("{communication_data_type: fp8}", "communication_data_type", "unknown value 'fp8'"),
        ("{pipeline: {stages: 2}}", "pipeline.stages", "is controlled by other keys"),
        (
            "{zero_optimization: {round_robin_gradients: true}}",
            "zero_optimization.round_robin_gradients",
            "does not apply here",
        ),
        (
            "{zero_optimization: {zero_quantized_gradients: true}}",
            "zero_optimization.zero_quantized_gradients",
            "does not apply here",
        ),
    ],
)
def test_settings_that_deepspeed_would_only_refuse_later_are_refused(settings, key, problem):
    refusals = problems(f"engine.deepspeed={settings}")
    assert refusals[f"engine.deepspeed.{key}"].startswith(problem)
