"""Near-duplicates over units: which stay, whatever the workers, the ranges and the restarts."""

import hashlib
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forescale.data.curate import duplicates as module
from forescale.data.curate.duplicates import (
    Duplicates,
    Signatures,
    dropped_of,
    find_edges,
    resolve,
    sign_unit,
    signatures,
)
from forescale.data.prepare.columns import UnitWriter
from forescale.data.prepare.pool import Pool, Task
from forescale.data.prepare.selection import range_edges
from forescale.ground.errors import UserError

pytest.importorskip("daft")
Place = tuple[int, int]


def silent(size: int, tokens: int) -> None:
    pass


def text(kind: int, change: int = 0) -> str:
    """A text of 120 words; those of one kind differ in the words of `change`, 5 % at most."""
    return " ".join(
        f"k{chr(97 + kind)}{chr(97 + i // 10)}{'abcdefghij'[i % 10]}" for i in range(120)
    ) + (" end" + "x" * change if change else "")


def sign(
    directory: Path, number: int, texts: Sequence[str], options: Duplicates, scores=None
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with UnitWriter(directory / f"{number:06d}") as out:
        out.finish(sign_unit(texts, out, options, scores))


def deduplicated(
    work: Path,
    units: Sequence[Sequence[str]],
    options: Duplicates | None = None,
    *,
    sources: Sequence[int] | None = None,
    scores: Sequence[Sequence[float]] | None = None,
    per_range: int = 1 << 20,
    workers: int = 1,
) -> dict[Place, Place]:
    """Return the documents that go, and for which."""
    options = options or Duplicates()
    for number, texts in reversed(list(enumerate(units))):
        sign(work / "signatures", number, texts, options, scores and scores[number])
    signed = signatures(work / "signatures", sources or [0] * len(units), options)
    (work / "edges").mkdir(exist_ok=True)
    edges = range_edges(signed.keys, per_range)
    job = partial(find_edges, signed, work / "edges")
    tasks = [
        Task("range", job, (i, *bounds), 0, Path()) for i, bounds in enumerate(pairwise(edges))
    ]
    with Pool(workers) as pool:
        pool.run(tasks, silent)
    paths = [work / "edges" / f"{i:04d}" for i in range(len(tasks))]
    resolve(signed, paths, work / "duplicates", options, silent)
    rows = [
        (n, *row) for n in range(len(units)) for row in dropped_of(work / "duplicates", n).tolist()
    ]
    return {(n, document): (unit, other) for n, document, unit, other in rows}


@pytest.mark.parametrize(
    ("rule", "stays"), [("first", (0, 1)), ("longest", (2, 0)), ("score", (1, 0))]
)
def test_one_of_each_component_stays_by_the_rule(tmp_path, rule, stays):
    units = [[text(0), text(1)], [text(1, 2)], [text(1, 9), text(2)], []]
    scores = [[0.0, 0.5], [0.9], [float("nan"), 1.0], []]
    gone = deduplicated(tmp_path, units, Duplicates(stays=rule), scores=scores)
    assert gone == {place: stays for place in [(0, 1), (1, 0), (2, 0)] if place != stays}


@pytest.mark.parametrize("rule", ["first", "longest", "score"])
def test_of_equal_ranks_the_first_in_source_order_stays(tmp_path, rule):
    units = [[], [text(0), text(0)], [text(0)]]
    scores = [[], [1.0, 1.0], [1.0]]
    gone = deduplicated(tmp_path, units, Duplicates(stays=rule), scores=scores)
    assert gone == {(1, 1): (1, 0), (2, 0): (1, 0)}


def test_sources_are_compared_alone_or_together(tmp_path):
    units = [[text(0)], [text(0), text(0)], [text(0)]]
    alone = Duplicates(across_sources=False)
    gone = deduplicated(tmp_path / "alone", units, alone, sources=[0, 1, 0])
    assert gone == {(1, 1): (1, 0), (2, 0): (0, 0)}
    assert len(deduplicated(tmp_path / "together", units, sources=[0, 1, 0])) == 3


def test_nothing_goes_without_near_duplicates(tmp_path):
    assert deduplicated(tmp_path, [[text(0), text(1)], [], [text(2), ""]]) == {}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_result_does_not_depend_on_workers_ranges_runs_or_restarts(tmp_path, monkeypatch):
    units = [[text((i * 7 + n) % 20, (i + n) % 3) for i in range(30)] for n in range(4)]
    options = Duplicates(stays="longest")
    whole = deduplicated(tmp_path / "whole", units, options)
    assert 0 < len(whole) < 120
    monkeypatch.setattr(module, "_RUN", 14 * 7)  # runs of seven documents
    monkeypatch.setattr("forescale.data.curate.minhash._TEXTS", 5)
    monkeypatch.setattr(module, "_RANGE", 10)  # of nodes and edges that wait
    assert deduplicated(tmp_path / "ranges", units, options, per_range=100) == whole
    assert digest(tmp_path / "ranges" / "duplicates") == digest(tmp_path / "whole" / "duplicates")
    # A torn range is made again; whole ones are used as they are.
    work = tmp_path / "ranges"
    torn, intact = sorted((work / "edges").iterdir())[:2]
    raw, before = torn.read_bytes(), intact.stat().st_mtime_ns
    torn.write_bytes(raw[:-9])
    (work / "duplicates").unlink()
    assert deduplicated(work, units, options, per_range=100) == whole
    assert torn.read_bytes() == raw
    assert intact.stat().st_mtime_ns == before
    assert deduplicated(tmp_path / "workers", units, options, per_range=400, workers=2) == whole


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 40).flatmap(
        lambda n: st.tuples(
            st.just(n),
            st.lists(st.lists(st.tuples(*[st.integers(0, n - 1)] * 2), max_size=20), max_size=4),
        )
    )
)
def test_components_are_those_of_a_search(tmp_path_factory, graph):
    count, batches = graph
    root = np.arange(count)
    for batch in batches:
        a, b = np.array(batch, np.int64).reshape(-1, 2).T
        module._join(root, a, b)
    below = list(range(count))  # the lowest that is reached
    for _ in range(count):
        for a, b in (edge for batch in batches for edge in batch):
            below[a] = below[b] = min(below[a], below[b])
    assert root.tolist() == below


def test_scores_that_are_missing_are_a_fault(tmp_path):
    with pytest.raises(ValueError, match="1 scores for 2 texts"):
        sign(tmp_path, 0, [text(0), text(1)], Duplicates(stays="score"), [1.0])
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_rule():
    with pytest.raises(UserError, match="choose first, longest, score"):
        Duplicates(stays="best").check()


def test_a_chain_is_one_component(tmp_path):
    edges = tmp_path / "0000"
    pairs = np.array([[5, 3], [3, 1], [9, 8]], "<u8")
    with UnitWriter(edges) as out:
        out.finish({"keys": 6, "edges": 3, "offset": out.add(pairs)})
    signed = Signatures(tmp_path, [[], [], []], [0, 4, 4, 10], [0, 0, 0])
    resolve(signed, [edges], tmp_path / "out", Duplicates(), silent)
    assert dropped_of(tmp_path / "out", 0).tolist() == [[3, 0, 1]]
    assert dropped_of(tmp_path / "out", 1).tolist() == []
    assert dropped_of(tmp_path / "out", 2).tolist() == [[1, 0, 1], [5, 2, 4]]
