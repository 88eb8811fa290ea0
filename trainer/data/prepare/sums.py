"""The sums of a dataset for its manifest: by split, by input, by length, and of what was left out.

Invariant: they come from the facts of units alone, in the order of the source, so they are the same
for any number of processes. The digest chains the documents' hashes in that order.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from forescale.data.prepare.selection import SPLITS, VALIDATION, Bounds
from forescale.data.text.documents import ReadingReport, Unit

_OF_INPUTS = ("documents", "bytes", "tokens", "read_bytes")
Facts = Mapping[str, Any]


def sums_of(
    counted: Iterable[tuple[Unit, Facts, Facts]], inputs: Sequence[str], bounds: Bounds
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Return documents, tokens and bytes of each split, the report, and the corpus hash. counted:
    each unit with the facts of its hashes and of its tokens; inputs: names."""
    splits: dict[str, Any] = {name: {"documents": 0, "tokens": 0, "bytes": 0} for name in SPLITS}
    sources = [dict.fromkeys(_OF_INPUTS, 0) for _ in inputs]
    lengths, left_out, corpus = np.zeros(64, np.int64), ReadingReport(), hashlib.sha256()
    for unit, hashed, encoded in counted:
        source = sources[unit.source]
        source["read_bytes"] += hashed["bytes"]
        for name, split in encoded["splits"].items():
            for key, count in split.items():
                splits[name][key] += count
                source[key] += count
        if bounds.tails[unit.source]:  # two parts of one document
            divided = encoded["splits"][VALIDATION]["documents"]
            source["documents"] -= divided
            source["divided"] = source.get("divided", 0) + divided
        lengths += encoded["lengths"]  # documents of 2^i tokens and more, with end of text
        for facts in (hashed, encoded):
            left_out.merge(ReadingReport(**facts["report"]))
        corpus.update(encoded["digest"].encode())
    read_bytes = sum(source["read_bytes"] for source in sources)
    duplicates = {
        "documents": left_out.counts.get("duplicate", 0),
        "bytes": read_bytes - sum(split["bytes"] for split in splits.values()),
    }
    named = zip(inputs, sources, strict=True)
    report = {
        "duplicates": duplicates,
        "lengths": np.trim_zeros(lengths, "b").tolist(),
        "sources": [{"name": name, **source} for name, source in named],
        "left_out": left_out.as_dict(),
    }
    return splits, report, corpus.hexdigest()
