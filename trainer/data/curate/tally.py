"""Counts of a curation: what each step read, changed and dropped, and samples of it.

Invariant: the tallies of all units, added up in any order, are that of the whole, but of rare
domains. Samples are chosen by a hash of the document, so they depend on no order.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import xxhash

from forescale.data.curate.step import Draft

_SAMPLE = 1_000  # characters of a sample
_DOMAINS = 1_000  # kept of each unit, so that the counts of rare domains are approximate
_EDGE = 120  # characters shown before the first change


@dataclass
class Tally:
    """The counts of a curation.

    steps: by name, {"read", "changed", "dropped": by reason} of [documents, bytes]; bytes of
    `changed` are what the step took away. lengths: [read, kept] documents of 2^i bytes and more.
    languages, domains: by name, [kept, dropped] documents. samples: by step and reason, [hash,
    name, text] of documents that were dropped, or before and after of those that were changed.
    """

    samples_wanted: int
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    lengths: list[list[int]] = field(default_factory=lambda: [[0] * 64 for _ in range(2)])
    languages: dict[str, list[int]] = field(default_factory=dict)
    domains: dict[str, list[int]] = field(default_factory=dict)
    samples: dict[str, list[list[Any]]] = field(default_factory=dict)

    def step(self, name: str) -> dict[str, Any]:
        return self.steps.setdefault(name, {"read": [0, 0], "changed": [0, 0], "dropped": {}})

    def read(self, size: int) -> None:
        """Count a document as it was read."""
        self.lengths[0][size.bit_length() - 1] += 1

    def changed(self, name: str, before: str, draft: Draft) -> None:
        """Count a change of a step."""
        _add(self.step(name)["changed"], _size(before) - _size(draft.text))
        start = _first_difference(before, draft.text)
        self._sample(f"{name}: changed", draft.name, before[start:], draft.text[start:])

    def arrived(self, name: str, size: int) -> None:
        """Count a document that comes to a step."""
        _add(self.step(name)["read"], size)

    def dropped(
        self,
        name: str,
        reason: str,
        draft: Draft,
        size: int,
        *,
        stays: tuple[int, int] | None = None,
    ) -> None:
        """Count a document that a step dropped. stays: the document (unit, number) for which it
        goes, whose text its sample gets by `fill`."""
        _add(self.step(name)["dropped"].setdefault(reason, [0, 0]), size)
        self._sample(f"{name}: {reason}", draft.name, draft.text, *([stays] if stays else []))
        self._of_attributes(draft, 1)

    def fill(self, fetch: Callable[[int, int], str]) -> None:
        """Put texts where samples name documents."""
        for samples in self.samples.values():
            for sample in samples:
                if isinstance(sample[-1], tuple):
                    sample[-1] = fetch(*sample[-1])[:_SAMPLE]

    def remains(self, draft: Draft, size: int) -> None:
        """Count a document that all steps kept."""
        self.lengths[1][size.bit_length() - 1] += 1
        self._of_attributes(draft, 0)

    def merge(self, other: "Tally") -> None:
        """Add the counts of another part."""
        for name, counts in other.steps.items():
            mine = self.step(name)
            for kind in ("read", "changed"):
                _add(mine[kind], counts[kind][1], counts[kind][0])
            for reason, (documents, size) in counts["dropped"].items():
                _add(mine["dropped"].setdefault(reason, [0, 0]), size, documents)
        for row, added in zip(self.lengths, other.lengths, strict=True):
            row[:] = map(sum, zip(row, added, strict=True))
        for name in ("languages", "domains"):
            table = getattr(self, name)
            for key, (remaining, dropped) in getattr(other, name).items():
                _add(table.setdefault(key, [0, 0]), dropped, remaining)
        for kind, samples in other.samples.items():
            self.samples[kind] = self._chosen(self.samples.get(kind, []) + samples)

    def as_dict(self) -> dict[str, Any]:
        """Return the counts as plain values; of domains the most frequent ones."""
        most = Counter({domain: sum(pair) for domain, pair in self.domains.items()})
        domains = {domain: self.domains[domain] for domain, _ in sorted(
            most.items(), key=lambda item: (-item[1], item[0]))[:_DOMAINS]}  # fmt: skip
        return {**vars(self), "domains": domains}

    def _of_attributes(self, draft: Draft, place: int) -> None:
        if language := draft.attributes.get("language"):
            self.languages.setdefault(str(language), [0, 0])[place] += 1
        if draft.url:
            self.domains.setdefault(domain_of(draft.url), [0, 0])[place] += 1

    def _sample(self, kind: str, name: str, *texts: str | tuple[int, int]) -> None:
        if self.samples_wanted:
            of = xxhash.xxh3_64_intdigest(f"{kind}\0{name}".encode())
            sample: list[Any] = [of, name, *(text[:_SAMPLE] for text in texts)]
            self.samples[kind] = self._chosen([*self.samples.get(kind, []), sample])

    def _chosen(self, samples: list[list[Any]]) -> list[list[Any]]:
        return sorted(samples)[: self.samples_wanted]


def domain_of(url: str) -> str:
    """Return the host of an address without "www."; "" if it has none."""
    try:
        host = (urlsplit(url).hostname or "").removeprefix("www.")
        return host if len(host) <= 253 else ""  # of the domain name system
    except ValueError:
        return ""


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _add(pair: list[int], second: int, first: int = 1) -> None:
    pair[0] += first
    pair[1] += second


def _first_difference(a: str, b: str) -> int:
    """Return where to begin to show a change: somewhat before its first character."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return max(0, low - _EDGE)
