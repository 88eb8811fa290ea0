"""A model beyond the length of its training: its loss by position, and its scaled positions."""

import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from forescale import open_dataset, open_run
from forescale.ground.errors import UserError
from forescale.inference.scoring import at_length, edges_of, loss_by_position, score
from forescale.models import ModelConfig, Transformer
from forescale.models.positions.kinds import Ntk, Rotary, Yarn
from tests.trainer.small_run import LENGTH, make_run

CONFIG = ModelConfig(num_layers=1, width=32, num_heads=2, vocab_size=50, max_sequence_length=16)


def test_buckets_double_from_a_quarter_of_the_trained_length():
    assert edges_of(1024, 256) == [0, 64, 128, 256, 512, 1024]
    assert edges_of(700, 256) == [0, 64, 128, 256, 512, 700]
    assert edges_of(100, 256) == [0, 64, 100]
    assert edges_of(4, 1) == [0, 1, 2, 4]


@pytest.fixture(scope="module")
def read(trained):
    view = open_run(trained.path)
    return view.model(), open_dataset(view.identity["dataset"]["path"])


def test_each_token_counts_at_its_position(read):
    model, dataset = read
    part = dataset.split("validation")
    buckets = loss_by_position(
        model, dataset, "validation", sequence_length=100, edges=[0, 1, 32, 64, 100]
    )
    nats = [[] for _ in range(100)]
    for shard, size in enumerate(part.shard_tokens):
        tokens = torch.from_numpy(part.read(shard, 0, size).astype("int64"))
        for start in range(0, size - 1, 100):
            window = tokens[start : start + 101]
            with torch.no_grad():
                logits = model(window[None, :-1])[0]
            for position, value in enumerate(F.cross_entropy(logits, window[1:], reduction="none")):
                nats[position].append(value.item())
    for bucket in buckets:
        expected = [n for of in nats[bucket.first : bucket.last + 1] for n in of]
        assert bucket.targets == len(expected)
        assert bucket.loss == pytest.approx(math.fsum(expected) / len(expected), rel=1e-5)
    assert [(b.first, b.last) for b in buckets] == [(0, 0), (1, 31), (32, 63), (64, 99)]


@pytest.mark.parametrize("documents", [False, True])
def test_buckets_add_up_to_the_score(read, documents):
    model, dataset = read
    options = dict(sequence_length=100, windows=5, documents=documents)
    buckets = loss_by_position(model, dataset, "validation", edges=[0, 10, 50, 100], **options)
    whole = score(model, dataset, "validation", micro_batch=2, **options)
    assert sum(b.targets for b in buckets) == whole.targets
    nats = sum(b.loss * b.targets for b in buckets if b.targets)
    assert nats / whole.targets == pytest.approx(whole.loss, rel=1e-5)


def test_positions_begin_anew_with_each_document(read):
    """The first token of each document of a window is at position 0."""
    model, dataset = read
    options = dict(sequence_length=400, edges=[0, 1, 400])
    first, _ = loss_by_position(model, dataset, "validation", documents=True, **options)
    only, _ = loss_by_position(model, dataset, "validation", documents=False, **options)
    assert first.targets > only.targets > 0


@pytest.mark.parametrize("scaling", ["ntk", "yarn"])
def test_a_scaled_model_is_one_of_that_config_with_the_same_weights(scaling):
    torch.manual_seed(0)
    model, tokens = Transformer(CONFIG).eval(), torch.randint(0, 50, (1, 64))
    longer = at_length(model, 64, 16, scaling)
    by = Yarn(4.0, 16) if scaling == "yarn" else Ntk(4.0)
    expected = Transformer(replace(CONFIG, position=Rotary(scaling=by))).eval()
    expected.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(longer(tokens), expected(tokens))
        assert not torch.allclose(longer(tokens), model(tokens), atol=1e-3)
    assert not longer.training


def test_without_scaling_the_model_is_the_same_object():
    model = Transformer(replace(CONFIG, position="alibi"))
    assert at_length(model, 64, 16, None) is model


@pytest.mark.parametrize(
    ("change", "length", "scaling", "message"),
    [
        ({"position": "learned"}, 64, None, "give at most 16"),
        ({"position": "alibi"}, 64, "yarn", "trained with alibi"),
        ({"position": Rotary(scaling=Ntk(2.0))}, 64, "yarn", "trained with ntk"),
        ({}, 16, "ntk", "nothing to scale"),
    ],
)
def test_what_cannot_be_lengthened_is_refused(change, length, scaling, message):
    with pytest.raises(UserError, match=message):
        at_length(Transformer(replace(CONFIG, **change)), length, 16, scaling)


def test_a_class_of_the_users_own_is_not_scaled():
    with pytest.raises(UserError, match="forescale's own model"):
        at_length(torch.nn.Linear(1, 1), 64, 16, "yarn")


def test_eval_prints_the_table_for_a_longer_window(small_data, tmp_path, forescale):
    sizes = ["model.num_layers=1", "model.width=32", "model.num_heads=2"]
    run = make_run(small_data, tmp_path / "runs", "a", *sizes)
    words = [f"sequence_length={4 * LENGTH}", "windows=3"]
    plain = forescale.prints("eval", run.path, *words)
    rows = re.findall(r"^ +([\d,]+) to ([\d,]+) +[\d.]+ ± [\d.]+ +([\d,]+)$", plain, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [0, 8, 16, 32, 64]
    assert rows[-1][1] == "127"
    assert "trained in windows of 32)" in plain
    scaled = forescale.prints("eval", run.path, *words, "rope_scaling=yarn")
    assert "scaled by yarn to 4 times" in scaled
    assert "Loss by position" not in forescale("eval", run.path, "windows=3")[1]
    err = forescale.refuses("eval", run.path, "rope_scaling=yarn")
    assert "give sequence_length above 32" in err
