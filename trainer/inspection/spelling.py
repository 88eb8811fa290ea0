"""Tokens as text that is shown one by one.

Invariant: the pieces add up to the text; a character of several tokens is in the last of them.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer

from forescale.errors import UserError
from forescale.inference.generation import pieces

BEGIN = "<begin>"


def spelled(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Return the piece of text of each token; of the first, which begins the document, BEGIN."""
    begin, *rest = ids
    found: list[str] = [BEGIN]
    given = iter(rest)
    taken = 0

    def counted():
        nonlocal taken
        for token in given:
            taken += 1
            yield token

    for piece in pieces(tokenizer, [begin], counted()):
        found += [""] * (taken - len(found))  # the first tokens of a character
        found.append(piece)
    return found[: len(ids)] + [""] * (len(ids) - len(found))


def found_in(pieces: Sequence[str], subject: str) -> tuple[int, int]:
    """Return the tokens [first, end) that hold the subject where it stands first. Raises UserError
    if the text has no such part."""
    text = "".join(pieces[1:])
    start = text.find(subject)
    if not subject or start < 0:
        problem = f"{subject!r} is not in the {len(pieces) - 1} tokens that are read"
        raise UserError("subject", problem, "copy it from the text")
    ends, at = [], 0
    for piece in pieces[1:]:
        at += len(piece)
        ends.append(at)
    first = next(i for i, end in enumerate(ends) if end > start)
    last = next(i for i, end in enumerate(ends) if end >= start + len(subject))
    return first + 1, last + 2


def name_of(tokenizer: Tokenizer, token: int) -> str:
    """Return a token alone as text: its special name, or its characters."""
    return tokenizer.decode([token], skip_special_tokens=False) or (
        tokenizer.id_to_token(token) or f"<{token}>"
    )
