"""From ids to text, piece by piece, and where the text ends.

Invariant: the pieces add up to the text of all tokens, and none ends within a character: if the
bytes of a character are spread over several tokens, it comes with the last of them. No piece holds
text of which a stop text may be a part.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from tokenizers import Tokenizer

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_NAMELESS: Mapping[int, str] = {}
_CONTEXT = 4  # previous tokens that are decoded together with new ones


class Speller:
    """The text of ids that come one by one, after those in `before`.

    names: of ids that the tokenizer doesn't know, as they are shown. A character ends before them.
    """

    # Decoding depends on previous tokens (SentencePiece drops a leading space), so each piece is
    # the text of the last tokens with the new ones, minus their text without.

    def __init__(
        self, tokenizer: Tokenizer, before: Sequence[int], names: Mapping[int, str] = _NAMELESS
    ):
        self._tokenizer, self._names = tokenizer, names
        self._held = list(before)
        self._written = tokenizer.decode(self._held)

    def add(self, token: int) -> str:
        """Return the characters that this id completes."""
        if token in self._names:
            return self.rest() + self._names[token]
        self._held.append(token)
        text = self._tokenizer.decode(self._held)
        if text.endswith(_BROKEN):
            return ""
        new = text[len(self._written) :]
        self._held = self._held[-_CONTEXT:]
        self._written = self._tokenizer.decode(self._held)
        return new

    def rest(self) -> str:
        """Return what no later id can complete."""
        text = self._tokenizer.decode(self._held)
        new, self._written = text[len(self._written) :], text
        return new


def pieces(
    tokenizer: Tokenizer,
    before: Sequence[int],
    ids: Iterable[int],
    names: Mapping[int, str] = _NAMELESS,
) -> Iterator[str]:
    """Yield the text of `ids`, which follow `before`, in pieces of complete characters. See
    Speller."""
    speller = Speller(tokenizer, before, names)
    for token in ids:
        yield speller.add(token)
    yield speller.rest()


class Stops:
    """A text that comes in pieces, up to the first of some stop texts, none of them empty.

    found: the stop text that ended it; None: none so far. Of several, the one that is complete
    first, wherever pieces begin.
    """

    def __init__(self, texts: Sequence[str]):
        self._texts, self._held = texts, ""
        self.found: str | None = None

    def add(self, piece: str) -> str:
        """Return the text that is certain now: no stop text begins in it."""
        if not self._texts or self.found is not None:
            return "" if self.found is not None else piece
        self._held += piece
        starts = {text: self._held.find(text) for text in self._texts}
        ends = [(start + len(text), start, text) for text, start in starts.items() if start >= 0]
        if ends:
            _, start, self.found = min(ends)
            return self._held[:start]
        size = len(self._held) - max(map(self._begun, self._texts))
        certain, self._held = self._held[:size], self._held[size:]
        return certain

    def _begun(self, text: str) -> int:
        """Return how many characters at the end may be the first of this stop text."""
        sizes = range(min(len(text) - 1, len(self._held)), 0, -1)
        return next((size for size in sizes if self._held.endswith(text[:size])), 0)

    def rest(self) -> str:
        """Return what was held back, where the text ends without a stop text."""
        held, self._held = self._held, ""
        return "" if self.found is not None else held
