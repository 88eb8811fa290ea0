"""Tokenised corpora used where they lie: the same windows as numpy's, and no damage unnoticed."""

import io
import os
import re
import signal
import struct
import subprocess
import sys
import tarfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hostile_server import HostileServer
from small_dataset import END

from trainer.data.check import check
from trainer.data.shards import Dataset
from trainer.data.tokenised.inplace import in_place_kind, index_corpus
from trainer.errors import UserError
from trainer.verbs import shards as verb

SIZES = {"validation_fraction": 0.1, "shard_tokens": 4000, "member_tokens": 1500}
CODES = {"uint8": 1, "int32": 4, "int64": 5, "uint16": 8}  # of Megatron


def corpus(seed=0, tokens=20_000) -> list[np.ndarray]:
    """Documents of bytes, each with its end-of-text."""
    rng, documents = np.random.default_rng(seed), []
    while tokens > 0:
        length = int(rng.integers(1, 400))
        documents.append(np.append(rng.integers(0, 256, length - 1), END))
        tokens -= length
    return documents


def write_megatron(path: Path, documents: list[np.ndarray], dtype="uint16", sequences=2) -> Path:
    """As Megatron's builder does; every document in up to `sequences` sequences."""
    parts = [np.array_split(d, min(sequences, len(d))) for d in documents]
    sizes = [len(s) for d in parts for s in d]
    pointers = (np.cumsum(sizes) - sizes) * np.dtype(dtype).itemsize
    firsts = np.cumsum([0, *map(len, parts)])
    np.concatenate(documents).astype(dtype).tofile(path.with_suffix(".bin"))
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, CODES[dtype], len(sizes), len(firsts))
    arrays = [np.array(sizes, "<i4"), pointers.astype("<i8"), firsts.astype("<i8")]
    path.with_suffix(".idx").write_bytes(head + b"".join(a.tobytes() for a in arrays))
    return path.with_suffix(".bin")


def write_tar(path: Path, windows: np.ndarray, suffix="npy") -> Path:
    """A webdataset as others write theirs, with the dataset's own writer."""
    with webdataset.TarWriter(str(path)) as tar:
        for i, window in enumerate(windows):
            raw = window.tobytes() if suffix != "npy" else window
            tar.write({"__key__": f"{i:06d}", suffix: raw, "json": {"i": i}})
    return path


def placed(split) -> list[np.ndarray]:
    """The tokens of a split by numpy's own memmap, from where its index says that they lie."""
    found = []
    for number in range(len(split.shard_tokens)):
        shard = split.shard(number)
        data = np.memmap(shard.where, np.uint8, "r")
        runs = [data[m.tok["offset"] :][: m.tok["size"]] for m in shard.members]
        found.append(np.concatenate(runs).view(shard.dtype))
    return found


FLAT = np.concatenate(corpus())


def write(kind: str, folder: Path) -> tuple[Path, dict]:
    """A corpus that holds FLAT (or the first part of it, in windows): its path, what to say."""
    folder.mkdir(exist_ok=True)
    windows = FLAT[: len(FLAT) // 256 * 256].reshape(-1, 256)
    if kind in CODES:
        documents = np.split(FLAT, np.flatnonzero(FLAT == END) + 1)[:-1]
        documents = [d % 200 for d in documents] if kind == "uint8" else documents
        return write_megatron(folder / "text_document", documents, kind), {}
    if kind == "flat":
        FLAT.astype("<u2").tofile(folder / "tokens.bin")
        return folder / "tokens.bin", {"dtype": "uint16"}
    if kind == "tar":
        return write_tar(folder / "00000.tar", windows.astype("<u2")), {}
    if kind == "raw tar":
        return write_tar(folder / "00000.tar", windows.astype("<u2"), "tok"), {"dtype": "uint16"}
    dtype = {"npy": "<u2", "npy big": ">u2", "npy long": "<i8", "npy rows": "<u4"}[kind]
    np.save(folder / "tokens.npy", (windows if kind == "npy rows" else FLAT).astype(dtype))
    return folder / "tokens.npy", {}


KINDS = [*CODES, "flat", "npy", "npy big", "npy long", "npy rows", "tar", "raw tar"]
IN_PLACE = {**dict.fromkeys(CODES, "megatron"), "flat": "flat", "tar": "tar", "raw tar": "tar"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A corpus of each kind and its dataset, made once and only read."""
    done: dict[str, tuple[Path, Path]] = {}

    def make(kind: str) -> tuple[Path, Path]:
        if kind not in done:
            folder = tmp_path_factory.mktemp("corpus")
            path, more = write(kind, folder / "in")
            index_corpus([str(path)], folder / "dataset", "bytes", **SIZES, **more)
            done[kind] = path, folder / "dataset"
        return done[kind]

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_the_windows_are_those_of_numpys_memmap(kind, made):
    path, output = made(kind)
    dataset, total = Dataset(output), 0
    assert in_place_kind(str(path)) == IN_PLACE.get(kind, "npy")
    rng = np.random.default_rng(0)
    for name in ("train", "validation"):
        split = dataset.split(name)
        for number, want in enumerate(placed(split)):
            total += len(want)
            assert len(want) == split.shard_tokens[number]
            starts = rng.integers(0, max(len(want) - 65, 1), 40)
            rows = np.empty((40, min(65, len(want))), np.uint16)
            split.read_rows(np.full(40, number), starts, rows)
            for start, row in zip(starts.tolist(), rows, strict=True):
                assert (row == want[start : start + 65]).all()
                assert (split.read(number, start, 9) == want[start : start + 9]).all()
    whole = len(FLAT) // 256 * 256 if kind in ("npy rows", "tar", "raw tar") else len(FLAT)
    assert total == whole
    assert check(output) == []
    assert [
        f for f in path.parent.iterdir() if f.suffix not in (".bin", ".idx", ".npy", ".tar")
    ] == []


def test_documents_are_whole_in_one_split_and_their_ends_are_the_corpuss(made):
    output = made("uint16")[1]
    dataset, ends = Dataset(output), set(np.flatnonzero(END == FLAT) + 1)
    seen = []
    for name in ("train", "validation"):
        split = dataset.split(name)
        for number, tokens in enumerate(placed(split)):
            found = split.document_ends(number, 0, len(tokens))
            assert found.tolist() == (np.flatnonzero(tokens == END) + 1).tolist()
            assert found[-1] == len(tokens)
            for m in split.shard(number).members:
                seen.append((m.tok["offset"] // 2, m.tokens))
    at = 0
    for first, tokens in sorted(seen):
        assert first == at
        at += tokens
    assert at == len(FLAT)
    *full, last = dataset.split("train").shard_tokens
    assert len(full) >= 3
    assert all(4000 <= tokens < 4400 for tokens in full)
    assert 0 < last < 4400
    share = dataset.split("validation").num_tokens / len(FLAT)
    assert 0.05 < share < 0.15
    report = dataset.manifest["report"]
    assert sum(report["lengths"]) == len(ends) == dataset.manifest["corpus"]["documents"]
    assert sum(s["bytes"] for s in dataset.manifest["splits"].values()) == len(FLAT) - len(ends)


def test_which_documents_are_held_out_is_the_rule_of_the_docstring(made):
    dataset = Dataset(made("uint16")[1])
    stretch = len(FLAT) // 16
    starts = np.concatenate([[0], np.flatnonzero(END == FLAT)[:-1] + 1])
    out = starts % stretch >= stretch - round(0.1 * stretch)
    documents = np.split(FLAT, starts[1:])
    want = np.concatenate([d for d, held in zip(documents, out, strict=True) if held])
    assert (np.concatenate(placed(dataset.split("validation"))) == want).all()


def test_rows_and_members_of_others_end_documents(made):
    for kind in ("npy rows", "tar"):
        split = Dataset(made(kind)[1]).split("train")
        for number, tokens in enumerate(placed(split)):
            ends = set(split.document_ends(number, 0, len(tokens)).tolist())
            assert set((np.flatnonzero(tokens == END) + 1).tolist()) < ends


@pytest.mark.parametrize("kind", ["uint16", "npy", "tar"])
def test_every_flipped_byte_is_caught_or_is_no_token(kind, tmp_path):
    """Exhaustive on the ids of a small corpus: reading raises and check names member and file."""
    path, more = write(kind, tmp_path / "in")
    if kind == "uint16":
        path = write_megatron(tmp_path / "in" / "small", corpus(tokens=300))
    elif kind == "npy":
        np.save(path, FLAT[:300].astype("<u2"))
    else:
        path = write_tar(tmp_path / "in" / "s.tar", FLAT[:96].astype("<u2").reshape(3, 32))
    sizes = {**SIZES, "validation_fraction": 0.0}
    output = index_corpus([str(path)], tmp_path / "out", "bytes", **sizes, **more)
    good = path.read_bytes()
    dataset = Dataset(output)
    tokens = placed(dataset.split("train"))[0].copy()
    inside = {
        at
        for m in dataset.split("train").shard(0).members
        for at in range(m.tok["offset"], m.tok["offset"] + m.tok["size"])
    }
    assert len(inside) == 2 * len(tokens)
    out = np.empty((1, len(tokens)), np.uint16)
    with open(path, "r+b", buffering=0) as f:
        for at, byte in enumerate(good):
            os.pwrite(f.fileno(), bytes([byte ^ 1]), at)
            split = dataset.split("train")
            if at in inside:
                with pytest.raises(UserError, match=re.escape(f"{path}: member 00")):
                    split.read_rows(np.zeros(1, int), np.zeros(1, int), out)
            else:
                split.read_rows(np.zeros(1, int), np.zeros(1, int), out)
                assert (out[0] == tokens).all()
            os.pwrite(f.fileno(), bytes([byte]), at)
    path.write_bytes(good[: (at := min(inside))] + bytes([good[at] ^ 1]) + good[at + 1 :])
    (fault,) = check(output)
    assert "member 000000 is damaged" in fault


@pytest.mark.parametrize("kind", ["uint16", "flat", "npy", "npy rows", "tar"])
def test_every_truncation_is_caught_at_indexing_and_at_reading(kind, tmp_path):
    path, more = write(kind, tmp_path / "in")
    output = index_corpus([str(path)], tmp_path / "out", "bytes", **SIZES, **more)
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for size in sorted({0, 1, 10, 512, len(good) - 1, *rng.integers(0, len(good), 30).tolist()}):
        path.write_bytes(good[:size])
        with pytest.raises(UserError, match=re.escape(f"{path}: {size:,} bytes where")):
            Dataset(output).split("train").read(0, 0, 1)
        assert any(str(path) in fault for fault in check(output))
        if (kind == "flat" and size and size % 2 == 0) or not good[max(size - 1024, 0) :].strip(
            b"\0"
        ):
            continue  # raw ids don't say how many there are; some of the zeros that end a tar do
        with pytest.raises(UserError, match=re.escape(str(path))):
            index_corpus([str(path)], tmp_path / "again", "bytes", **SIZES, **more)
        assert sorted(p.name for p in tmp_path.iterdir() if p.name[0] != ".") == ["in", "out"]


def test_an_idx_that_is_cut_or_flipped_anywhere_is_caught(tmp_path):
    documents = corpus(tokens=900)
    path = write_megatron(tmp_path / "in", documents)
    output = index_corpus([str(path)], tmp_path / "out", "bytes", **SIZES)
    want = Dataset(output).identity
    idx = path.with_suffix(".idx")
    good = idx.read_bytes()
    (sequences,) = struct.unpack_from("<Q", good, 18)
    variants = [good[:size] for size in range(len(good))]
    variants += [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in range(len(good))]
    variants += [good + b"\0", good + good]
    for number, raw in enumerate(variants):
        idx.write_bytes(raw)
        at = number - len(good)
        if at >= 34 + 12 * sequences:
            # Documents that begin with another sequence: nothing else in the files could tell.
            with suppress(UserError):
                again = index_corpus([str(path)], tmp_path / f"{number}", "bytes", **SIZES)
                assert Dataset(again).identity != want
        else:
            with pytest.raises(UserError, match=re.escape(str(path.with_suffix("")))):
                index_corpus([str(path)], tmp_path / f"{number}", "bytes", **SIZES)


def test_a_tar_cut_between_members_or_damaged_in_a_header_is_no_shorter_corpus(tmp_path):
    path = write_tar(tmp_path / "a.tar", FLAT[:512].astype("<u2").reshape(4, 128))
    good = path.read_bytes()
    with tarfile.open(path) as tar:
        cuts = [m.offset for m in tar.getmembers()] + [tar.offset, len(good) - 512]
    damaged = [good[:cut] + bytes([good[cut] ^ 1]) + good[cut + 1 :] for cut in cuts[:-2]]
    for raw in [*(good[:cut] for cut in cuts[:-1]), *damaged, good + good]:
        path.write_bytes(raw)
        with pytest.raises(UserError, match=re.escape(str(path))):
            index_corpus([str(path)], tmp_path / "out", "bytes")


def test_the_same_again_finds_it_and_another_request_is_refused(tmp_path):
    path, more = write("flat", tmp_path / "in")
    output = index_corpus([str(path)], tmp_path / "out", "bytes", **SIZES, **more)
    before = {p.name: p.stat().st_mtime_ns for p in output.iterdir()}
    index_corpus([str(path)], output, "bytes", **SIZES, **more)
    assert {p.name: p.stat().st_mtime_ns for p in output.iterdir()} == before
    with pytest.raises(UserError, match=r"made otherwise \(validation differ\)"):
        index_corpus([str(path)], output, "bytes", **{**SIZES, "validation_fraction": 0}, **more)
    other = index_corpus([str(path)], tmp_path / "other", "bytes", **SIZES, **more)
    assert {p.name: p.read_bytes() for p in other.iterdir()} == {
        p.name: p.read_bytes() for p in output.iterdir()
    }


@pytest.mark.parametrize("kind", ["uint16", "npy", "tar"])
def test_a_corpus_at_a_server_is_indexed_and_read_there(kind, made, tmp_path):
    path, local = made(kind)
    with HostileServer() as server:
        for file in path.parent.iterdir():
            server.files[f"/c/{file.name}"] = file.read_bytes()
        url = f"{server.url}/c/{path.with_suffix('.idx').name if kind == 'uint16' else path.name}"
        output = index_corpus([url], tmp_path / "out", "bytes", **SIZES)
        dataset, want = Dataset(output, tmp_path / "cache"), Dataset(local)
        assert dataset.identity == want.identity
        for name in ("train", "validation"):
            for number, tokens in enumerate(placed(want.split(name))):
                assert (dataset.split(name).read(number, 0, len(tokens)) == tokens).all()
        split, raw = dataset.split("train"), bytearray(path.read_bytes())
        raw[split.shard(0).members[0].tok["offset"]] ^= 1
        server.files[f"/c/{path.name}"] = bytes(raw)
        with pytest.raises(UserError, match=rf"{path.name}.* (damaged|changed)"):
            Dataset(output, tmp_path / "fresh").split("train").read(0, 0, 1)


KILLED = """
import os, signal, sys
from trainer.data.tokenised import inplace
def table(stage, entries):
    os.kill(os.getpid(), signal.SIGKILL)
inplace.write_table = table
inplace.index_corpus([sys.argv[1]], sys.argv[2], "bytes")
"""


def test_killed_it_leaves_no_dataset_and_the_next_try_makes_it(tmp_path):
    path, _ = write("npy", tmp_path / "in")
    output = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path), str(output)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not output.exists()
    index_corpus([str(path)], output, "bytes")
    assert check(output) == []
    assert {p.name for p in tmp_path.iterdir()} == {"in", "out", ".out.lock"}


def fails(match: str, *paths: Path, **more) -> None:
    with pytest.raises(UserError, match=match):
        index_corpus([str(p) for p in paths], paths[0].parent / "none", "bytes", **more)
    assert not (paths[0].parent / "none").exists()


def test_what_is_no_corpus_of_this_tokenizer_has_a_sentence(tmp_path):
    np.save(tmp_path / "a.npy", np.array([1, 2, 300, END]))
    fails(r"a\.npy: token 2 is 300, and the vocabulary has 257", tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", np.array([1, -2, END]))
    fails(r"b\.npy: token 1 is -2", tmp_path / "b.npy")
    np.save(tmp_path / "c.npy", np.array([[1.0, 2.0]]))
    fails(r"c\.npy: holds float64 of shape \(1, 2\)", tmp_path / "c.npy")
    np.save(tmp_path / "d.npy", np.asfortranarray(np.zeros((3, 2), "u2")))
    fails(r"d\.npy: holds uint16 of shape \(3, 2\) in columns", tmp_path / "d.npy")
    np.save(tmp_path / "e.npy", np.zeros(0, "u2"))
    fails(r"e\.npy: 0 bytes of tokens", tmp_path / "e.npy")
    (tmp_path / "f.bin").write_bytes(b"abcd")
    fails(r"f\.bin: raw token ids don't say how wide", tmp_path / "f.bin")
    fails(r"f\.bin: 4 bytes are no whole number of int64", tmp_path / "f.bin", dtype="int64")
    np.save(tmp_path / "g.npy", np.array([1, END], "u2"))
    np.save(tmp_path / "h.npy", np.array([1, END], "u4"))
    both = (tmp_path / "g.npy", tmp_path / "h.npy")
    fails(r"h\.npy: holds uint32, and .*g\.npy uint16", *both)
    fails(r"dtype: is int32, and .*g\.npy says uint16", tmp_path / "g.npy", dtype="int32")
    (tmp_path / "i.idx").write_bytes(b"")
    fails(r"i\.bin: no such file", tmp_path / "i.idx")
    with tarfile.open(tmp_path / "j.tar", "w") as tar:
        for name in ("0.npy", "0.mask.npy"):
            raw = io.BytesIO()
            np.save(raw, np.array([1, END], "u2"))
            info = tarfile.TarInfo(name)
            info.size = raw.tell()
            raw.seek(0)
            tar.addfile(info, raw)
    fails(r"j\.tar: its members hold arrays of 2 kinds \(mask\.npy, npy\)", tmp_path / "j.tar")


def test_what_is_left_out_or_odd_stands_in_the_report(tmp_path):
    folder = tmp_path / "in"
    write("tar", folder)
    (folder / "README.md").write_text("tokens of mine")
    np.save(folder / "whole.npy", np.arange(250, dtype="<u2"))
    output = index_corpus([str(folder)], tmp_path / "out", "bytes", **SIZES)
    found = Dataset(output).manifest["report"]["left_out"]
    assert {reason: value["count"] for reason, value in found.items()} == {
        "no token ids": len(FLAT) // 256 + 1,
        "files without an end-of-text token, taken for one document": 1,
    }
    documents = [np.append(d[:-1], 7) for d in corpus(tokens=500)]
    write_megatron(tmp_path / "bare", documents)
    output = index_corpus([str(tmp_path / "bare")], tmp_path / "out2", "bytes", **SIZES)
    found = Dataset(output).manifest["report"]["left_out"]
    reason = "documents that end without the end-of-text token"
    assert (
        found[reason]["count"] == len(documents) == Dataset(output).manifest["corpus"]["documents"]
    )
    assert check(output) == []


def test_inputs_are_told_from_text(tmp_path):
    def kind(name: str) -> str | None:
        return in_place_kind(str(tmp_path / name))

    write_megatron(tmp_path / "meg_document", corpus(tokens=50))
    assert kind("meg_document") == kind("meg_document.idx") == kind("*.bin") == "megatron"
    (tmp_path / "text.txt").write_text("words " * 9)
    assert kind("text.txt") is None
    assert kind("") == "megatron"
    (tmp_path / "more.txt").write_text("words " * 900)
    assert kind("") is None  # mostly text
    assert kind("nowhere") is None
    assert in_place_kind("hf://stories") is None
    with webdataset.TarWriter(str(tmp_path / "text.tar")) as tar:
        tar.write({"__key__": "0", "txt": "words", "json": {}})
    assert kind("text.tar") is None


def test_the_command_makes_it_and_says_where_the_tokens_are(tmp_path, capsys):
    path, _ = write("npy", tmp_path / "in")
    words = [str(path), f"output={tmp_path / 'out'}", "tokenizer=bytes", "shard_tokens=4000"]
    words += ["member_tokens=1500", "validation_fraction=0.1"]
    assert verb.main(words) == 0
    said = capsys.readouterr().out
    assert "nothing was copied" in said
    assert "is made" in said
    assert verb.main(words) == 0
    assert "was there already" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"tokenizer: .* doesn't say by which one"):
        verb.main([words[0], f"output={tmp_path / 'other'}"])
