"""Tokenizers: train a byte-level BPE, take bytes, or load one; and the bytes behind every token.

Invariant: what we make ourselves is lossless and fixed by the text alone; `token_bytes` is exact,
so that bits per byte computed with it mean the same for any vocabulary.
"""

import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from trainer.errors import UserError

END_OF_TEXT = "<|endoftext|>"
_OTHER_ENDS = ("<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")

# Said aloud, because tokenizers warns and turns itself serial where a process forks without it.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with GPT-2's splitting rule; id 0 is <|endoftext|>. Ties do not depend on
    threads: the same texts give the same file. Fewer entries than asked for where the text is too
    small to fill the vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + 1:
        raise UserError(
            "vocab_size", f"{vocab_size} is too small", "257 (every byte and the end) is the least"
        )
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def byte_tokenizer() -> Tokenizer:
    """Ids 0 to 255 are the bytes themselves, 256 is <|endoftext|>: a BPE without a merge."""
    vocab = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = _byte_level(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json, ready to encode text whole. Raises UserError where it is missing or bad."""
    try:
        tokenizer = Tokenizer.from_str(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(str(path), "no such tokenizer", "give a tokenizer.json") from None
    except OSError:
        raise
    except Exception as e:  # tokenizers raises bare Exceptions for whatever it can't read
        raise UserError(str(path), f"not a tokenizer.json ({e})", "give a whole one") from e
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def end_of_text(tokenizer: Tokenizer, where: str, name: str | None = None) -> int:
    """The id that ends a document: `name`, or the first usual one that the vocabulary has."""
    for token in (name,) if name else (END_OF_TEXT, *_OTHER_ENDS):
        if (found := tokenizer.token_to_id(token)) is not None:
            return found
    special = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
    raise UserError(
        where,
        f"the vocabulary has no {name or END_OF_TEXT}",
        f"name its end-of-text token (special tokens: {', '.join(special[:8]) or 'none'})",
    )


def token_bytes(tokenizer: Tokenizer, where: str = "tokenizer") -> np.ndarray:
    """UTF-8 bytes that each id stands for, int64 of shape (largest id + 1,); special tokens 0.

    Exact for byte-level vocabularies, and for SentencePiece's with byte fallback but for the space
    that they put before a text. Raises UserError for kinds whose tokens have no fixed bytes.
    """
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    added = tokenizer.get_added_tokens_decoder()
    spec = json.loads(tokenizer.to_str())
    decoder = json.dumps(spec["decoder"])
    length: Callable[[str], int]
    if '"ByteLevel"' in decoder:
        length = len  # a character for each byte
    elif '"ByteFallback"' in decoder:
        length = _fallback_length
    else:
        raise UserError(
            where, "its tokens stand for no fixed number of bytes", "use a byte-level tokenizer"
        )
    sizes = np.zeros(max(vocab.values()) + 1, np.int64)
    for piece, index in vocab.items():
        if index not in added:
            sizes[index] = length(piece)
        elif not added[index].special:
            sizes[index] = len(piece.encode())
    return sizes


def _fallback_length(piece: str) -> int:
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return 1
    return len(piece.replace("\u2581", " ").encode())


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_characters() -> list[str]:
    """The character that stands for each byte in GPT-2's byte-level alphabet."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b if b in printable else next(others)) for b in range(256)]
