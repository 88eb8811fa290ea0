"""Span corruption: source and target rebuild the window, and lie where the window's length says."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forescale.data.dataset import Dataset
from forescale.data.objective import IGNORED
from forescale.data.objectives.spans import Spans
from forescale.data.stream import validation_windows

V = 257


def rebuilt(inputs, real, split, vocab=V):
    """The window's tokens, from source and target, as a reader of the row would put them."""
    source, decoder = inputs[:split][real[:split]], inputs[split:][real[split:]]
    spans, key = {}, None
    for token in decoder.tolist():
        if token >= vocab:
            key = token
            spans[key] = []
        else:
            spans[key].append(token)
    tokens_of_window = []
    for token in source.tolist():
        tokens_of_window += spans.pop(token) if token >= vocab else [token]
    assert not spans
    return tokens_of_window


@given(
    columns=st.integers(4, 200),
    share=st.floats(0, 1),
    rate=st.floats(0.02, 0.95),
    mean=st.floats(1, 9),
    number=st.integers(0, 10**12),
)
def test_a_row_rebuilds_its_window(columns, share, rate, mean, number):
    objective = Spans(V, 3, columns, rate, mean)
    longest = objective.window_length
    size = 2 + round(share * (longest - 1))
    text = np.random.default_rng(number).integers(0, V, (1, longest + 1)).astype("<u2")
    text[0, size:] = 0
    sizes = np.array([size])
    inputs, targets = (x[0] for x in objective.examples(text, sizes, np.array([number])))
    assert inputs.shape == targets.shape == (columns,)
    mask = objective.padding_mask(sizes)
    assert (mask is None) == (size == longest + 1)
    split, count = objective.split, int(objective.num_targets(sizes)[0])
    real = targets != IGNORED
    assert real.sum() == count
    assert not real[:split].any()
    assert real[split : split + count].all()
    if mask is not None:
        assert np.array_equal(mask[0, split:], real[split:])
        real = mask[0]
    else:
        real[:split] = True
    if size == 2:  # one token is too few for a span and a rest
        assert count == 0
        return
    assert rebuilt(inputs, real, split) == text[0, : size - 1].tolist()
    decoder = inputs[split : split + count]
    assert decoder[0] == V
    assert targets[split : split + count - 1].tolist() == decoder[1:].tolist()
    ends = targets[split + count - 1]
    assert ends == decoder.max() + 1 < V + objective.extra_ids, "the next sentinel ends it"


@pytest.mark.parametrize(("rate", "mean"), [(0.15, 3.0), (0.5, 8.0)])
def test_counts_are_those_of_t5_and_a_full_row_has_at_most_two_columns_left(rate, mean):
    for columns in (16, 100, 512, 2048):
        objective = Spans(V, 0, columns, rate, mean)
        n = objective.window_length
        noise = min(max(round(n * rate), 1), n - 1)  # lines of T5's random_spans_noise_mask
        spans = max(round(noise / mean), 1)
        assert objective.num_targets(np.array([n + 1])) == noise + spans
        assert objective.split == n - noise + spans
        assert columns - 2 <= n + 2 * spans <= columns
        assert objective.extra_ids == spans + 1
    assert Spans(V, 0, 512).window_length == 466
    with pytest.raises(ValueError, match="too few"):
        Spans(V, 0, 3)


@pytest.mark.parametrize("size", [66, 31, 2])
def test_with_sentinels_of_a_tokenizer_and_ids_around_rows_are_those_of_t5(size):
    """By the lines of T5's noise_span_to_unique_sentinel, for the noise of the row."""
    sentinels, padding, end = [*range(99, 89, -1)], 0, 1
    objective = Spans(100, 3, 74, 0.3, 3.0, sentinels, [padding, end])
    assert (objective.extra_ids, objective.window_length) == (0, 60)
    text = np.arange(2, 63)[None] % 80 + 2
    sizes = np.array([min(size, 61)])
    text[0, sizes[0] :] = 0
    (inputs,), (targets,) = objective.examples(text, sizes, np.array([5]))
    count = int(objective.num_targets(sizes)[0])
    if size == 2:
        assert count == 0
        return
    window = text[0, : sizes[0] - 1].tolist()
    source = inputs[: objective.split]
    real = objective.padding_mask(sizes)
    source = source if real is None else source[real[0, : objective.split]]
    noise = ~np.isin(window, source)

    def with_sentinels(hidden: np.ndarray) -> list[int]:
        first = hidden & ~np.concatenate([[False], hidden[:-1]])
        names = np.array(sentinels)[np.cumsum(first) - 1]
        return np.where(first, names, window)[~hidden | first].tolist()

    assert source.tolist() == [*with_sentinels(noise), end]
    answer = [*with_sentinels(~noise), end]
    answer_at = slice(objective.split, objective.split + count)
    assert targets[answer_at].tolist() == answer
    assert inputs[answer_at].tolist() == [padding, *answer[:-1]]
    assert (targets != IGNORED).sum() == len(answer)
    with pytest.raises(ValueError, match="up to 6 spans, and the tokenizer has 5 sentinels"):
        Spans(100, 3, 74, 0.3, 3.0, sentinels[:5], [padding, end])


def test_every_token_is_taken_out_about_as_often_and_spans_have_their_mean():
    objective = Spans(V, 5, 128)
    n = objective.window_length
    tokens = np.tile(np.arange(n + 1), (3000, 1))  # a token tells its place
    sizes = np.full(3000, n + 1)
    inputs, _ = objective.examples(tokens, sizes, np.arange(3000))
    decoder = inputs[:, objective.split :]
    noise, spans = (int(x[0]) for x in objective._counts(np.array([n])))
    taken = np.bincount(decoder[(decoder < V) & (decoder > 0)], minlength=n)
    share = taken[10:-10] / 3000
    assert share.mean() == pytest.approx(noise / n, abs=0.03)
    assert share.max() < 2.5 * noise / n
    assert (decoder >= V).sum() == 3000 * spans


def test_held_out_rows_rebuild_the_split(dataset):
    data = Dataset(dataset)
    split, objective = data.split("validation"), Spans(data.vocab_size, 0, 64)
    length, tokens_of_window = objective.window_length, []
    for m in validation_windows(split, length, 3, objective=objective):
        mask = torch.ones_like(m.targets, dtype=torch.bool)
        for i in range(3):
            real = mask[i] if m.padding_mask is None else m.padding_mask[i]
            if m.padding_mask is None:
                real[objective.split :] = m.targets[i, objective.split :] != IGNORED
            if (m.targets[i] != IGNORED).any():
                row = (m.tokens[i].numpy(), real.numpy(), objective.split, data.vocab_size)
                tokens_of_window += rebuilt(*row)
    text = []
    for shard, size in enumerate(split.shard_tokens):
        length_of_text = (
            size - 1 - ((size - 1) % length == 1)
        )  # a last window of one token has no span
        text += split.read(shard, 0, length_of_text).tolist()
    assert tokens_of_window == text


def test_spans_depend_on_seed_and_number_alone():
    text = np.repeat(np.random.default_rng(0).integers(0, V, (1, 65)).astype("<u2"), 3, 0)
    numbers, sizes = np.array([5, 6, 5]), np.full(3, 65)
    one, other = (Spans(V, seed, 80).examples(text, sizes, numbers) for seed in (1, 2))
    assert np.array_equal(one[:, 0], one[:, 2])
    assert not np.array_equal(one[:, 0], one[:, 1])
    assert not np.array_equal(one[:, 0], other[:, 0])
