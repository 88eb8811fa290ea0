"""What a build did, for people: totals, lengths, duplicates, what was left out, shares of sources.

Invariant: the manifest holds all that is printed here, so that it can be printed at any time again.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from forescale.data.prepare.selection import SPLITS
from forescale.data.text.documents import Report, Unit

_BAR = 40  # characters of the longest bar
_FEW = 1 << 15  # tokens: the loss of so few held-out ones is off by some percent
_NAMED = 3  # examples of each reason that are printed; the manifest has up to 200


class Totals:
    """Adds up the facts of the units' files, in plan order."""

    def __init__(self, sources: Sequence[str]):
        self.splits = {s: dict.fromkeys(("documents", "tokens", "bytes"), 0) for s in SPLITS}
        self.lengths: list[int] = [0] * 64
        self.sources: list[dict[str, Any]] = [
            {"name": name, "documents": 0, "bytes": 0, "tokens": 0, "read_bytes": 0}
            for name in sources
        ]
        self.left_out = Report()

    def add(self, unit: Unit, hashed: dict[str, Any], encoded: dict[str, Any]) -> None:
        """Facts of a unit's file in hashes/, and of that in tokens/."""
        source = self.sources[unit.source]
        source["read_bytes"] += hashed["bytes"]
        for name, split in encoded["splits"].items():
            for key, count in split.items():
                self.splits[name][key] += count
                source[key] += count
        self.lengths = [a + b for a, b in zip(self.lengths, encoded["lengths"], strict=True)]
        for facts in (hashed, encoded):
            self.left_out.merge(Report(**facts["report"]))

    def as_dict(self) -> dict[str, Any]:
        """The manifest's report. lengths: documents of 2^i to 2^(i+1) - 1 tokens, the end's
        included; bytes of duplicates: those of their text."""
        longest = max((i for i, count in enumerate(self.lengths) if count), default=-1)
        read = sum(s["read_bytes"] for s in self.sources)
        kept = sum(split["bytes"] for split in self.splits.values())
        return {
            "duplicates": {
                "documents": self.left_out.counts.get("duplicate", 0),
                "bytes": read - kept,
            },
            "lengths": self.lengths[: longest + 1],
            "sources": self.sources,
            "left_out": self.left_out.as_dict(),
        }


def printed(manifest: dict[str, Any]) -> list[str]:
    """Lines for a terminal."""
    lines = []
    for name, split in manifest["splits"].items():
        tokens, documents, size = (split[k] for k in ("tokens", "documents", "bytes"))
        ratio = f"{size / tokens:.2f} bytes a token" if tokens and size else "empty"
        shards = _counted(len(split["shards"]), "shard")
        lines.append(
            f"  {name:<11} {documents:>10,} documents  {size:>15,} bytes  {tokens:>13,} tokens  "
            f"{ratio}, {shards}"
        )
    held_out = manifest["splits"].get("validation", {}).get("tokens", 0)
    if 0 < held_out < _FEW:
        noisy = "a loss over so few is noisy (validation_fraction sets their share)"
        lines += ["", f"Only {held_out:,} tokens are held out: {noisy}."]
    report = manifest["report"]
    if lengths := report.get("lengths"):
        lines += ["", "Documents by their length in tokens:", *_histogram(lengths)]
    if len(sources := report.get("sources", [])) > 1:
        lines += ["", "Shares of the inputs:", *_shares(sources)]
    if (found := report.get("duplicates")) and found["documents"]:
        removed = f"{found['documents']:,} ({found['bytes']:,} bytes)"
        lines += ["", f"Duplicates removed, the first of each kept: {removed}"]
    if left_out := report.get("left_out"):
        lines += [
            "",
            "Left out, or to be known (more names in manifest.json):",
            *_reasons(left_out),
        ]
    return lines


def _histogram(lengths: Sequence[int]) -> Iterable[str]:
    most = max(lengths)
    first = next(i for i, count in enumerate(lengths) if count)
    for i, count in enumerate(lengths[first:], first):
        label = f"{1 << i:,} to {(2 << i) - 1:,}" if i else "1"
        yield f"  {label:>25} {count:>12,}  {_bar(count / most)}".rstrip()


def _bar(share: float) -> str:
    """A bar of eighths of a character; what is not nothing shows at least one of them."""
    eighths = max(round(share * _BAR * 8), int(share > 0))
    whole, rest = divmod(eighths, 8)
    return "█" * whole + " ▏▎▍▌▋▊▉"[rest].strip()


def _shares(sources: Sequence[dict[str, Any]]) -> Iterable[str]:
    total = sum(source["tokens"] for source in sources)
    for source in sources:
        share = source["tokens"] / total if total else 0
        yield (
            f"  {share:>6.1%}  {source['tokens']:>13,} tokens  {source['bytes']:>15,} bytes  "
            f"{source['documents']:>10,} documents  {source['name']}"
        )


def _reasons(left_out: dict[str, Any]) -> Iterable[str]:
    for reason, found in left_out.items():
        names = ", ".join(found["first"][:_NAMED])
        more = ", ..." if found["count"] > _NAMED else ""
        yield f"  {found['count']:>8,}  {reason}: {names}{more}"


def _counted(count: int, what: str) -> str:
    return f"1 {what}" if count == 1 else f"{count:,} {what}s"
