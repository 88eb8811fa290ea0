"""`forescale shards show`: the contents of a dataset, and some of its windows in readable form.

Invariant: nothing in a window is hidden. Document borders are marked, and everything that isn't
text (special tokens, bytes that aren't UTF-8, control characters) is printed by name, so that no
text can imitate a special token or control the terminal. The windows are those that training reads
first.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from forescale.data.dataset import MANIFEST, SHUFFLE_SHARDS, Dataset, Split
from forescale.data.order import Order
from forescale.data.prepare.report import summary_lines
from forescale.data.tokenizer import byte_tokenizer
from forescale.ground.console import open_console
from forescale.ground.errors import UserError
from forescale.ground.storage import cache_directory
from forescale.remote.transfer import is_url

_WIDTH = 100  # columns if there is no terminal
_NAME = 12  # columns for the names of properties
_BEGINS, _GOES_ON, _LINE, _WRAPPED = "◆", "⋯", "│", "┊"
_COLOURS = ("cyan", "yellow")  # of the documents of a window, alternating
# Bytes that aren't UTF-8 (as kept by surrogateescape), control characters except tab and newline,
# and characters that change the writing direction or have no width.
_HIDDEN = re.compile(
    "([\udc80-\udcff\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff])"
)


def show(path: str | Path, windows: int, sequence_length: int, seed: int) -> str:
    """Return the contents of a dataset (a path or an address) and the first `windows` windows of
    sequence_length + 1 tokens that training with this seed reads; formatted for a terminal if
    standard output is one.

    Raises UserError if there is no dataset, or if the part to show is damaged.
    """
    if sequence_length < 1:
        raise UserError(
            "sequence_length", "must be at least 1", "write such as sequence_length=256"
        )
    dataset = Dataset(path, cache_directory() / "remote" if is_url(path) else None)
    console = open_console(_WIDTH)
    with console.capture() as captured:
        for line in [
            Text(dataset.where, "bold"),
            *_facts(dataset, console),
            Text(),
            *map(Text, summary_lines(dataset.manifest)),
            *_windows(dataset, windows, sequence_length, seed, console),
        ]:
            console.print(line, soft_wrap=True)
    return captured.get().rstrip("\n")


def _facts(dataset: Dataset, console: Console) -> Iterator[Text]:
    manifest, tokenizer = dataset.manifest, dataset.manifest["tokenizer"]
    end = dataset.tokenizer.id_to_token(dataset.end_of_text)
    facts = {
        "identity": dataset.identity,
        "corpus": dataset.corpus_hash,
        "tokenizer": f"{dataset.vocab_size:,} entries; {end} ({dataset.end_of_text}) ends a "
        f"document; sha256 {tokenizer['sha256'][:16]}",
        "tokens": _stored(manifest),
        "built from": _listed(manifest["build"].get("source", {})),
        "built with": _listed({k: v for k, v in manifest["build"].items() if k != "source"}),
        "report": f"{MANIFEST}, under report",
    }
    for name, value in facts.items():
        for line in Text(value).wrap(console, max(console.width - _NAME - 2, 20)) if value else ():
            line.rstrip()
            yield Text.assemble("  ", (f"{name:<{_NAME}}", "dim"), line)
            name = ""


def _stored(manifest: dict[str, Any]) -> str:
    """Return such as "uint16 in 4 tars, 27.0 MB", or the original files of a corpus that is used in
    place."""
    rows = [row for split in manifest["splits"].values() for row in split["shards"]]
    files = {row["file"]: row["size"] for row in rows}
    size = f"{sum(files.values()) / 1e6:,.1f} MB"
    if in_place := [name for name in files if "/" in name]:
        others = f" and {len(in_place) - 1} more" if len(in_place) > 1 else ""
        return f"{manifest['dtype']}, used in place: {in_place[0]}{others}, {size}"
    return f"{manifest['dtype']} in {len(files):,} tar{'s' * (len(files) != 1)}, {size}"


def _listed(facts: dict[str, Any]) -> str:
    parts = []
    for name, value in facts.items():
        if isinstance(value, dict):
            value = f"({_listed(value)})"
        elif isinstance(value, list):
            value = " ".join(map(str, value))
        if value is not None:
            parts.append(f"{name} {value}")
    return ", ".join(parts)


def _windows(
    dataset: Dataset, count: int, sequence_length: int, seed: int, console: Console
) -> Iterator[Text]:
    split = dataset.split("train")
    if not count:
        return
    yield Text()
    if max(split.shard_tokens, default=0) < 2:
        yield Text("The training split holds no window.")
        return
    order = Order(split.shard_tokens, sequence_length, seed, SHUFFLE_SHARDS)
    count = min(count, order.windows_per_epoch)
    yield Text(
        f"The first {count:,} of {order.windows_per_epoch:,} windows, as training reads them with "
        f"train.sequence_length={sequence_length} train.seed={seed} "
        f"data.shuffle_shards={SHUFFLE_SHARDS}."
    )
    yield Text(
        f"{_BEGINS} start of a document   {_GOES_ON} it continues outside the window   "
        f"{_WRAPPED} wrapped line   ⟦⟧ not text",
        "dim",
    )
    reader = _Reader(dataset)
    for g in range(count):
        yield Text()
        yield from _window(split, reader, g, order.window(g), console)


def _window(
    split: Split, reader: "_Reader", g: int, place: tuple[int, int, int], console: Console
) -> Iterator[Text]:
    shard, start, length = place
    ids = split.read(*place)
    ends = split.document_ends(*place).tolist()
    cuts = [0, *ends, *([] if ends and ends[-1] == length else [length])]
    members = split.members(*place)
    yield Text.assemble(
        (f"sample {g}", "bold"),
        f"  {split.shard_name(shard)}, tokens {start:,} to {start + length - 1:,}, "
        f"member{'s' * (len(members) > 1)} {', '.join(members)}",
    )
    begins = start == 0 or bool(len(split.document_ends(shard, start - 1, 1)))
    for number in range(len(cuts) - 1):
        text = reader.text(ids[cuts[number] : cuts[number + 1]])
        first = _BEGINS if number or begins else _GOES_ON
        yield from _lines(text, first, _COLOURS[number % len(_COLOURS)], console)
    if cuts[-1] not in ends:
        yield _gutter(_GOES_ON, _COLOURS[(len(cuts) - 2) % len(_COLOURS)])


def _lines(text: Text, first: str, colour: str, console: Console) -> Iterator[Text]:
    glyph = first
    for line in text.split("\n", allow_blank=True):
        for part in line.wrap(console, console.width - 4, overflow="fold", tab_size=4) or [Text()]:
            yield Text.assemble(_gutter(glyph, colour), " " if part else "", part)
            glyph = _WRAPPED
        glyph = _LINE


def _gutter(glyph: str, colour: str) -> Text:
    return Text(f"  {glyph}", f"bold {colour}" if glyph == _BEGINS else colour)


class _Reader:
    """Converts ids to text; anything that isn't text is named inside ⟦ ⟧."""

    def __init__(self, dataset: Dataset):
        self._tokenizer = dataset.tokenizer
        self._added = self._tokenizer.get_added_tokens_decoder()
        decoder = json.dumps(json.loads(dataset.tokenizer_json)["decoder"])
        self._is_byte_level = '"ByteLevel"' in decoder
        alphabet = byte_tokenizer().get_vocab(with_added_tokens=False)
        self._alphabet = {character: bytes([byte]) for character, byte in alphabet.items()}

    def text(self, ids: np.ndarray | Sequence[int]) -> Text:
        text, raw = Text(), b""
        for index in map(int, ids):
            piece = self._tokenizer.id_to_token(index)
            if piece is None or (index in self._added and self._added[index].special):
                _append(text, raw)
                text.append(f"⟦{piece or f'id {index}'}⟧", "magenta")
                raw = b""
            else:
                raw += self._bytes(index, piece)
        _append(text, raw)
        return text

    def _bytes(self, index: int, piece: str) -> bytes:
        """Return the bytes that a token stands for; see tokenizer.token_bytes."""
        if index in self._added:
            return piece.encode()
        if self._is_byte_level:
            return b"".join(self._alphabet.get(c, c.encode()) for c in piece)
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()


def _append(text: Text, raw: bytes) -> None:
    for part in _HIDDEN.split(raw.decode("utf-8", "surrogateescape")):
        if not _HIDDEN.fullmatch(part):
            text.append(part)
        elif "\udc80" <= part <= "\udcff":
            text.append(f"⟦{ord(part) - 0xDC00:02X}⟧", "magenta")
        else:
            text.append(f"⟦U+{ord(part):04X}⟧", "magenta")
