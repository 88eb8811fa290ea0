"""`forescale shards show`: the contents of a dataset, and some of its windows in readable form.

Invariant: nothing in a window is hidden. Document borders are marked, and everything that isn't
text (special tokens, bytes that aren't UTF-8, control characters) is printed by name, so that no
text can imitate a special token or control the terminal. The windows are those that training reads
first.
"""

import json
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from forescale.data.dataset import MANIFEST, SHUFFLE_SHARDS, Dataset
from forescale.data.order import Order
from forescale.data.tokenizer import byte_tokenizer, spelled
from forescale.ground.console import open_console
from forescale.ground.errors import UserError
from forescale.ground.storage import cache_directory
from forescale.remote.transfer import is_url

_WIDTH = 100  # columns if there is no terminal
_NAME = 12  # columns for the names of properties
_BEGINS, _GOES_ON, _LINE, _WRAPPED = "◆", "⋯", "│", "┊"
_BAR = 40  # characters of the longest bar in the histogram
_FEW = 1 << 15  # held-out tokens below which the loss has an error of some percent
_NAMED = 3  # examples printed for each reason; the manifest has up to 200
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
        todo = "write such as sequence_length=256"
        raise UserError("sequence_length", "must be at least 1", todo)
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


def summary_lines(manifest: dict[str, Any]) -> list[str]:
    """Return the summary as lines for a terminal."""
    lines = []
    for name, split in manifest["splits"].items():
        tokens, documents, size = (split[k] for k in ("tokens", "documents", "bytes"))
        ratio = f"{size / tokens:.2f} bytes per token" if tokens and size else "empty"
        count = len(split["shards"])
        lines.append(
            f"  {name:<11} {documents:>10,} documents  {size:>15,} bytes  {tokens:>13,} tokens  "
            f"{ratio}, {count:,} shard{'s' * (count != 1)}"
        )
    held_out = manifest["splits"].get("validation", {}).get("tokens", 0)
    if 0 < held_out < _FEW:
        noisy = "the validation loss will be noisy (increase validation_fraction)"
        lines += ["", f"Only {held_out:,} tokens are held out: {noisy}."]
    report = manifest["report"]
    if lengths := report.get("lengths"):
        lines += ["", "Document lengths in tokens:"]
        first = next(i for i, count in enumerate(lengths) if count)
        for i, count in enumerate(lengths[first:], first):
            # A bar in eighths of a character; a positive share has at least one eighth.
            eighths = max(round(count / max(lengths) * _BAR * 8), int(count > 0))
            bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
            label = f"{1 << i:,} to {(2 << i) - 1:,}" if i else "1"
            lines.append(f"  {label:>25} {count:>12,}  {bar}".rstrip())
    sources = report.get("sources", [])
    if divided := sum(source.get("divided", 0) for source in sources):
        lines += ["", f"Documents of small inputs whose last part is held out: {divided:,}"]
    if len(sources) > 1:
        lines += ["", "Shares of the inputs:"]
        total = sum(source["tokens"] for source in sources) or 1
        lines += [
            f"  {source['tokens'] / total:>6.1%}  {source['tokens']:>13,} tokens  "
            f"{source['bytes']:>15,} bytes  {source['documents']:>10,} documents  {source['name']}"
            for source in sources
        ]
    if (duplicates := report.get("duplicates")) and duplicates["documents"]:
        removed = f"{duplicates['documents']:,} ({duplicates['bytes']:,} bytes)"
        lines += ["", f"Duplicates removed, the first of each kept: {removed}"]
    if left_out := report.get("left_out"):
        lines += ["", "Left out or changed (more names in manifest.json):"]
        for reason, cases in left_out.items():
            names = ", ".join(cases["first"][:_NAMED]) + ", ..." * (cases["count"] > _NAMED)
            lines.append(f"  {cases['count']:>8,}  {reason}: {names}")
    return lines


def _facts(dataset: Dataset, console: Console) -> Iterator[Text]:
    manifest, tokenizer = dataset.manifest, dataset.manifest["tokenizer"]
    end = dataset.tokenizer.id_to_token(dataset.end_of_text)
    rows = [row for split in manifest["splits"].values() for row in split["shards"]]
    files = {row["file"]: row["size"] for row in rows}
    place = f" in {len(files):,} tar{'s' * (len(files) != 1)}"
    if in_place := [name for name in files if "/" in name]:
        others = f" and {len(in_place) - 1} more" if len(in_place) > 1 else ""
        place = f", used in place: {in_place[0]}{others}"
    facts = {
        "identity": dataset.identity,
        "corpus": dataset.corpus_hash,
        "tokenizer": f"{dataset.vocab_size:,} entries; {end} ({dataset.end_of_text}) ends a "
        f"document; sha256 {tokenizer['sha256'][:16]}",
        "tokens": f"{manifest['dtype']}{place}, {sum(files.values()) / 1e6:,.1f} MB",
        "built from": _listed(manifest["build"].get("source", {})),
        "built with": _listed({k: v for k, v in manifest["build"].items() if k != "source"}),
        "report": f"{MANIFEST}, under report",
    }
    for name, value in facts.items():
        for line in Text(value).wrap(console, max(console.width - _NAME - 2, 20)) if value else ():
            line.rstrip()
            yield Text.assemble("  ", (f"{name:<{_NAME}}", "dim"), line)
            name = ""


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
        shard, start, length = place = order.window(g)
        ids, ends = split.read(*place), split.document_ends(*place).tolist()
        cuts = [0, *ends, *([] if ends and ends[-1] == length else [length])]
        members = split.members(*place)
        yield Text()
        yield Text.assemble(
            (f"sample {g}", "bold"),
            f"  {split.shard_name(shard)}, tokens {start:,} to {start + length - 1:,}, "
            f"member{'s' * (len(members) > 1)} {', '.join(members)}",
        )
        begins = start == 0 or bool(len(split.document_ends(shard, start - 1, 1)))
        for number, (first, end) in enumerate(pairwise(cuts)):
            glyph = _BEGINS if number or begins else _GOES_ON
            colour = _COLOURS[number % len(_COLOURS)]
            for line in reader.text(ids[first:end]).split("\n", allow_blank=True):
                parts = line.wrap(console, console.width - 4, overflow="fold", tab_size=4)
                for part in parts or [Text()]:
                    yield Text.assemble(_gutter(glyph, colour), " " if part else "", part)
                    glyph = _WRAPPED
                glyph = _LINE
        if cuts[-1] not in ends:
            yield _gutter(_GOES_ON, _COLOURS[(len(cuts) - 2) % len(_COLOURS)])


def _gutter(glyph: str, colour: str) -> Text:
    return Text(f"  {glyph}", f"bold {colour}" if glyph == _BEGINS else colour)


class _Reader:
    """Converts ids to text; anything that isn't text is named inside ⟦ ⟧."""

    def __init__(self, dataset: Dataset):
        self._tokenizer = dataset.tokenizer
        self._added = self._tokenizer.get_added_tokens_decoder()
        self._decoder = json.dumps(json.loads(dataset.tokenizer_json)["decoder"])
        self._is_byte_level = '"ByteLevel"' in self._decoder
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
            elif index in self._added:  # the bytes of the others: see tokenizer.token_bytes
                raw += piece.encode()
            elif self._is_byte_level:
                raw += b"".join(self._alphabet.get(c, c.encode()) for c in piece)
            elif re.fullmatch("<0x[0-9A-F]{2}>", piece):
                raw += bytes([int(piece[3:5], 16)])
            else:
                raw += spelled(piece, self._decoder).encode()
        _append(text, raw)
        return text


def _append(text: Text, raw: bytes) -> None:
    for part in _HIDDEN.split(raw.decode("utf-8", "surrogateescape")):
        if not _HIDDEN.fullmatch(part):
            text.append(part)
        elif "\udc80" <= part <= "\udcff":
            text.append(f"⟦{ord(part) - 0xDC00:02X}⟧", "magenta")
        else:
            text.append(f"⟦U+{ord(part):04X}⟧", "magenta")
