"""`gopher_quality`: text that doesn't look like English prose is dropped."""

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from forescale.data.curate.step import Draft
from forescale.data.curate.steps.inputs import fractions, ranges
from forescale.data.curate.steps.prose import is_symbol, words


@dataclass(frozen=True)
class GopherQuality:
    """Drops documents with too few or too many words, with short or long words on average, with too
    many #, ellipses or bullets, too few words with a letter, or too few common English words
    (Rae et al. 2021, arXiv 2112.11446, appendix A.1.1). The paper doesn't say what a word is: as in
    datatrove 0.10 (GopherQualityFilter) punctuation marks are words in fractions, and are none in
    the number and mean length of words."""

    VERSION: ClassVar[int] = 1
    SOURCE: ClassVar[str] = "Rae et al. 2021, arXiv 2112.11446, A.1.1; words as in datatrove 0.10"

    least_words: int = 50  # A.1.1
    most_words: int = 100_000  # A.1.1
    least_mean_length: float = 3.0  # A.1.1, characters
    most_mean_length: float = 10.0  # A.1.1
    most_symbols: float = 0.1  # A.1.1: # a word, and ellipses a word
    most_bullets: float = 0.9  # A.1.1: of the lines, by their begin
    most_ellipses: float = 0.3  # A.1.1: of the lines, by their end
    least_alphabetic: float = 0.8  # A.1.1: of the words
    least_common: int = 2  # A.1.1: different words of the following
    common: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")  # A.1.1

    def check(self) -> None:
        names = ("most_bullets", "most_ellipses", "least_alphabetic")
        fractions("gopher_quality", **{name: getattr(self, name) for name in names})
        means = (self.least_mean_length, self.most_mean_length)
        ranges("gopher_quality", words=(self.least_words, self.most_words), mean_length=means)

    def __call__(self, draft: Draft) -> str | None:
        counts = Counter(words(draft.text))
        return self._of_words(counts) or self._of_marks(draft.text, counts)

    def _of_words(self, counts: Counter[str]) -> str | None:
        """Look at the number of words and their mean length."""
        number = characters = 0
        for word, times in counts.items():
            if not is_symbol(word):
                number += times
                characters += times * len(word)
        if number < self.least_words:
            return "too few words"
        if number > self.most_words:
            return "too many words"
        mean = characters / max(number, 1)
        if mean < self.least_mean_length:
            return "short words"
        return "long words" if mean > self.most_mean_length else None

    def _of_marks(self, text: str, counts: Counter[str]) -> str | None:
        """Look at symbols, at the ends of lines, at letters and at common words."""
        total = max(counts.total(), 1)
        if text.count("#") / total > self.most_symbols:
            return "too many hashes"
        if (text.count("...") + text.count("…")) / total > self.most_symbols:
            return "too many ellipses"
        lines = text.splitlines() or [text]
        bullets = sum(line.lstrip().startswith(("•", "-")) for line in lines)
        if bullets / len(lines) > self.most_bullets:
            return "too many bullets"
        ellipses = sum(line.rstrip().endswith(("...", "…")) for line in lines)
        if ellipses / len(lines) > self.most_ellipses:
            return "too many lines end with an ellipsis"
        letters = sum(n for word, n in counts.items() if any(map(str.isalpha, word)))
        if letters / total < self.least_alphabetic:
            return "too few words with letters"
        common = sum(word in counts for word in set(self.common))
        return "too few common words" if common < self.least_common else None
