"""Proof, from the rows of a run and its shards, of which tokens it was trained on.

Invariant: a run without a fault here consumed exactly the samples that its rows and its skipped
intervals tile, and each row's tokens_hash is that of the tokens that the shards hold today. Imports
no torch, changes nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from forescale.config.train import TrainJob
from forescale.data.feed import Feed, Lost
from forescale.data.mixture import Interval
from forescale.data.sources import Sources
from forescale.errors import UserError
from forescale.run.feed import feed_of
from forescale.run.start import open_dataset

Row = dict[str, Any]
_AT_ONCE = 64  # rows that threads work on together


def feed_of_run(job: TrainJob, identity: Row, skipped: Sequence[Interval]) -> Feed:
    """The feed of a run from what it remembers of its data.

    Raises UserError where a dataset isn't where it was, or is another one now.
    """
    found = {}
    for name, stored in identity["dataset"]["sources"].items():
        path = stored["path"]
        if "://" not in path and not Path(path).exists():
            what = f"the dataset {name} is not at {path} any more"
            raise UserError("run.json", what, "bring it back there to have its tokens compared")
        found[name] = open_dataset(path, job.data)
        if found[name].identity != stored["identity"]:
            what = f"holds another dataset now than the run was trained on as {name}"
            raise UserError(path, what, "restore the one that was there")
    return feed_of(job, Sources(found), skipped)


def replay_faults(
    rows: Sequence[Row], feed: Feed, tick: Callable[[int], None] = lambda tokens: None
) -> Iterator[str]:
    """A sentence for each kind of disagreement between rows and shards, at its first step; `tick`
    hears of tokens compared. Raises UserError where the data can't be read."""
    said: set[str] = set()

    def compare(row: Row) -> tuple[str, str] | None:
        samples = samples_of(row, feed)
        lost = frozenset(Lost(*member) for member in row.get("quarantined", ()))
        found = feed.read(samples, lost)
        shares = dict(zip(feed.names, feed.targets(samples).tolist(), strict=True))
        where = f"step {row['step']:,}"
        if shares != row["shares"]:
            return "shares", f"{where} says {row['shares']} targets, its samples have {shares}"
        if found.hash != row["tokens_hash"]:
            return "hash", f"{where} was trained on other tokens than the shards hold now"
        if unknown := found.lost:
            return "lost", f"{where} read {sorted(unknown)[0]}, which is damaged now"
        return None

    with ThreadPoolExecutor(4) as pool:
        remaining = iter(rows)
        while some := list(islice(remaining, _AT_ONCE)):
            for fault in pool.map(compare, some):
                if fault and fault[0] not in said:
                    said.add(fault[0])
                    yield fault[1]
            tick(sum(sum(row["shares"].values()) for row in some))


def samples_of(row: Row, feed: Feed) -> list[Interval]:
    """The samples of a row's step: [g0, g1) without what is skipped."""
    width = row["g1"] - row["g0"]
    passed = sum(max(0, min(b, row["g1"]) - max(a, row["g0"])) for a, b in feed.skipped)
    return feed.step(row["g0"], width - passed)
