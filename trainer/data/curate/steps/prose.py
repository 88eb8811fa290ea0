"""Words, lines and paragraphs of a text, as the rules of Gopher, C4 and FineWeb count them.

Words are found by a plain rule. It stands for spaCy's English tokenizer, with which datatrove 0.10
counts: a run of letters and digits is a word, with points and signs before digits inside of it
(example.com, 1,000, GPL-3), a clitic is one ('s), and each punctuation mark is one. Languages
without spaces between words have no words by this rule, and need other steps.
"""

import re
from functools import lru_cache

# Punctuation and symbols: of ASCII, Latin-1, general, currency, arrows to geometric shapes, CJK,
# full width, Arabic and Devanagari. All else but white space belongs to words, marks included.
_SYMBOLS = (
    r"!-/:-@\[-`{-~\u00a1-\u00a9\u00ab-\u00b4\u00b6-\u00b9\u00bb-\u00bf\u00d7\u00f7\u2010-\u205e"
    r"\u20a0-\u20cf\u2190-\u2bff\u3001-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
    r"\u060c\u061b\u061f\u06d4\u0964\u0965"
)
_LETTER = rf"[^\s{_SYMBOLS}]"
_WORD = re.compile(
    r"(?:https?://|www\.)[^\s<>\"]+"
    rf"|{_LETTER}+(?:(?:[._@]|(?<=\d),(?=\d)|[-:/*+](?=\d)){_LETTER}+)*"
    rf"|['’]{_LETTER}+|\.\.+|-+|[{_SYMBOLS}]"
)
_SYMBOL = re.compile(rf"[{_SYMBOLS}]+")
_BREAK = re.compile(r"\n+")
_GAP = re.compile(r"\n{2,}")


@lru_cache(1)  # three steps after one another ask for the words of one document
def words(text: str) -> tuple[str, ...]:
    """Return the words and punctuation marks of a text, in their order."""
    return tuple(_WORD.findall(text))


def is_symbol(word: str) -> bool:
    """Return whether a word has no letter and no digit."""
    return _SYMBOL.fullmatch(word) is not None


def line_list(text: str) -> list[str]:
    """Return the lines, where empty ones don't count."""
    return _BREAK.split(text)


def paragraph_list(text: str) -> list[str]:
    """Return what empty lines divide."""
    return _GAP.split(text.strip())


def repeats(parts: list[str]) -> tuple[int, int]:
    """Return how many parts are equal to an earlier one, and the sum of their characters."""
    seen_parts: set[str] = set()
    number = characters = 0
    for part in parts:
        if part in seen_parts:
            number += 1
            characters += len(part)
        seen_parts.add(part)
    return number, characters
