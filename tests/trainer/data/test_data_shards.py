"""Reading: exact across members, readable by webdataset, and damage is caught before use."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from trainer.data.check import check
from trainer.data.shards import Dataset, Shard
from trainer.durable import hash_file, read_table, write_json, write_table
from trainer.errors import UserError


@pytest.fixture
def copy(dataset, tmp_path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


def webdataset_tokens(path: Path, split: str, dtype="<u2") -> list[np.ndarray]:
    """Each tar's tokens as plain webdataset reads them."""
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


def test_a_member_is_verified_once_and_before_its_first_use(dataset, monkeypatch):
    verified = []
    verify = Shard.verify
    monkeypatch.setattr(Shard, "verify", lambda s, at: (verified.append(at), verify(s, at))[1])
    split = Dataset(dataset).split("train")
    split.read(0, 410, 10)
    assert verified == [1]
    split.read(0, 390, 30)
    split.read(0, 390, 30)
    assert verified == [1, 0]


def test_every_flipped_byte_of_a_tar_is_found(copy):
    """Payload flips are caught on reading; flips anywhere (headers, padding) by check."""
    tar = copy / "validation-000000.tar"
    good = tar.read_bytes()
    members = json.loads((copy / "validation-000000.index.json").read_text())["members"]
    rng = np.random.default_rng(0)
    for at in sorted({0, 100, len(good) - 1, *map(int, rng.integers(0, len(good), 40))}):
        tar.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        assert any("validation-000000.tar" in fault for fault in check(copy))
        split = Dataset(copy).split("validation")
        for m in members:
            begin, end = m["tok"]["offset"], m["tok"]["offset"] + m["tok"]["size"]
            if begin <= at < end:
                match = rf"validation-000000\.tar: member {m['key']}\.tok\.bin is damaged"
                with pytest.raises(UserError, match=match):
                    split.read(0, m["first"], 1)
            else:
                split.read(0, m["first"], 1)


def test_truncation_is_found(copy):
    tar = copy / "train-000001.tar"
    good = tar.read_bytes()
    for size in (0, 511, 512, 1000, len(good) // 2, len(good) - 1):
        tar.write_bytes(good[:size])
        with pytest.raises(UserError, match=r"train-000001\.tar: .* bytes where the manifest"):
            Dataset(copy).split("train").read(1, 0, 1)
        assert any("train-000001.tar" in fault for fault in check(copy))


def test_truncation_while_open_is_found(copy):
    split = Dataset(copy).split("train")
    split.read(0, 0, 1)
    with open(copy / "train-000000.tar", "r+b") as f:
        f.truncate(700)
    with pytest.raises(UserError, match="cut off in member 000002"):
        split.read(0, 1000, 1)


def test_a_foreign_tar_or_index_is_found(copy):
    shutil.copy(copy / "train-000000.tar", copy / "train-000001.tar")
    with pytest.raises(UserError, match=r"train-000001\.tar"):
        Dataset(copy).split("train").read(1, 0, 1)
    index = copy / "train-000002.index.json"
    index.write_text(index.read_text().replace('"first": 400', '"first": 401'))
    with pytest.raises(UserError, match=r"train-000002\.index\.json: damaged"):
        Dataset(copy).split("train").read(2, 0, 1)
    faults = check(copy)
    assert any("train-000001.tar" in f for f in faults)
    assert any("train-000002.index.json" in f for f in faults)


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json", "files.json"])
def test_flips_in_the_small_files_are_found(copy, name):
    path = copy / name
    good = path.read_bytes()
    for at in range(0, len(good), max(1, len(good) // 25)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        assert check(copy), at
    if name == "tokenizer.json":
        with pytest.raises(UserError, match=r"tokenizer\.json: damaged"):
            _ = Dataset(copy).tokenizer
    if name == "manifest.json":
        with pytest.raises(UserError, match=r"manifest\.json: damaged"):
            Dataset(copy)


def test_missing_things_have_a_sentence(copy, tmp_path):
    with pytest.raises(UserError, match=r"no such dataset.*forescale shards"):
        Dataset(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a dataset"):
        Dataset(tmp_path)
    with pytest.raises(UserError, match=r"no split 'test'.*train, validation"):
        Dataset(copy).split("test")
    (copy / "train-000001.tar").unlink()
    with pytest.raises(UserError, match=r"train-000001\.tar: missing"):
        Dataset(copy).split("train").read(1, 0, 1)
    assert any("train-000001.tar: missing" in fault for fault in check(copy))
    assert "no such" in check(tmp_path / "nowhere")[0]


def reseal(path: Path, edit) -> None:
    """Edit the manifest and make its table agree: what a faulty writer would have published."""
    manifest = json.loads((path / "manifest.json").read_text())
    edit(manifest["splits"]["train"]["shards"][0])
    entry = write_json(path / "manifest.json", manifest)
    write_table(path, {**read_table(path), "manifest.json": entry})


def test_check_counts_documents_and_not_only_hashes(copy):
    def one_more(row):
        row["documents"] += 1

    reseal(copy, one_more)
    faults = check(copy)
    assert any("the shards of train hold" in f for f in faults)
    assert any("train-000000.tar" in f and "documents where the manifest says" in f for f in faults)


def test_check_compares_the_headers_of_a_tar_with_its_index(copy):
    tar, first = copy / "train-000000.tar", Dataset(copy).split("train").shard(0).members[0]
    info = tarfile.TarInfo("000000.other.bin")
    info.size = first.tok["size"]
    with open(tar, "r+b") as f:
        f.seek(first.tok["offset"] - tarfile.BLOCKSIZE)
        f.write(info.tobuf(tarfile.USTAR_FORMAT))
    entry = hash_file(tar)
    write_table(copy, {**read_table(copy), tar.name: entry})
    reseal(copy, lambda row: row.update(sha256=entry.sha256))
    assert [f.split(": ", 1)[1].split(" at")[0] for f in check(copy)] == [
        "the index has member 000000.tok.bin",
        "the tar has member 000000.other.bin",
    ]
