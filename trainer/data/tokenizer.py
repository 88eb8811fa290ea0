"""Tokenizers: train a byte-level BPE, use bytes, or load one; and the number of bytes of every
token.

Invariant: tokenizers made here are lossless and depend only on the text; `token_bytes` is exact for
them and for lossless ones, so that bits per byte computed with it are comparable between these
vocabularies, and with no other: WordPiece counts a space before each mark, some 10 % too many
bytes.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from forescale.ground.errors import UserError
from forescale.ground.foreign import read_bytes, read_object
from forescale.ground.storage import read_json

END_OF_TEXT = "<|endoftext|>"
_IMPORTED = "imported.json"  # in the run of an imported model; it has the content of these files:
DECLARING = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "config.json",
)
_FILE = "tokenizer.json"
_MOST_BYTES = 50_000_000  # published ones have up to 35 MB; it takes up to 70 times as much to read
_MOST_IDS = 1 << 24  # of a vocabulary; the largest published one has some million
_MASKS = ("[MASK]", "<mask>", "<|mask|>")
_OTHER_ENDS = ("<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")

# Set explicitly: without it tokenizers warns and becomes serial when a process forks.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with GPT-2's splitting rule; id 0 is <|endoftext|>.

    Ties don't depend on threads: the same texts give the same file. It has fewer entries than
    requested if the text is too small to fill the vocabulary. Raises UserError if vocab_size is
    below 257.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + 1:
        todo = "set at least 257 (bytes and end of text)"
        raise UserError("vocab_size", f"{vocab_size} is too small", todo)
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
    """Return a BPE without merges: ids 0 to 255 are the bytes themselves, 256 is <|endoftext|>."""
    # GPT-2's byte-level alphabet: a printable character for each byte.
    printable, others = {*range(33, 127), *range(161, 173), *range(174, 256)}, iter(range(256, 512))
    vocab = {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
    tokenizer = _byte_level(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer.json, without truncation and padding. Raises UserError."""
    return _parsed(read_bytes(path, _MOST_BYTES), str(path))


def text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text in a document."""
    # As in training, the text "<|endoftext|>" in a document is not a special token.
    tokenizer.encode_special_tokens = True
    # `encode` would keep all other threads waiting, for seconds where the text is long.
    return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids


def given_tokenizer(name: str) -> bytes | None:
    """Return the bytes of the tokenizer.json that a name stands for: "bytes", a file, or a Hugging
    Face directory with one; None for "bpe", which has to be trained. Raises UserError if there is
    none."""
    if name == "bpe":
        return None
    if name == "bytes":
        return byte_tokenizer().to_str().encode()
    path = Path(name).expanduser()
    if path.is_dir() and not (path / _FILE).is_file():
        raise UserError(name, f"holds no {_FILE}", "give a directory with one or the file itself")
    return read_bytes(path / _FILE if path.is_dir() else path, _MOST_BYTES, f"give a {_FILE}")


@dataclass(frozen=True)
class Vocabulary:
    """The bytes of a tokenizer.json, its number of entries, and the id that ends a document."""

    raw: bytes
    size: int
    end: int

    @property
    def dtype(self) -> np.dtype:
        """Little-endian unsigned integers, wide enough for every id."""
        return np.dtype("<u2" if self.size <= 1 << 16 else "<u4")

    @property
    def is_bytes(self) -> bool:
        """True if ids are the bytes of the text, so that encoding needs no tokenizer."""
        return self.raw == byte_tokenizer().to_str().encode()

    def load(self) -> Tokenizer:
        """Return the tokenizer, without truncation and padding."""
        return _parsed(self.raw, _FILE)


def vocabulary_of(
    raw: bytes, where: str, end: str | None = None, files: Mapping[str, Any] | None = None
) -> Vocabulary:
    """Return the Vocabulary of a tokenizer.json.

    where: the user's name for it; end: the token that ends a document; files: those that may
    declare this token, None: those beside `where`. Raises UserError if it isn't a tokenizer.json,
    has no such token, or its tokens have no fixed number of bytes.
    """
    tokenizer = _parsed(raw, where)
    sizes = token_bytes(tokenizer, where)
    return Vocabulary(raw, len(sizes), end_of_text(tokenizer, where, end, files))


def _parsed(raw: bytes, where: str) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(raw.decode("utf-8"))
    except Exception as e:  # tokenizers raises bare Exceptions for everything that it can't read
        raise UserError(where, f"not a valid {_FILE} ({e})", "give an intact one") from e
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def declared_ends(tokenizer: Tokenizer, files: Mapping[str, Any]) -> list[int]:
    """Return the ids that end a text by the files beside a tokenizer.json (their content by name),
    the one that ends a document first."""
    ends: dict[int | None, None] = {}
    for content in (files.get(name) for name in DECLARING):
        if isinstance(content, Mapping):
            token, ids = content.get("eos_token"), content.get("eos_token_id")
            token = token.get("content") if isinstance(token, Mapping) else token
            ends |= {tokenizer.token_to_id(token): None} if isinstance(token, str) else {}
            for i in ids if isinstance(ids, list) else [ids]:
                is_id = type(i) is int and 0 <= i < _MOST_IDS and tokenizer.id_to_token(i)
                ends |= {i: None} if is_id else {}
    return [i for i in ends if i is not None]


def framing(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer puts before each text and behind it, such as Llama's token of
    the beginning and T5's of the end."""
    plain, whole = (
        tokenizer.encode("a", add_special_tokens=framed).ids for framed in (False, True)
    )
    ends = range(len(plain), len(whole) + 1)
    end = next((end for end in ends if whole[end - len(plain) : end] == plain), None)
    return ([], []) if end is None else (whole[: end - len(plain)], whole[end:])


def mask_id(tokenizer: Tokenizer) -> int | None:
    """Return the id of the special token that hides others; None: the tokenizer has none."""
    special = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
    return next((tokenizer.token_to_id(name) for name in _MASKS if name in special), None)


def sentinel_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids of the special tokens <extra_id_0>, <extra_id_1>, ..., with which T5 marks
    spans, in this order; none if the tokenizer has no such tokens."""
    added = tokenizer.get_added_tokens_decoder().items()
    known = {token.content: i for i, token in added if token.special}
    names = takewhile(known.__contains__, (f"<extra_id_{i}>" for i in count()))
    return [known[name] for name in names]


def end_of_text(
    tokenizer: Tokenizer,
    where: str,
    name: str | None = None,
    files: Mapping[str, Any] | None = None,
) -> int:
    """Return the id that ends a document: that of the token `name`; else the one that `files`
    declare, by default those beside it, where `where` is a Hugging Face directory, or an imported
    run's, or a file in it; else the first common one that the vocabulary has.

    Raises UserError if there is none, or if it is an ordinary token of texts.
    """
    added = tokenizer.get_added_tokens_decoder()
    files = declaring_files(where) if files is None else files
    ends = [] if name else declared_ends(tokenizer, files)
    names = [name] if name else [END_OF_TEXT, *_OTHER_ENDS]
    for end in [*ends, *map(tokenizer.token_to_id, names)]:
        if end is None:
            continue
        token = tokenizer.id_to_token(end) or ""
        # An id may be of another tokenizer, and " the" be spelled here as \u0120the.
        texts = [token, tokenizer.decode([end], skip_special_tokens=False)]
        as_text = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        if end in added or [end] not in as_text:
            return end
        if end not in ends:
            problem = f"{token!r} can't end documents: it is an ordinary token of texts"
            raise UserError(where, problem, "set end_of_text to its end-of-text token")
    special = [t.content for t in added.values() if t.special]
    todo = f"set end_of_text to its own (special tokens: {', '.join(special[:8]) or 'none'})"
    raise UserError(where, f"its vocabulary has no token {name or END_OF_TEXT}", todo)


def declaring_files(where: str) -> dict[str, Any]:
    """Return the content of the files beside a tokenizer that declare special tokens, by name."""
    path = Path(where).expanduser()
    if not path.exists():  # a word, such as bytes
        return {}
    folder = path if path.is_dir() else path.parent
    if (folder / _IMPORTED).is_file():
        imported: dict[str, Any] = read_json(folder / _IMPORTED)
        return imported
    there = [name for name in DECLARING if (folder / name).is_file()]
    return {name: read_object(folder / name) for name in there}


def token_bytes(tokenizer: Tokenizer, where: str = "tokenizer") -> np.ndarray:
    """Return the number of UTF-8 bytes of each id, int64 of shape (largest id + 1,); 0 for special
    tokens.

    Exact for byte-level vocabularies, and for SentencePiece's with byte fallback except for the
    space that they add before a text. Of others, such as BERT's and T5's, about the bytes of what
    an id is decoded to: they change the text first (its case, accents, spaces). Raises UserError
    for kinds whose tokens have no fixed bytes.
    """
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    added = tokenizer.get_added_tokens_decoder()
    if (largest := max(vocab.values(), default=0)) >= _MOST_IDS:  # to_str lists all below it
        raise UserError(where, f"its largest id is {largest:,}", f"give an intact {_FILE}")
    spec = json.loads(tokenizer.to_str())
    decoder = json.dumps(spec["decoder"])
    is_byte_level = '"ByteLevel"' in decoder
    if not re.search('"(ByteLevel|ByteFallback|WordPiece|Metaspace)"', decoder):
        problem = "its tokens have no fixed number of bytes"
        raise UserError(where, problem, "use a byte-level tokenizer")
    sizes = np.zeros(largest + 1, np.int64)
    for piece, index in vocab.items():
        if index in added:
            sizes[index] = 0 if added[index].special else len(piece.encode())
        elif is_byte_level:
            sizes[index] = len(piece)  # one character per byte
        elif re.fullmatch("<0x[0-9A-F]{2}>", piece):
            sizes[index] = 1
        else:
            sizes[index] = len(spelled(piece, decoder).encode())
    return sizes


def spelled(piece: str, decoder: str) -> str:
    """Return the text of a token that is not byte-level. decoder: in JSON."""
    if '"WordPiece"' in decoder:  # a word but for ##, which goes on with one
        return piece[2:] if piece.startswith("##") else f" {piece}"
    return piece.replace("\u2581", " ")


def longest_token(tokenizer: Tokenizer) -> int | None:
    """Return the most bytes of a text that become one token; None: not known, since the tokenizer
    may change a text first, or leave out a part of it."""
    spec, added = json.loads(tokenizer.to_str()), tokenizer.get_added_tokens_decoder().values()
    split = json.dumps(spec["pre_tokenizer"])
    kinds = set(re.findall(r'"type": "(\w+)"', split))
    is_whole = kinds <= {"Sequence", "Split", "ByteLevel", "Digits"} and '"Removed"' not in split
    if spec["normalizer"] or not is_whole or any(token.lstrip or token.rstrip for token in added):
        return None
    return max(int(token_bytes(tokenizer).max()), *(len(t.content.encode()) for t in added), 1)


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
