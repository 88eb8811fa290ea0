"""Abilities measured and texts written while several ranks train: those of one rank, however the
model is divided."""

import pytest

from tests import launching

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

COMMON = ("train.tokens=null", "train.steps=6", "validation.every=3", "precision=fp32",
          "validation.abilities=[copy,recall]", "validation.shots=[0]",
          "validation.questions=9", "validation.prompts=[def]",
          "validation.prompt_tokens=6",
          # Weights that prefer some tokens and hardly change: else two tokens would be as likely,
          # and the order of sums in training would choose between them.
          "model.init_std=0.3", "optimizer.learning_rate=1e-7",
          "optimizer.adam_learning_rate=1e-7")  # fmt: skip
DIVIDED = {
    "stage 3": ("engine.stage=3",),
    "sequence": ("engine.sequence_parallel=2",),
    "ring": ("engine.context_parallel=2",),
    "tensor": ("engine.tensor_parallel=2",),
    "experts": ("engine.expert_parallel=2", "model.mlp=moe", "model.mlp.expert_width=32"),
}


@pytest.fixture(scope="module")
def measured(dataset, tmp_path_factory):
    """A function of words to the abilities and the text of each evaluation; equal words train
    once."""
    folder, known = tmp_path_factory.mktemp("runs"), {}

    def run(*words):
        if words not in known:
            name = f"run{len(known)}"
            launching.train(folder, f"run.name={name}", f"data.path={dataset}", *COMMON, *words)
            rows = launching.rows(folder / name, "validation")
            assert [row["step"] for row in rows] == [3, 6]
            abilities = [{k: x for k, x in r.items() if "ability/" in k} for r in rows]
            known[words] = abilities, launching.texts(folder / name)
        return known[words]

    return run


@pytest.mark.parametrize("kind", DIVIDED)
def test_ranks_that_divide_a_model_measure_what_one_rank_does(measured, kind):
    alone, text = measured(*(word for word in DIVIDED[kind] if word.startswith("model.")))
    two, text_of_two = measured(*DIVIDED[kind], "launch.processes=2")
    assert len(alone[0]) == 8
    assert two[0] == pytest.approx(alone[0], rel=1e-4)
    assert two[1] == pytest.approx(alone[1], rel=1e-3)
    assert text_of_two == text
