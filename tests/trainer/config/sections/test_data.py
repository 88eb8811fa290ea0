"""What may be said about the data: every mistake at once, each with its key and the mend."""

import pytest

from tests.trainer.config.test_train import problems

MIXED = ["data=mixture", "data.sources={web: /x, code: /y}"]


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (["data.sources={web: /x}", "data.path=/z"], "data.sources", "remove one of them"),
        (["data=mixture"], "data.sources", "is required"),
        (["data=mixture", "data.sources={web: 3}"], "data.sources.web", "names no dataset"),
        (["data=mixture", "data.sources={a.b: /x}"], "data.sources", "'a.b' isn't a valid name"),
        ([*MIXED, "data.weights={wbe: 1}"], "data.weights.wbe", "data.sources has web"),
        ([*MIXED, "data.weights={web: -1, code: 1}"], "data.weights.web", "-1 isn't a share"),
        ([*MIXED, "data.weights={web: 0, code: 0}"], "data.weights", "are all 0"),
        ([*MIXED, "data.weights={web: 1, code: 1e-9}"], "data.weights.code", "a millionth"),
        ([*MIXED, "data.max_epochs={web: 0}"], "data.max_epochs.web", "positive number of epochs"),
        (["data.max_epochs={web: 1}"], "data.max_epochs.web", "set data.sources"),
        ([*MIXED, "data.stages=[{form: 1}]"], "data.stages[0]", "is not a stage"),
        (
            [*MIXED, "data.stages=[{from: 10 %, weights: {web: 1}}]"],
            "data.stages[0].from",
            "give a positive number of steps or tokens",
        ),
        (
            [*MIXED, "data.stages=[{from: soon, weights: {web: 1}}]"],
            "data.stages[0].from",
            "write it like from: 2e9 tokens",
        ),
        (
            [*MIXED, "data.stages=[{from: 5 steps, weights: {wbe: 1}}]"],
            "data.stages[0].weights.wbe",
            "isn't a source",
        ),
        (["data.workers=65"], "data.workers", "64"),
        (["data.damaged=ignore"], "data.damaged", "substitute"),
    ],
)
def test_mistakes(overrides, key, words):
    assert words in problems(*overrides)[key]


def test_all_mistakes_at_once():
    stages = "data.stages=[{from: 5 steps, weights: {wbe: 1}}]"
    keys = problems(*MIXED, "data.weights={cod: 1}", stages, "data.max_epochs={web: x}")
    assert {"data.weights.cod", "data.stages[0].weights.wbe", "data.max_epochs.web"} <= set(keys)


@pytest.mark.parametrize("second", ["5 steps", "3 steps", "4e3 tokens"])
def test_stages_follow_on_each_other(second):
    """In whatever unit: 5 steps are 10,240 tokens here."""
    weights = "weights: {web: 1}"
    stages = f"data.stages=[{{from: 5 steps, {weights}}}, {{from: {second}, {weights}}}]"
    assert "choose a later start" in problems(*MIXED, stages)["data.stages[1].from"]
