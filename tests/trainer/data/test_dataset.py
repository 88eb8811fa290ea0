"""Reading: exact across members, readable by webdataset, and damage is found before use."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import webdataset

from forescale.data import shard as module
from forescale.data.check import check
from forescale.data.dataset import Dataset
from forescale.data.shard import CHUNK, ShardMemory
from forescale.ground.errors import UserError
from tests.trainer.data.small_dataset import write_dataset


@pytest.fixture
def copy(dataset, tmp_path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


def webdataset_tokens(path: Path, split: str, dtype="<u2") -> list[np.ndarray]:
    """Return each tar's tokens as plain webdataset reads them."""
    tars = sorted(path.glob(f"{split}-*.tar"))
    return [
        np.concatenate(
            [
                np.frombuffer(sample["tok.bin"], dtype)
                for sample in webdataset.WebDataset(str(tar), shardshuffle=False)
            ]
        )
        for tar in tars
    ]


def test_plain_webdataset_reads_the_same_tokens(dataset):
    split = Dataset(dataset).split("train")
    tars = webdataset_tokens(dataset, "train")
    assert [len(t) for t in tars] == split.shard_tokens
    for shard, want in enumerate(tars):
        assert (split.read(shard, 0, len(want)) == want).all()
    samples = list(webdataset.WebDataset(str(dataset / "train-000000.tar"), shardshuffle=False))
    assert [s["__key__"] for s in samples] == [f"{i:06d}" for i in range(len(samples))]
    assert len(samples) > 2
    ends = np.frombuffer(samples[0]["doc.bin"], "<u4")
    tokens = np.frombuffer(samples[0]["tok.bin"], "<u2")
    assert (ends - 1).tolist() == np.flatnonzero(tokens == Dataset(dataset).end_of_text).tolist()


def test_any_range_reads_across_members(dataset):
    split = Dataset(dataset).split("train")
    whole = webdataset_tokens(dataset, "train")[1]
    rng = np.random.default_rng(0)
    for start, end in np.sort(rng.integers(0, len(whole) + 1, (300, 2)), axis=1):
        assert (split.read(1, int(start), int(end - start)) == whole[start:end]).all()
    with pytest.raises(ValueError, match="of"):
        split.read(1, len(whole) - 1, 2)


def reads_of(shard, monkeypatch) -> list[int]:
    """Return a list that receives the sizes of a shard's reads from now on."""
    sizes, read = [], shard.file.read_at
    monkeypatch.setattr(
        shard, "_read_at", lambda at, into: (sizes.append(len(into)), read(at, into))
    )
    return sizes


def rows_of(split, shard: int, starts: list[int], length: int) -> np.ndarray:
    rows = np.empty((len(starts), length), np.int64)
    split.shard(shard).read_rows(range(len(starts)), starts, rows)
    return rows


def test_the_first_window_reads_one_chunk_and_the_next_ones_nothing(tmp_path, monkeypatch):
    path = write_dataset(tmp_path / "d", [[1000] * 200], member=100_000)
    split = Dataset(path).split("train")
    sizes = reads_of(split.shard(0), monkeypatch)
    want = split.read(0, 110_000, 40_000)
    assert sum(sizes) <= 3 * CHUNK
    sizes.clear()
    assert (rows_of(split, 0, [110_000, 110_100], 500) == [want[:500], want[100:600]]).all()
    assert sizes == [CHUNK]
    assert (rows_of(split, 0, [110_300], 500) == want[300:800]).all()
    assert sizes == [CHUNK]
    assert (rows_of(split, 0, [99_990], 500)[0] == split.read(0, 99_990, 500)).all()


def test_rows_come_from_the_verified_bytes(tmp_path):
    path = write_dataset(tmp_path / "d", [[100] * 5])
    split = Dataset(path).split("train")
    want, tar = rows_of(split, 0, [0], 500), path / "train-000000.tar"
    tar.write_bytes(bytes(tar.stat().st_size))
    assert (rows_of(split, 0, [0], 500) == want).all()
    with pytest.raises(UserError, match="damaged"):
        rows_of(Dataset(path).split("train"), 0, [0], 500)


def test_a_window_over_many_members_includes_the_middle_ones(tmp_path):
    path = write_dataset(tmp_path / "d", [[100] * 5])
    split = Dataset(path).split("train")
    rows_of(split, 0, [0, 300], 10)
    assert (rows_of(split, 0, [0], 320)[0] == split.read(0, 0, 320)).all()


@pytest.mark.parametrize("limit", [0, 1000, 2500, 10_000])
def test_rows_are_the_same_for_any_memory_limit(limit, tmp_path, monkeypatch):
    path = write_dataset(tmp_path / "d", [[90] * 5, [50] * 10, [1] * 70])
    monkeypatch.setattr(module, "MEMORY", ShardMemory(limit))
    split, plain = Dataset(path).split("train"), Dataset(path).split("train")
    rng = np.random.default_rng(0)
    for _ in range(60):
        shard, length = int(rng.integers(3)), int(rng.integers(1, 70))
        starts = rng.integers(0, split.shard_tokens[shard] - length + 1, 5).tolist()
        for start, row in zip(starts, rows_of(split, shard, starts, length), strict=True):
            assert (row == plain.read(shard, start, length)).all()
        held = [split.shard(i)._resident for i in range(3)]
        assert sum(r.tokens.nbytes for r in held if r and r.tokens is not None) <= limit
    for starts in ([-1], [split.shard_tokens[0] - 9]):
        with pytest.raises(ValueError, match="tokens"):
            rows_of(split, 0, starts, 10)


def test_truncation_while_open_is_found(copy):
    split = Dataset(copy).split("train")
    split.read(0, 0, 1)
    with open(copy / "train-000000.tar", "r+b") as f:
        f.truncate(700)
    for read in (split.read, lambda shard, start, n: rows_of(split, shard, [start], n)):
        problem = r"train-000000\.tar: member 000002: ends after .* too early"
        with pytest.raises(UserError, match=problem):
            read(0, 1000, 1)


def test_missing_files_raise_a_clear_error(copy, tmp_path):
    with pytest.raises(UserError, match=r"no such dataset.*forescale shards"):
        Dataset(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a dataset"):
        Dataset(tmp_path)
    with pytest.raises(UserError, match=r"no split 'test'.*train, validation"):
        Dataset(copy).split("test")
    assert "no such" in check(tmp_path / "nowhere")[0]
