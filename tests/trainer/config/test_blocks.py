"""Sections whose keys follow from their kind: what is typed, what lies below, what is refused."""

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import pytest

from forescale.config.compose import compose
from forescale.config.frozen import diff, freeze, thaw
from forescale.config.job import Job
from forescale.config.layers import lay, over_frozen
from forescale.config.schema import ConfigError, block, key, leaves, plain, section
from forescale.config.train import TrainJob
from tests.trainer.config.test_train import problems


@dataclass
class Mixer:
    heads: int = 4  # number of heads


@dataclass
class Attention(Mixer):
    pass


@dataclass
class Window(Mixer):
    window: int = key(8, ge=1)  # tokens that a token sees


@dataclass
class Lstm:
    size: int = key(3, kind="numerics")  # width of the state


MIXERS = {"attention": Attention, "window": Window, "lstm": Lstm}


@dataclass
class Sizes:
    width: int = 2  # width
    mixer: Mixer | Lstm = block(MIXERS, Attention)  # how tokens exchange information
    pattern: list[Mixer | Lstm] = field(default_factory=list, metadata={"kinds": lambda: MIXERS})


@dataclass
class BlockJob(Job):
    VERB: ClassVar[str] = "blocks"

    run: dict = key({})  # a run
    model: Sizes = section(Sizes, kind="identity")  # the model


def mixer(*words: str):
    return compose(BlockJob, [f"model.{word}" for word in words]).model.mixer


refusals = partial(problems, schema=BlockJob)


def test_a_word_is_short_for_a_kind_and_its_keys_follow_in_any_order():
    assert mixer() == Attention()
    assert mixer("mixer=window") == Window()
    for words in (
        ["mixer=window", "mixer.window=5"],
        ["mixer.window=5", "mixer=window"],
        ["mixer.kind=window", "mixer.window=5"],
        ["mixer={kind: window, window: 5}"],
        ["mixer={kind: window}", "mixer.window=5"],
    ):
        assert mixer(*words) == Window(window=5), words
    job = compose(BlockJob, ["model={width: 3, mixer: lstm}"])
    assert (job.model.width, job.model.mixer) == (3, Lstm())


def test_a_list_has_words_and_blocks():
    job = compose(BlockJob, ["model.pattern=[lstm,{kind: window, window: 5},attention]"])
    assert job.model.pattern == [Lstm(), Window(window=5), Attention()]
    assert thaw(BlockJob, freeze(job)) == job


def test_all_problems_of_blocks_at_once():
    problems = refusals(
        "model.width=x",
        "model.mixer=windw",
        "model.mixer.haeds=3",
        "model.pattern=[windw,{kind: window, window: 0},{size: 3},5,{kind: lstm, heads: 1}]",
    )
    for path, words in {
        "model.width": "whole number",
        "model.mixer": "'windw' is not one of window, attention, lstm",
        "model.mixer.haeds": "did you mean model.mixer.heads",
        "model.pattern.0": "not one of window",
        "model.pattern.1.window": "at least 1",
        "model.pattern.2": "not one of",
        "model.pattern.3": "5 is not one of",
        "model.pattern.4.heads": "is a key of kind=attention or window",
    }.items():
        assert words in problems.pop(path)
    assert not problems


@pytest.mark.parametrize("word", ["5", "null", "[1]", "{kind: [1]}", "{kind: null}", "''"])
def test_no_kind_at_all(word):
    assert "is not one of" in refusals(f"model.mixer={word}")["model.mixer"]


def test_a_key_of_another_kind_is_refused_by_its_name():
    problems = refusals("model.mixer.window=5")
    assert problems == {
        "model.mixer.window": "is a key of mixer=window, and this is attention; "
        "write model.mixer=window, or leave the key out"
    }
    assert (
        "mixer=attention or window"
        in refusals("model.mixer=lstm", "model.mixer.heads=2").popitem()[1]
    )
    frozen = freeze(BlockJob()).replace("kind: attention", "kind: lstm")
    with pytest.raises(ConfigError, match=r"model\.mixer\.heads: is a key of"):
        thaw(BlockJob, frozen)


def test_of_another_kind_below_only_keys_of_a_common_base_stay():
    below = {"model": {"mixer": {"kind": "window", "window": 5, "heads": 2}}}
    for kind, rest in (
        ("window", {"window": 5, "heads": 2}),
        ("attention", {"heads": 2}),
        ("lstm", {}),
    ):
        tree = lay(BlockJob, below, {"model": {"mixer": kind}})
        assert tree == {"model": {"mixer": {"kind": kind, **rest}}}
    tree = lay(BlockJob, {"model": {"mixer": "lstm"}}, {"model": {"mixer": {"size": 1}}})
    assert tree == {"model": {"mixer": {"kind": "lstm", "size": 1}}}


def test_over_a_frozen_run():
    """The other keys of the run stay; those of another kind fall away."""
    run = plain(compose(BlockJob, ["model.width=7", "model.mixer=window", "model.mixer.heads=2"]))

    def model(*paths: str, **values):
        return over_frozen(BlockJob, {"model": values}, run, paths)["model"]

    assert model("model.mixer.window", mixer={"window": 3})["mixer"] == {
        "kind": "window",
        "heads": 2,
        "window": 3,
    }
    changed = model("model.mixer.kind", mixer={"kind": "attention"})
    assert changed == {"width": 7, "mixer": {"kind": "attention", "heads": 2}, "pattern": []}


def test_an_empty_section_replaces_nothing_of_a_frozen_run():
    run = compose(TrainJob, ["run.name=a", "model=depth", "model.depth=3"])
    words = ["run.name=a", "model={}", "model.mixer={}"]
    assert compose(TrainJob, words, find=lambda _: plain(run)).model == run.model


def test_the_keys_of_a_job_are_those_of_its_kinds():
    assert [path for path in leaves(BlockJob) if "mixer" in path] == [
        "model.mixer.kind",
        "model.mixer.heads",
        "model.mixer.window",
        "model.mixer.size",
    ]
    job = compose(BlockJob, ["model.mixer=lstm"])
    assert [path for path in leaves(BlockJob, job=job) if "mixer" in path] == [
        "model.mixer.kind",
        "model.mixer.size",
    ]
    changes = {change.key: change.kind for change in diff(BlockJob(), job)}
    assert changes == {
        "model.mixer.kind": "identity",
        "model.mixer.size": "numerics",
        "model.mixer.heads": "identity",
    }


@pytest.mark.parametrize(
    "words",
    [
        ("model.norm=layernorm", "model.norm={eps: 1e-3}"),
        ("model.norm={eps: 1e-3}", "model.norm=layernorm"),
        ("model.norm=layernorm", "model={norm: {eps: 1e-3}}"),
        ("model={norm: {eps: 1e-3}}", "model={norm: layernorm}"),
        ("model={norm: layernorm}", "model={norm: {eps: 1e-3}}"),
    ],
)
def test_a_word_and_a_mapping_of_one_block_hold_both(words):
    norm = plain(compose(TrainJob, words))["model"]["norm"]
    assert (norm["kind"], norm["eps"]) == ("layernorm", 1e-3)


def test_the_last_of_repeated_keys_counts_and_null_is_no_list_of_blocks():
    job = compose(TrainJob, ["data={shuffle_shards: 3, workers: 2}", "data={workers: 4}"])
    assert (job.data.shuffle_shards, job.data.workers) == (3, 4)
    with pytest.raises(ConfigError, match=r"mixer_pattern: .*null.*mixer_pattern=\[\]"):
        compose(TrainJob, ["model.mixer_pattern=null"])


@pytest.mark.parametrize(
    ("item", "advice"),
    [
        ("{kind: window, windo: 3}", "did you mean window?"),
        ("{kind: window, rank: 3}", "write kind: latent, or"),
        ("{kind: attention, qk_norm: x}", "write, for example, qk_norm: head."),
        ("attentoin", "write, for example, attention."),
    ],
)
def test_an_item_of_a_list_is_advised_what_can_be_written_in_it(item, advice):
    with pytest.raises(ConfigError) as caught:
        compose(TrainJob, [f"model.mixer_pattern=[attention,{item}]"])
    lines = str(caught.value).splitlines()
    assert any("mixer_pattern.1" in line and advice in line for line in lines), lines
    assert not any(".1" in line.partition(": ")[2] for line in lines), "no key has a number"
