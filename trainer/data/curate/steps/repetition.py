"""`gopher_repetition`: text that repeats itself is dropped."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from forescale.data.curate.step import Draft
from forescale.data.curate.steps.inputs import fractions
from forescale.data.curate.steps.prose import line_list, paragraph_list, repeats, words

Ints = np.ndarray


@dataclass(frozen=True)
class GopherRepetition:
    """Drops documents of which a large part is lines, paragraphs or runs of n words that came
    before in them (Rae et al. 2021, arXiv 2112.11446, table A1). Counted as in datatrove 0.10
    (GopherRepetitionFilter): fractions are of all characters of the text, a character counts once
    however many repeated runs hold it, and the first of equal lines doesn't count."""

    VERSION: ClassVar[int] = 1
    SOURCE: ClassVar[str] = "Rae et al. 2021, arXiv 2112.11446, table A1; counted as datatrove 0.10"

    most_lines: float = 0.3  # table A1: duplicate line fraction
    most_paragraphs: float = 0.3  # duplicate paragraph fraction
    most_line_characters: float = 0.2  # duplicate line character fraction
    most_paragraph_characters: float = 0.2  # duplicate paragraph character fraction
    most_top: tuple[float, ...] = (0.20, 0.18, 0.16)  # top n-gram character fraction, n = 2, 3, 4
    # duplicate n-gram character fraction, n = 5 to 10
    most_duplicate: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)

    def check(self) -> None:
        names = ("lines", "paragraphs", "line_characters", "paragraph_characters")
        step = "gopher_repetition"
        fractions(step, **{f"most_{name}": getattr(self, f"most_{name}") for name in names})
        for value in self.most_top:
            fractions(step, most_top=value)
        for value in self.most_duplicate:
            fractions(step, most_duplicate=value)

    def __call__(self, draft: Draft) -> str | None:
        text = draft.text
        if not text:
            return "empty"
        paragraphs = self.most_paragraphs, self.most_paragraph_characters
        lines = self.most_lines, self.most_line_characters
        for kind, parts, (most, most_characters) in (
            ("paragraphs", paragraph_list(text), paragraphs),
            ("lines", line_list(text), lines),
        ):
            number, characters = repeats(parts)
            if number / len(parts) > most or characters / len(text) > most_characters:
                return f"repeated {kind}"
        return self._of_words(words(text), len(text))

    def _of_words(self, tokens: tuple[str, ...], characters: int) -> str | None:
        """Look at runs of words, in a text of so many characters."""
        first = 2
        limits = (*self.most_top, *self.most_duplicate)
        ends = np.zeros(len(tokens) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, tokens), np.int64, len(tokens)), out=ends[1:])
        for n, places, runs in _repeated_runs(tokens, first + len(limits) - 1):
            most = limits[n - first] * characters
            if n < first + len(self.most_top):
                if len(tokens) >= n and _top(ends, n, places, runs) > most:
                    return "a frequent run of words"
            elif _duplicate(ends, n, places, runs, most) > most:
                return "repeated runs of words"
        return None


def _repeated_runs(tokens: tuple[str, ...], longest: int) -> Iterator[tuple[int, Ints, Ints]]:
    """Yield n, from 2, the places of the runs of n words that come several times, and a number for
    each that equal runs share. A run of n words that comes twice begins with one of n - 1 words
    that does: so each n looks only at the places of the last, and runs are compared exactly."""
    numbers = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    ids = np.fromiter(map(numbers.__getitem__, tokens), np.int64, len(tokens))
    places, runs = np.arange(len(ids)), ids
    for n in range(2, longest + 1):
        fits = places + n <= len(ids)
        places = places[fits]
        keys = runs[fits] * max(len(numbers), 1) + ids[places + n - 1]
        _, runs = np.unique(keys, return_inverse=True)
        several = np.bincount(runs)[runs] > 1
        places, runs = places[several], runs[several]
        yield n, places, runs


def _top(ends: Ints, n: int, places: Ints, runs: Ints) -> int:
    """Return the characters of the most frequent run of n words, spaces included, as often as it
    comes; of equally frequent ones it is the first."""
    if not len(places):
        return int(ends[n]) + n - 1
    counts = np.bincount(runs)
    place = int(places[np.argmax(counts[runs] == counts.max())])
    return int(counts.max()) * (int(ends[place + n] - ends[place]) + n - 1)


def _duplicate(ends: Ints, n: int, places: Ints, runs: Ints, most: float) -> int:
    """Return the characters of the runs of n words that came before, each character once; the scan
    goes on behind such a run. It ends when there are more than `most`."""
    earlier: set[int] = set()
    characters = following = 0
    for place, run in zip(places.tolist(), runs.tolist(), strict=True):
        if place < following:
            continue
        if run in earlier:
            characters += int(ends[place + n] - ends[place])
            following = place + n
            if characters > most:
                break
        else:
            earlier.add(run)
    return characters
