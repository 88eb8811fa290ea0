"""Bits per byte: against a plain computation from the text itself, and at any world size."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

from forescale.data.dataset import Dataset
from forescale.data.prepare.builder import BuildConfig, build_dataset
from forescale.data.text.files import Files
from forescale.train.evaluate import Score, evaluate, pooled
from tests.trainer.plain_engine import on_all, worlds

LENGTH = 16


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Several validation shards, so that windows end short at more than one place."""
    folder = tmp_path_factory.mktemp("scored")
    for i in range(30):
        (folder / f"{i:02}.py").write_text(f"x = 'naïve {i}'\n" * (3 + i % 5) + "# 数据\n")
    config = BuildConfig(vocab_size=280, validation=0.4, shard_tokens=211, member_tokens=100)
    built = tmp_path_factory.mktemp("built") / "data"
    return Dataset(build_dataset(Files([folder]), built, config))


def surprise(previous, token):
    """Nats of a token after another: any fixed function will do as a model."""
    return 0.5 + ((previous * 31 + token * 17) % 97) / 10


def losses(micro):
    tokens, targets = micro.tokens, micro.targets
    nats = surprise(tokens.double(), targets.double())
    return (nats * (targets != -100)).sum(1).float()


def score(dataset, **options):
    split = dataset.split("validation")
    settings = {"sequence_length": LENGTH, "micro_batch": 3} | options
    return evaluate(losses, split, dataset.token_bytes, **settings)


def score_on_ranks(dataset, size, **options):
    """The score that each of `size` ranks gets, in a thread each."""
    return on_all(worlds(size), lambda ranks: score(dataset, ranks=ranks, **options))


def test_it_tells_at_every_micro_batch_that_it_lives_and_then_that_it_waits(dataset):
    """The watchdog blames a rank that hangs in a micro-batch, and not those that wait for it."""
    marks, scored = [], []

    def noted(micro):
        scored.append(marks[-1])
        return losses(micro)

    split = dataset.split("validation")
    settings = {"sequence_length": LENGTH, "micro_batch": 3, "mark": marks.append}
    evaluate(noted, split, dataset.token_bytes, **settings)
    assert len(scored) > 5
    assert scored == ["evaluation"] * len(scored)
    assert marks == [*scored, "summary"]


def windows(dataset):
    """(nats, targets, bytes) of each window, token by token, from the text of each."""
    split, rows = dataset.split("validation"), []
    for shard, size in enumerate(split.shard_tokens):
        tokens = [int(t) for t in split.read(shard, 0, size)]
        for start in range(0, size - 1, LENGTH):
            pairs = list(zip(tokens[start:], tokens[start + 1 : start + LENGTH + 1], strict=False))
            # A token may hold part of a character: its bytes are those of the tokenizer's alphabet.
            count = sum(0 if t == dataset.end_of_text else _bytes(dataset, t) for _, t in pairs)
            rows.append((sum(surprise(p, t) for p, t in pairs), len(pairs), count))
    return rows


def _bytes(dataset, token):
    return len(dataset.tokenizer.id_to_token(token))  # one letter of the alphabet a byte


def test_its_standard_error_is_that_of_resampled_windows(dataset):
    nats, targets, _ = np.array(windows(dataset)).T
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(nats), (20_000, len(nats)))
    resampled = (nats[picks].sum(1) / targets[picks].sum(1)).std()
    assert score(dataset).loss_stderr == pytest.approx(resampled, rel=0.1)


@pytest.mark.parametrize("limit", [None, 1, 7])
@pytest.mark.parametrize("size", [2, 3])
def test_it_is_equal_to_the_bit_at_any_world_size(dataset, size, limit):
    alone = asdict(score(dataset, windows=limit))
    for result in score_on_ranks(dataset, size, windows=limit):
        assert repr(asdict(result)) == repr(alone)


def test_it_is_the_same_at_any_micro_batch(dataset):
    assert score(dataset, micro_batch=1) == score(dataset, micro_batch=1000)


def test_a_limit_takes_windows_from_the_whole_split(dataset):
    every = windows(dataset)
    nats, targets, _ = np.array([every[i * len(every) // 5] for i in range(5)]).T
    result = score(dataset, windows=5)
    assert (result.windows, result.targets) == (5, targets.sum())
    assert result.loss == pytest.approx(nats.sum() / targets.sum(), rel=1e-6)
    alone = score(dataset, windows=1)
    assert math.isnan(alone.loss_stderr)
    assert "nan" not in alone.text()


def test_an_empty_split_gives_nan_over_no_windows(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.py").write_text("x = 1\n" * 99)
    (text / "b.py").write_text("y = 2\n" * 99)
    built = build_dataset(Files([text]), tmp_path / "d", BuildConfig(vocab_size=260, validation=0))
    result = score(Dataset(built))
    assert (result.windows, result.targets, result.bytes) == (0, 0, 0)
    assert math.isnan(result.loss)


def test_pooled_equals_the_score_of_one_split_of_both(dataset):
    split = dataset.split("validation")
    whole = score(dataset)
    assert pooled([whole]) == whole
    both = pooled([whole, whole])
    assert (both.targets, both.bytes, both.windows) == (
        2 * whole.targets,
        2 * whole.bytes,
        2 * whole.windows,
    )
    assert both.loss == pytest.approx(whole.loss)
    assert both.bits_per_byte == pytest.approx(whole.bits_per_byte)
    assert both.loss_stderr == pytest.approx(whole.loss_stderr / math.sqrt(2))
    assert split.num_tokens > whole.targets
    nothing = Score(math.nan, math.nan, math.nan, 0, 0, 0)
    assert pooled([nothing, whole]) == whole
    assert pooled([nothing]).windows == 0


def test_all_ranks_make_the_same_number_of_calls(dataset):
    """At ZeRO-3 each call gathers weights: a rank with one call less would hang the others."""

    def calls_of(ranks):
        calls = []

        def counted(micro):
            calls.append(micro)
            assert micro.tokens.shape == micro.targets.shape == (3, LENGTH)
            return torch.zeros(3)

        split, bytes_ = dataset.split("validation"), dataset.token_bytes
        evaluate(counted, split, bytes_, sequence_length=LENGTH, micro_batch=3, ranks=ranks)
        return len(calls)

    first, *others = on_all(worlds(3), calls_of)
    assert first > 0
    assert others == [first, first]
