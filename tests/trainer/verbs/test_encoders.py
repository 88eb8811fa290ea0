"""What the verbs do with a run of masked tokens or spans, and what they say that they can't."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from forescale import open_dataset, open_run
from forescale.config.compose import compose
from forescale.data.objective import IGNORED, window_length
from forescale.data.objectives.masked import MaskedTokens
from forescale.ground.errors import UserError
from forescale.run.feed import feed_of, objective_of
from forescale.run.start import open_sources, settle
from forescale.scaling.config import StudyJob
from forescale.scaling.design.planning import common_of
from forescale.scaling.records.records import Refused, record
from forescale.train.model import build_model
from tests.trainer.small_run import LENGTH, make_job, make_run

ENCODER = ["model.num_layers=1", "model.width=32", "model.num_heads=2"]
ENCODER += ["objective=masked", "model.causal=false"]


@pytest.fixture(scope="module")
def encoder(small_data, tmp_path_factory):
    return make_run(small_data, tmp_path_factory.mktemp("encoders"), "encoder", *ENCODER)


def test_the_mask_token_is_the_id_beyond_the_vocabulary(encoder, small_data, tmp_path):
    view, dataset = open_run(encoder.path), open_dataset(small_data)
    assert view.config.model.vocab_size == dataset.vocab_size + 1
    objective = objective_of(view.config, dataset.vocab_size)
    assert objective.mask_token == dataset.vocab_size
    roomy = make_job(small_data, tmp_path, "roomy", *ENCODER, "model.vocab_size=512")
    assert settle(roomy, open_sources(roomy.data)).model.vocab_size == 512
    tight = make_job(small_data, tmp_path, "t", *ENCODER, f"model.vocab_size={dataset.vocab_size}")
    with pytest.raises(UserError, match=r"model\.vocab_size.*tokenizer and objective"):
        settle(tight, open_sources(tight.data))


def test_eval_scores_the_fixed_masks(encoder, small_data, forescale):
    dataset, model = open_dataset(small_data), open_run(encoder.path).model()
    split, objective = (
        dataset.split("validation"),
        MaskedTokens(dataset.vocab_size, seed=0, sequence_length=LENGTH),
    )
    nats = targets = size = number = 0
    for shard, tokens in enumerate(split.shard_tokens):
        for start in range(0, tokens - 1, LENGTH):
            text = split.read(shard, start, min(LENGTH + 1, tokens - start))[None]
            counts, numbers = np.array([text.shape[1]]), np.array([number])
            pair = torch.from_numpy(objective.examples(text, counts, numbers))
            with torch.no_grad():  # a window alone, without padding
                logits = model(pair[0])
            nats += F.cross_entropy(logits[0], pair[1, 0], reduction="sum").item()
            real = pair[1, 0][pair[1, 0] != IGNORED]
            targets, number = targets + len(real), number + 1
            size += int(dataset.token_bytes[real].sum())
    out = forescale.prints("eval", encoder.path, "micro_batch=3")
    assert re.search(rf"  masked tokens +{targets:,}\n", out)
    assert float(re.search(r"loss +([\d.]+)", out)[1]) == pytest.approx(nats / targets, abs=1e-4)
    bits = re.search(r"bits per byte +([\d.]+) of masked tokens; not comparable", out)[1]
    assert float(bits) == pytest.approx(nats / math.log(2) / size, abs=1e-4)
    assert "pseudo-perplexity" in out
    assert "the model needs" not in out, "a compressor codes every byte"


def test_eval_at_another_length_has_no_table_by_position(encoder, forescale):
    out = forescale.prints("eval", encoder.path, "sequence_length=64", "rope_scaling=yarn")
    assert "No loss by position: a target here is predicted from both sides" in out
    assert "nats a token\n" in out


def test_an_encoder_writes_no_text_but_goes_out_with_its_code(encoder, tmp_path, forescale):
    err = forescale.refuses("generate", encoder.path)
    assert "objective=masked, and continues no text" in err
    assert "as ForescaleForMaskedLM" in forescale.prints("export", encoder.path, f"to={tmp_path}/x")


def test_no_study_of_it(encoder):
    words = ["data=bytes", "objective=masked", "model.causal=false"]
    shared = f"plan.arguments={words}"
    with pytest.raises(UserError, match="other targets than each next token"):
        common_of(compose(StudyJob, ["input=[none]", shared]))
    assert isinstance(record(encoder), Refused)


def test_held_out_masks_are_those_of_every_seed(small_data, tmp_path):
    tokens = np.arange(65, dtype=np.uint16)[None]
    calls = []
    for seed in (1, 2):
        job = make_job(small_data, tmp_path, "a", *ENCODER, f"train.seed={seed}")
        for held_out in (False, True):
            objective = objective_of(job, 300, held_out)
            calls.append(objective.examples(tokens, np.array([65]), np.array([9]))[1])
    assert np.array_equal(calls[1], calls[3])
    assert not np.array_equal(calls[0], calls[2])


class Seeing:
    """An objective of a user's own that says nothing of padding."""

    def num_targets(self, sizes):
        return np.asarray(sizes) - 1


def test_an_own_objective_of_an_encoder_must_hide_padding(small_data, tmp_path):
    options = [*ENCODER[:3], "model.causal=false", "objective=own"]
    job = make_job(small_data, tmp_path, "a", *options, f"objective._target_={__name__}.Seeing")
    with pytest.raises(UserError, match="a method padding_mask"):
        feed_of(job, open_sources(job.data))


class OwnModel(torch.nn.Module):
    """A model of a user's own."""

    def __init__(self, vocab_size):
        super().__init__()
        self.table = torch.nn.Embedding(vocab_size, 4)


def test_a_model_of_a_user_s_own_gets_room_for_the_mask_token(small_data, tmp_path):
    words = ["objective=masked", f"model._target_={__name__}.OwnModel"]
    job = make_job(small_data, tmp_path, "own", *words)
    assert build_model(job, 300).table.num_embeddings == 301


SPANS = [*ENCODER[:3], "objective=seq2seq"]


@pytest.fixture(scope="module")
def spans(small_data, tmp_path_factory):
    return make_run(small_data, tmp_path_factory.mktemp("spans"), "spans", *SPANS)


def test_spans_have_rows_of_the_sequence_length_and_room_for_sentinels(spans, small_data):
    view, dataset = open_run(spans.path), open_dataset(small_data)
    job = view.config
    objective = objective_of(job, dataset.vocab_size)
    assert job.model.vocab_size == dataset.vocab_size + objective.extra_ids
    feed = feed_of(job, open_sources(job.data))
    assert feed.mixture.sequence_length == objective.window_length < LENGTH
    samples = feed.read([(0, 4)])
    assert objective.examples(samples.tokens, samples.sizes, samples.numbers).shape[2] == LENGTH


def test_eval_scores_the_spans_of_the_whole_split(spans, small_data, forescale):
    dataset = open_dataset(small_data)
    objective = objective_of(open_run(spans.path).config, dataset.vocab_size, held_out=True)
    length, count = objective.window_length, 0
    for size in dataset.split("validation").shard_tokens:
        starts = np.arange(0, size - 1, length)
        count += objective.num_targets(np.minimum(length + 1, size - starts)).sum()
    assert "not only a decoder" in forescale.refuses("inspect", spans.path, "text=def main")
    out = forescale.prints("eval", spans.path, "micro_batch=3")
    assert re.search(rf"  tokens of spans +{count:,}\n", out)
    assert "pseudo" not in out
    assert "the model needs" not in out
    assert "rows of seq2seq" in forescale.refuses("eval", spans.path, "sequence_length=64")
    assert forescale("check", spans.path)[0] == 0


@pytest.mark.parametrize("words", [SPANS, [*ENCODER[:3], "objective=prefix"]])
def test_an_encoder_decoder_splits_its_rows_where_the_objective_does(
    small_data, tmp_path, forescale, words
):
    run = make_run(small_data, tmp_path / "runs", "both", *words, "model.encoder_layers=2")
    view, dataset = open_run(run.path), open_dataset(small_data)
    objective = objective_of(view.config, dataset.vocab_size, held_out=True)
    assert view.config.model.source_length == objective.split
    model, split = view.model(), dataset.split("validation")
    length, nats, targets, number = window_length(objective, LENGTH), 0.0, 0, 0
    for shard, tokens in enumerate(split.shard_tokens):
        for start in range(0, tokens - 1, length):
            size = min(length + 1, tokens - start)
            text = np.zeros((1, length + 1), split.dtype)
            text[0, :size] = split.read(shard, start, size)
            sizes, numbers = np.array([size]), np.array([number])
            inputs, expected = torch.from_numpy(objective.examples(text, sizes, numbers))
            real = objective.padding_mask(sizes)
            mask = None if real is None else torch.from_numpy(real)
            with torch.no_grad():
                nats += model(inputs, expected, mask).item()
            targets, number = targets + int((expected != IGNORED).sum()), number + 1
    out = forescale.prints("eval", run.path, "micro_batch=5")
    assert float(re.search(r"loss +([\d.]+)", out)[1]) == pytest.approx(nats / targets, abs=1e-4)
    assert forescale("plan", run.path)[0] == 0
    assert forescale("check", run.path)[0] == 0
    err = forescale.refuses("eval", run.path, "sequence_length=64")
    assert f"rows of {view.config.objective.kind} have the length" in err
    assert "position=relative (not rotary)" in forescale.refuses("export", run.path)


def test_another_split_than_the_objective_s_is_refused(small_data, tmp_path):
    words = [*SPANS, "model.encoder_layers=2", "model.source_length=5"]
    job = make_job(small_data, tmp_path, "other", *words)
    with pytest.raises(UserError, match=r"model\.source_length.* columns"):
        settle(job, open_sources(job.data))
