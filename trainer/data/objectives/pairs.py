"""Prompts with answers of your own: a row is [source | target], both of one document.

Invariant: the number of targets of a pair depends on its length alone, and where its tokens lie in
the row on its lengths; nothing is drawn.
"""

import numpy as np
from tokenizers import Tokenizer

from forescale.data.objective import IGNORED
from forescale.data.tokenizer import text_ids
from forescale.ground.errors import UserError, shortened

_LONGEST = 60  # characters of a separator in a message
_ESCAPES = {r"\t": "\t", r"\n": "\n"}


class Pairs:
    """A document is source, separator, target, and the token that ends it; the model writes the
    target, to its end, after the source and the separator.

    An encoder reads the source, in both directions; the decoder reads the separator and the target,
    and predicts the token after each. (T5 begins with a padding id instead of the separator.)
    Without an encoder a decoder reads source, separator and target as one row.

    source at the end of columns [0, split)
    separator and target, less its last token, at the start of columns [split, columns)

    A window is a pair (bin_kinds.PairKind): `sizes` count its tokens, `cuts`, (n, 1), the
    tokens of its source, 0 for a row of padding. Its length in the data order, which num_targets
    takes, is that of separator and target.
    """

    def __init__(
        self,
        sequence_length: int,
        separator: str,
        source: int | None = None,
        framed: bool = False,
    ):
        """separator: as in the config; source: columns for the source, default half of them;
        framed: sources have the tokens that the tokenizer puts around a text. Raises ValueError if
        no column is left for the target."""
        self.columns, self.separator, self.framed = sequence_length, separator, framed
        self.split = sequence_length // 2 if source is None else source
        if not 0 < self.split < sequence_length:
            raise ValueError(f"{sequence_length} columns are too few for a source and a target")

    def num_targets(self, sizes: np.ndarray) -> np.ndarray:
        return np.asarray(sizes, np.int64) - 1

    def examples(
        self, tokens: np.ndarray, sizes: np.ndarray, numbers: np.ndarray, cuts: np.ndarray
    ) -> np.ndarray:
        split, pair = self.split, np.zeros((2, len(tokens), self.columns), np.int64)
        pair[1] = IGNORED
        for i, (cut, size) in enumerate(zip(cuts[:, 0].tolist(), sizes.tolist(), strict=True)):
            if cut:  # else a row of padding
                end = split + size - 1 - cut
                pair[0, i, split - cut : end] = tokens[i, : size - 1]
                pair[1, i, split:end] = tokens[i, cut + 1 : size]
        return pair

    def padding_mask(self, sizes: np.ndarray, cuts: np.ndarray) -> np.ndarray:
        """Return (n, columns), False before the source and beyond the target."""
        columns = np.arange(self.columns)  # beside cuts, (n, 1)
        first, end = self.split - cuts, self.split + sizes[:, None] - 1 - cuts
        return (columns >= first) & (columns < end) & (cuts > 0)


def separator_id(tokenizer: Tokenizer, separator: str, end_of_text: int) -> int:
    """Return the id of a separator, which is an id, or a text of one token; \\t and \\n stand for a
    tab and a line end.

    Raises UserError if the tokenizer has no such token, or if the token ends documents.
    """
    where, quoted = "objective.separator", shown_separator(separator)
    if separator.isdecimal():
        token = int(separator) if len(separator) < 10 else -1  # beyond every vocabulary
        if token < 0 or tokenizer.id_to_token(token) is None:
            problem = (
                f"{quoted} is no id of the tokenizer, which has {tokenizer.get_vocab_size():,}"
            )
            raise UserError(where, problem, "give the id of a token, or its text")
    else:
        text = _unescaped(separator)
        # Of the name of a special token, which occurs in no text but may occur in a corpus of token
        # ids, that token.
        added = tokenizer.get_added_tokens_decoder()
        ids = [index for index, token in added.items() if token.content == text][:1]
        if not ids and not any("\ud800" <= c <= "\udfff" for c in text):  # else not UTF-8
            ids = text_ids(tokenizer, text)
        if len(ids) != 1:
            problem = f"{quoted} is {len(ids)} tokens in this dataset's tokenizer"
            todo = "give a text that is one token, such as \\t, or the id of a token"
            raise UserError(where, problem, todo)
        token = ids[0]
    if token == end_of_text:
        problem = f"{quoted} is the token that ends each document"
        raise UserError(where, problem, "give another one, which stands inside the documents")
    return token


def shown_separator(separator: str) -> str:
    """Return a separator in quotes, for messages: a tab is always \\t."""
    return shortened(repr(_unescaped(separator)), _LONGEST)


def _unescaped(separator: str) -> str:
    for escape, character in _ESCAPES.items():
        separator = separator.replace(escape, character)
    return separator
