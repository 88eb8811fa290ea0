"""Objectives other than the next token on two real ranks: from a checkpoint they go on to the bit,
and they read the same targets at another stage, world size and micro-batch."""

import pytest

from tests import launching, questions, reversed_words
from tests.matrix import full_only

pytestmark = pytest.mark.distributed

LENGTH = ("train.tokens=null", "train.steps=16", "checkpoint.every=5", "validation.every=16")
LENGTH += ("optimizer.adam_learning_rate=0.004",)  # the default's makes rounding grow in 16 steps
MASKED = ("objective=masked", "model.causal=false", "model.dropout=0.1")
SEQ2SEQ = ("objective=seq2seq", "model.encoder_layers=2", "model.dropout=0.1")
BERT = (*MASKED, "model.head=dense", "model.norm.embedding=true", "model.norm.placement=residual")
BERT += ("model.position=learned", "model.tie_embeddings=true")
T5 = (*SEQ2SEQ, "model.position=relative", "model.tie_embeddings=true")
PREFIX = ("objective=prefix", *SEQ2SEQ[1:])
PAIRS = (*reversed_words.KIND, "model.encoder_layers=2", "train.sequence_length=12")


@pytest.mark.parametrize(
    ("kind", "stage"),
    # BERT is masked too, and T5 is seq2seq.
    [
        pytest.param(MASKED, 1, marks=full_only),
        (BERT, 3),
        pytest.param(SEQ2SEQ, 1, marks=full_only),
        (T5, 3),
        (PREFIX, 1),
        (PAIRS, 1),
        (questions.KIND, 1),
    ],
    ids=["masked-1", "bert-3", "seq2seq-1", "t5-3", "prefix-1", "pairs-1", "responses-1"],
)
def test_they_resume_bit_for_bit(dataset, tmp_path, kind, stage):
    if kind is PAIRS:
        dataset = reversed_words.make_pairs(tmp_path / "words")
    if kind is questions.KIND:
        dataset = questions.make_conversations(tmp_path).path
    command = (f"data.path={dataset}", *LENGTH, *kind, f"engine=zero{stage}")
    command += ("launch.processes=2",)
    whole, again = launching.whole_and_repeated(tmp_path, *command, step=5, cold=kind is T5)
    assert len(whole) == 16
    assert again == whole
    if kind not in (BERT, PAIRS, questions.KIND):
        return
    alone = ("train.micro_batch=8", "launch.processes=1", "engine=zero0")
    launching.train(tmp_path, "run.name=alone", *command[:-2], *alone)
    two, one = (launching.rows(tmp_path / name) for name in ("whole", "alone"))
    for key in ("step", "g0", "g1", "tokens", "tokens_hash"):
        assert [row[key] for row in two] == [row[key] for row in one]
    assert two[-1]["loss"] == pytest.approx(one[-1]["loss"], rel=0.02)
