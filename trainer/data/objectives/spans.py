"""Span corruption: a row is [source | target], and the model writes the missing spans.

Invariant: the spans of a window are a pure function of the seed, the window's number and its
length; the columns of source and target and the number of targets depend on the length alone.
"""

from collections.abc import Sequence

import numpy as np

from forescale.data.objective import IGNORED, Draws


class Spans:
    """T5's span corruption (Raffel et al. 2020, arXiv 1910.10683, section 3.1.4).

    Of a window's n tokens, round(rate * n) are noise, in round(noise / mean) spans. Noise and the
    rest are cut at random places into equally many parts, which alternate, the rest first
    (random_spans_noise_mask of T5's code). In the source each span is replaced by its sentinel, s0,
    s1, ...; the target is s0 span0 s1 span1 ... The decoder predicts all of it but s0, which always
    comes first, and then the next sentinel as an end. around: two ids, as T5 itself has them; the
    first begins the decoder's input, which then predicts s0 too, and the second ends both parts,
    which have a token more each.

    source of n - noise + spans tokens, at the end of columns [0, split)
    target of noise + spans tokens, at the start of columns [split, sequence_length)

    window_length: the most tokens whose source and target fit into a row of sequence_length. All
    windows have that length but for a shard's last, so the split is one column, and a full window
    leaves at most two columns of padding, at the row's end. sentinels: their ids, in order; none:
    the ids beyond the vocabulary, from vocab_size on, which extra_ids counts.
    """

    def __init__(
        self,
        vocab_size: int,
        seed: int,
        sequence_length: int,
        rate: float = 0.15,
        mean: float = 3.0,
        sentinels: Sequence[int] | None = None,
        around: Sequence[int] | None = None,
    ):
        """Raise ValueError if a row of sequence_length is too short for a span, or has more spans
        than there are sentinels."""
        self.seed, self.columns, self.rate, self.mean = seed, sequence_length, rate, mean
        self.around, self._ending = around, int(bool(around))
        lengths = np.arange(2, max(3, sequence_length))
        noise, spans = self._counts(lengths)
        fits = lengths[lengths + 2 * (spans + self._ending) <= sequence_length]
        if not len(fits):
            raise ValueError(f"{sequence_length} columns are too few for a span and its sentinels")
        self.window_length = int(fits[-1])
        noise, spans = self._counts(fits[-1:])
        self.split = int(self.window_length - noise[0] + spans[0]) + self._ending
        self.most_spans = int(spans[0])
        count = self.most_spans + 1 - self._ending
        self.sentinels = list(sentinels or range(vocab_size, vocab_size + count))
        self.extra_ids = 0 if sentinels else count
        if len(self.sentinels) < count:
            problem = f"a row has up to {self.most_spans:,} spans, and the tokenizer has"
            todo = "shorten train.sequence_length, or take new ones by objective.sentinels=[]"
            raise ValueError(f"{problem} {len(self.sentinels):,} sentinels: {todo}")

    def _counts(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the noise tokens and the spans of windows of these lengths; 0 below 2 tokens."""
        lengths = np.asarray(lengths, np.int64)
        noise = np.clip(np.rint(self.rate * lengths), 1, np.maximum(lengths - 1, 1))
        spans = np.maximum(np.rint(noise / self.mean), 1)
        spans = np.minimum(spans, lengths - noise)
        noise, spans = noise.astype(np.int64), spans.astype(np.int64)
        return np.where(lengths < 2, 0, noise), np.where(lengths < 2, 0, spans)

    def num_targets(self, sizes: np.ndarray) -> np.ndarray:
        noise, spans = self._counts(np.asarray(sizes) - 1)
        return noise + spans + self._ending * (spans > 0)

    def examples(self, tokens: np.ndarray, sizes: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        pair = np.zeros((2, len(tokens), self.columns), np.int64)
        pair[1] = IGNORED
        noise, spans = self._counts(sizes - 1)
        rows = zip(tokens, sizes.tolist(), numbers.tolist(), noise, spans, strict=True)
        for i, (text, size, number, drop, count) in enumerate(rows):
            if not count:
                continue
            draws, rest_size = Draws(self.seed, number), size - 1 - drop
            source, target, at = [], [*self.around[:1]] if self.around else [], 0
            lengths = zip(_cut(draws, rest_size, count), _cut(draws, drop, count), strict=True)
            for sentinel, (rest, span) in zip(self.sentinels, lengths, strict=False):
                source += [*text[at : at + rest].tolist(), sentinel]
                target += [sentinel, *text[at + rest : at + rest + span].tolist()]
                at += rest + span
            last = self.around[1] if self.around else self.sentinels[count]
            source += [last] * self._ending
            end = self.split + len(target)
            pair[0, i, self.split - len(source) : self.split] = source
            pair[0, i, self.split : end] = target
            pair[1, i, self.split : end] = [*target[1:], last]
        return pair

    def padding_mask(self, sizes: np.ndarray) -> np.ndarray | None:
        """Return (n, sequence_length), False before the source and beyond the target; None if all
        windows are full: then only columns without a target follow the target."""
        if (sizes > self.window_length).all():
            return None
        noise, spans = self._counts(sizes - 1)
        marks = spans + self._ending * (spans > 0)
        source, target = (sizes - 1 - noise + marks)[:, None], (noise + marks)[:, None]
        columns = np.arange(self.columns)
        return (columns >= self.split - source) & (columns < self.split + target)


def _cut(draws: Draws, size: int, parts: int) -> np.ndarray:
    """Return the lengths, all at least 1, of `parts` parts of `size` tokens; all ways to cut are
    equally likely (random_segmentation of T5's code)."""
    cuts = 1 + np.sort(draws.chosen(size - 1, parts - 1))
    return np.diff(np.concatenate([[0], cuts, [size]]))
