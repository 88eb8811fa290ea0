"""Every kind of damage on small shards is found before a token is used.

Reading doesn't notice damage only if no token and no count depends on the byte: then the tokens
read are those written, and `check` names the file.
"""

import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from forescale.data.check import check
from forescale.data.dataset import Damaged, Dataset
from forescale.ground.errors import UserError
from forescale.ground.storage import TABLE, hash_file, read_table, write_json, write_table
from tests.trainer.data.small_dataset import write_dataset

TAR, INDEX = "train-000000.tar", "train-000000.index.json"
BLOCK = tarfile.BLOCKSIZE


@pytest.fixture
def data(tmp_path) -> Path:
    """Two training shards of equal shape, with three members each, and one of validation."""
    return write_dataset(tmp_path / "d", [[40, 30, 70], [40, 30, 70]], [[25]])


def content(dataset: Dataset) -> tuple:
    """Return everything read from the first shard: tokens by both ways of reading, and document
    ends."""
    split = dataset.split("train")
    rows = np.empty((1, split.shard_tokens[0]), np.uint16)
    split.shard(0).read_rows([0], [0], rows)
    tokens = split.read(0, 0, split.shard_tokens[0])
    ends = split.document_ends(0, 0, split.shard_tokens[0])
    return rows.tobytes(), tokens.tobytes(), ends.tobytes()


def both_ways_damaged(dataset: Dataset, match: str) -> None:
    split = dataset.split("train")
    rows = np.empty((1, split.shard_tokens[0]), np.uint16)
    with pytest.raises(Damaged, match=match):
        split.shard(0).read_rows([0], [0], rows)
    with pytest.raises(Damaged, match=match):
        split.read(0, 0, split.shard_tokens[0])


def owners(path: Path) -> dict[int, str]:
    """Return kind and key of the member that each byte of the tar's contents belongs to."""
    members = json.loads((path / INDEX).read_text())["members"]
    return {
        at: f"{kind} {m['key']}"
        for m in members
        for kind in ("tok", "doc")
        for at in range(m[kind]["offset"], m[kind]["offset"] + m[kind]["size"])
    }


def named(path: Path, name: str) -> bool:
    return any(name in fault for fault in check(path))


@pytest.mark.slow  # each byte of a tar
def test_every_flipped_byte_of_a_tar(data):
    tar, good, owner, dataset = data / TAR, (data / TAR).read_bytes(), owners(data), Dataset(data)
    want = content(dataset)
    with open(tar, "r+b", buffering=0) as f:
        for at, byte in enumerate(good):
            os.pwrite(f.fileno(), bytes([byte ^ 1 << at % 8]), at)
            kind, _, key = owner.get(at, "").partition(" ")
            if kind == "tok":
                both_ways_damaged(dataset, rf"{TAR}: member {key} is damaged")
            elif kind == "doc":
                match = rf"{TAR}: member {key} is damaged: its document ends"
                with pytest.raises(Damaged, match=match):
                    content(dataset)
            else:
                assert content(dataset) == want
            if at % 101 == 0:
                assert named(data, TAR)
            os.pwrite(f.fileno(), bytes([byte]), at)
    assert content(dataset) == want


def test_every_block_of_a_tar_zeroed(data):
    tar, good, owner, dataset = data / TAR, (data / TAR).read_bytes(), owners(data), Dataset(data)
    want, caught = content(dataset), 0
    for at in range(0, len(good), BLOCK):
        block = good[at : at + BLOCK]
        tar.write_bytes(good[:at] + bytes(len(block)) + good[at + BLOCK :])
        if any(block):
            assert named(data, TAR)
        if at in owner:
            caught += 1
            with pytest.raises(Damaged, match=rf"{TAR}: member {owner[at].split()[1]} is damaged"):
                content(dataset)
        else:
            assert content(dataset) == want
    assert caught == 6


@pytest.mark.slow  # each length of a tar
def test_a_tar_truncated_to_every_length(data):
    good, dataset = (data / TAR).read_bytes(), Dataset(data)
    for size in range(len(good) - 1, -1, -1):
        os.truncate(data / TAR, size)
        with pytest.raises(Damaged, match=rf"{TAR}: has {size:,} bytes, expected {len(good):,}"):
            dataset.split("train").read(0, 0, 1)
        if size % 1000 == 0:
            assert named(data, TAR)


def test_tars_concatenated_swapped_or_missing(data):
    tar, other = data / TAR, data / "train-000001.tar"
    good, second = tar.read_bytes(), other.read_bytes()
    tar.write_bytes(good + second)
    both_ways_damaged(Dataset(data), rf"{TAR}: has .* bytes, expected")
    assert named(data, TAR)
    tar.write_bytes(second)  # has the same size and layout
    both_ways_damaged(Dataset(data), rf"{TAR}: member 000000 is damaged")
    assert named(data, TAR)
    tar.unlink()
    both_ways_damaged(Dataset(data), rf"{TAR}: is missing")
    assert named(data, f"{TAR}: is missing")


def test_two_concatenated_tars_with_valid_checksums_are_found(data):
    want = content(Dataset(data))
    (data / TAR).write_bytes((data / TAR).read_bytes() + (data / "train-000001.tar").read_bytes())
    seal(data, TAR)
    assert content(Dataset(data)) == want
    (fault,) = check(data)
    problem = r"truncated or damaged: its members end at byte [\d,]+, but no end of a tar follows"
    assert re.search(f"{TAR}: {problem}", fault)


def damaged(path: Path, step: int) -> Iterator[int]:
    """Yield a file with one byte flipped, each in turn, then truncated to every length."""
    good = path.read_bytes()
    with open(path, "r+b", buffering=0) as f:  # in place: rewriting the file is slower
        for at in range(0, len(good), step):
            os.pwrite(f.fileno(), bytes([good[at] ^ 1]), at)
            yield at
            os.pwrite(f.fileno(), good[at : at + 1], at)
    for size in range(len(good) - 1, -1, -step):
        os.truncate(path, size)
        yield size


@pytest.mark.slow  # seconds each
@pytest.mark.parametrize("name", [INDEX, "manifest.json", TABLE, "tokenizer.json"])
def test_every_flipped_byte_and_every_length_of_the_small_files(data, name):
    path, want = data / name, content(Dataset(data))
    size = path.stat().st_size
    step = 1 if size < 3000 else 7
    for number, at in enumerate(damaged(path, step)):
        try:
            dataset = Dataset(data)
            assert dataset.tokenizer_json
            got = content(dataset)
        except UserError as e:
            got = None
            sentence = str(e)
        if got is None:
            assert str(data) in sentence, at
        else:  # entries of files that reading doesn't need
            assert name == TABLE
            assert got == want
        if at < size - 1 and (number % 50 == 0 or (got is not None and number % 5 == 0)):
            assert check(data), at


def seal(path: Path, *names: str, **row) -> None:
    """Make the manifest's first row and the table agree with these files, as if a faulty writer had
    published them."""
    manifest, table = json.loads((path / "manifest.json").read_text()), read_table(path)
    first = manifest["splits"]["train"]["shards"][0]
    first.update(row)
    for name in names:
        table[name] = entry = hash_file(path / name)
        prefix = "" if name.endswith(".tar") else "index_"
        first[f"{prefix}size"], first[f"{prefix}sha256"] = entry.size, entry.sha256
    table["manifest.json"] = write_json(path / "manifest.json", manifest)
    write_table(path, table)


def swap(members):
    members[0], members[1] = members[1], members[0]


def moved(part: str, key: str, by):
    return lambda members: members[1][part].update({key: members[1][part][key] + by})


DISAGREE = {
    "tokens elsewhere": moved("tok", "offset", 2),
    "tokens before the file": moved("tok", "offset", -(1 << 20)),
    "tokens behind the file": moved("tok", "offset", 1 << 30),
    "tokens fewer": moved("tok", "size", -2),
    "ends elsewhere": moved("doc", "offset", 4),
    "ends more": moved("doc", "size", 4),
    "another sum": lambda members: members[1]["tok"].update(xxh3="0" * 16),
    "too many sums": lambda members: members[1]["tok"].update(xxh3="0" * 32),
    "no sum": lambda members: members[1]["tok"].update(xxh3="zz" * 8),
    "another sum of ends": lambda members: members[1]["doc"].update(xxh3="0" * 16),
    "first": lambda members: members[1].update(first=63),
    "one token more": lambda members: members[1].update(tokens=members[1]["tokens"] + 1),
    "no whole number": lambda members: members[1].update(tokens=float(members[1]["tokens"])),
    "one document more": lambda members: members[1].update(documents=9),
    "swapped": swap,
    "one gone": lambda members: members.pop(1),
    "one twice": lambda members: members.append(members[-1]),
    "no key": lambda members: members[0].pop("tok"),
    "none": lambda members: members.clear(),
}


@pytest.mark.parametrize("name", DISAGREE)
def test_an_index_that_disagrees_with_its_tar_is_found_despite_valid_checksums(data, name):
    index = json.loads((data / INDEX).read_text())
    DISAGREE[name](index["members"])
    (data / INDEX).write_text(json.dumps(index))
    seal(data, INDEX)
    with pytest.raises(Damaged, match=rf"{INDEX}|{TAR}: member 00000"):
        content(Dataset(data))
    assert named(data, "train-000000")


def test_the_index_of_another_shard_is_found_despite_valid_checksums(data):
    shutil.copy(data / "train-000001.index.json", data / INDEX)
    both_ways_damaged(Dataset(data), rf"{INDEX}: damaged: its sha256")
    seal(data, INDEX)  # its layout is the same, its sums are not
    both_ways_damaged(Dataset(data), rf"{TAR}: member 000000 is damaged")
    assert named(data, f"{TAR}: member 000002 is damaged")


def test_counts_of_the_manifest_are_compared_not_only_hashes(data):
    seal(data, documents=4)
    faults = check(data)
    assert any("the shards of train hold 7 documents, the manifest says 6" in f for f in faults)
    assert any(f"{INDEX}: its number of documents differs from the manifest" in f for f in faults)


def test_the_headers_of_a_tar_are_compared_with_its_index(data):
    first = Dataset(data).split("train").shard(0).members[0]
    info = tarfile.TarInfo("000000.other.bin")
    info.size = first.tok["size"]
    with open(data / TAR, "r+b") as f:
        f.seek(first.tok["offset"] - BLOCK)
        f.write(info.tobuf(tarfile.USTAR_FORMAT))
    seal(data, TAR)
    assert [f.split(": ", 1)[1].split(" at")[0] for f in check(data)] == [
        "the index has member 000000.tok.bin",
        "the tar has member 000000.other.bin",
    ]


def test_invalid_ids_and_document_ends_are_found(data):
    """All checksums are correct but the contents aren't: what a faulty writer could publish."""
    path = data.parent / "odd"
    write_dataset(path, [[40, 30, 70]])
    dataset = Dataset(path)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["tokenizer"] |= {"vocab_size": 200, "end_of_text": 7}
    table = read_table(path)
    table["manifest.json"] = write_json(path / "manifest.json", manifest)
    write_table(path, table)
    assert dataset.vocab_size == 257
    faults = check(path)
    assert f"{path}/{TAR}: member 000000 holds token ids outside the vocabulary" in faults
    assert any("member 000000 has a document that doesn't end with" in fault for fault in faults)
