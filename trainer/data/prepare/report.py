"""Summary of a build for people: totals, lengths, duplicates, skipped text, shares of inputs.

Invariant: all printed numbers are stored in the manifest, so they can be printed again later.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from forescale.data.prepare.selection import SPLITS
from forescale.data.text.documents import ReadingReport, Unit

_BAR = 40  # characters of the longest bar in the histogram
_FEW = 1 << 15  # held-out tokens below which the loss has an error of some percent
_NAMED = 3  # examples printed for each reason; the manifest has up to 200


class Totals:
    """Adds up the facts of the units' files, in source order."""

    def __init__(self, sources: Sequence[str]):
        self.splits = {s: dict.fromkeys(("documents", "tokens", "bytes"), 0) for s in SPLITS}
        self.lengths: list[int] = [0] * 64
        self.sources: list[dict[str, Any]] = [
            {"name": name, "documents": 0, "bytes": 0, "tokens": 0, "read_bytes": 0}
            for name in sources
        ]
        self.left_out = ReadingReport()

    def add(self, unit: Unit, hashed: dict[str, Any], encoded: dict[str, Any]) -> None:
        """Add the facts of a unit's files in hashes/ and in tokens/."""
        source = self.sources[unit.source]
        source["read_bytes"] += hashed["bytes"]
        for name, split in encoded["splits"].items():
            for key, count in split.items():
                self.splits[name][key] += count
                source[key] += count
        self.lengths = [a + b for a, b in zip(self.lengths, encoded["lengths"], strict=True)]
        for facts in (hashed, encoded):
            self.left_out.merge(ReadingReport(**facts["report"]))

    def as_dict(self) -> dict[str, Any]:
        """Return the manifest's report.

        lengths: number of documents with 2^i to 2^(i+1) - 1 tokens, including end of text; bytes of
        duplicates: of their text.
        """
        longest = max((i for i, count in enumerate(self.lengths) if count), default=-1)
        return {
            "duplicates": {
                "documents": self.left_out.counts.get("duplicate", 0),
                "bytes": sum(s["read_bytes"] for s in self.sources)
                - sum(split["bytes"] for split in self.splits.values()),
            },
            "lengths": self.lengths[: longest + 1],
            "sources": self.sources,
            "left_out": self.left_out.as_dict(),
        }


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
        lines += ["", "Document lengths in tokens:", *_histogram(lengths)]
    if len(sources := report.get("sources", [])) > 1:
        lines += ["", "Shares of the inputs:", *_shares(sources)]
    if (duplicates := report.get("duplicates")) and duplicates["documents"]:
        removed = f"{duplicates['documents']:,} ({duplicates['bytes']:,} bytes)"
        lines += ["", f"Duplicates removed, the first of each kept: {removed}"]
    if left_out := report.get("left_out"):
        lines += ["", "Left out or changed (more names in manifest.json):"]
        for reason, cases in left_out.items():
            names = ", ".join(cases["first"][:_NAMED]) + ", ..." * (cases["count"] > _NAMED)
            lines.append(f"  {cases['count']:>8,}  {reason}: {names}")
    return lines


def _histogram(lengths: Sequence[int]) -> Iterable[str]:
    most = max(lengths)
    first = next(i for i, count in enumerate(lengths) if count)
    for i, count in enumerate(lengths[first:], first):
        label = f"{1 << i:,} to {(2 << i) - 1:,}" if i else "1"
        yield f"  {label:>25} {count:>12,}  {_bar(count / most)}".rstrip()


def _bar(share: float) -> str:
    """Return a bar in eighths of a character; a positive share has at least one eighth."""
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
