"""Tokenised corpora used in place: the same windows as numpy's, and all damage is found."""

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

from forescale.data.check import check
from forescale.data.dataset import Dataset
from forescale.data.tokenised.inplace import in_place_kind, index_corpus
from forescale.ground.errors import UserError
from forescale.verbs import shards as verb
from tests.trainer.data.tokenised_files import (
    END,
    FLAT,
    IN_PLACE,
    KINDS,
    SIZES,
    corpus,
    placed,
    write,
    write_megatron,
    write_tar,
)
from tests.trainer.remote.hostile_server import HostileServer


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A corpus of each kind and its dataset, made once and only read."""
    done: dict[str, tuple[Path, Path]] = {}

    def make(kind: str) -> tuple[Path, Path]:
        if kind not in done:
            folder = tmp_path_factory.mktemp("corpus")
            path, options = write(kind, folder / "in")
            index_corpus([str(path)], folder / "dataset", "bytes", **SIZES, **options)
            done[kind] = path, folder / "dataset"
        return done[kind]

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_the_windows_are_those_of_numpys_memmap(kind, built):
    path, output = built(kind)
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
            split.shard(number).read_rows(range(40), starts, rows)
            for start, row in zip(starts.tolist(), rows, strict=True):
                assert (row == want[start : start + 65]).all()
                assert (split.read(number, start, 9) == want[start : start + 9]).all()
    whole = len(FLAT) // 256 * 256 if kind in ("npy rows", "tar", "raw tar") else len(FLAT)
    assert total == whole
    assert check(output) == []
    assert [
        f for f in path.parent.iterdir() if f.suffix not in (".bin", ".idx", ".npy", ".tar")
    ] == []


def test_documents_are_complete_in_one_split_and_end_as_in_the_corpus(built):
    output = built("uint16")[1]
    dataset, ends = Dataset(output), set(np.flatnonzero(END == FLAT) + 1)
    places = []
    for name in ("train", "validation"):
        split = dataset.split(name)
        for number, tokens in enumerate(placed(split)):
            ends_of_shard = split.document_ends(number, 0, len(tokens))
            assert ends_of_shard.tolist() == (np.flatnonzero(tokens == END) + 1).tolist()
            assert ends_of_shard[-1] == len(tokens)
            for m in split.shard(number).members:
                places.append((m.tok["offset"] // 2, m.tokens))
    at = 0
    for first, tokens in sorted(places):
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


def test_held_out_documents_follow_the_rule_in_the_docstring(built):
    dataset = Dataset(built("uint16")[1])
    stretch = len(FLAT) // 16
    starts = np.concatenate([[0], np.flatnonzero(END == FLAT)[:-1] + 1])
    out = starts % stretch >= stretch - round(0.1 * stretch)
    documents = np.split(FLAT, starts[1:])
    want = np.concatenate([d for d, held in zip(documents, out, strict=True) if held])
    assert (np.concatenate(placed(dataset.split("validation"))) == want).all()


def test_rows_and_members_of_foreign_files_end_documents(built):
    for kind in ("npy rows", "tar"):
        split = Dataset(built(kind)[1]).split("train")
        for number, tokens in enumerate(placed(split)):
            ends = set(split.document_ends(number, 0, len(tokens)).tolist())
            assert set((np.flatnonzero(tokens == END) + 1).tolist()) < ends


def test_an_equal_request_finds_the_dataset_and_another_is_refused(tmp_path):
    path, options = write("flat", tmp_path / "in")
    output = index_corpus([str(path)], tmp_path / "out", "bytes", **SIZES, **options)
    before = {p.name: p.stat().st_mtime_ns for p in output.iterdir()}
    index_corpus([str(path)], output, "bytes", **SIZES, **options)
    assert {p.name: p.stat().st_mtime_ns for p in output.iterdir()} == before
    with pytest.raises(UserError, match=r"built with different validation"):
        index_corpus([str(path)], output, "bytes", **{**SIZES, "validation_fraction": 0}, **options)
    other = index_corpus([str(path)], tmp_path / "other", "bytes", **SIZES, **options)
    assert {p.name: p.read_bytes() for p in other.iterdir()} == {
        p.name: p.read_bytes() for p in output.iterdir()
    }


@pytest.mark.parametrize("kind", ["uint16", "npy", "tar"])
def test_a_corpus_at_a_server_is_indexed_and_read_remotely(kind, built, tmp_path):
    path, local = built(kind)
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
from forescale.data.tokenised import inplace
def write_manifest(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)
inplace.write_manifest = write_manifest
inplace.index_corpus([sys.argv[1]], sys.argv[2], "bytes")
"""


def test_a_killed_build_leaves_no_dataset_and_the_next_attempt_makes_it(tmp_path):
    path, _ = write("npy", tmp_path / "in")
    output = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path), str(output)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not output.exists()
    index_corpus([str(path)], output, "bytes")
    assert check(output) == []
    assert {p.name for p in tmp_path.iterdir()} == {"in", "out", ".out.lock"}


def fails(match: str, *paths: Path, **options) -> None:
    with pytest.raises(UserError, match=match):
        index_corpus([str(p) for p in paths], paths[0].parent / "none", "bytes", **options)
    assert not (paths[0].parent / "none").exists()


def test_a_corpus_of_another_tokenizer_raises_a_clear_error(tmp_path):
    np.save(tmp_path / "a.npy", np.array([1, 2, 300, END]))
    fails(r"a\.npy: token 2 is 300, the vocabulary has 257", tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", np.array([1, -2, END]))
    fails(r"b\.npy: token 1 is -2", tmp_path / "b.npy")
    np.save(tmp_path / "c.npy", np.array([[1.0, 2.0]]))
    fails(r"c\.npy: holds float64 of shape \(1, 2\)", tmp_path / "c.npy")
    np.save(tmp_path / "d.npy", np.asfortranarray(np.zeros((3, 2), "u2")))
    fails(r"d\.npy: holds uint16 of shape \(3, 2\) in columns", tmp_path / "d.npy")
    np.save(tmp_path / "e.npy", np.zeros(0, "u2"))
    fails(r"e\.npy: has 0 bytes of tokens", tmp_path / "e.npy")
    (tmp_path / "f.bin").write_bytes(b"abcd")
    fails(r"f\.bin: holds raw token ids, whose dtype must be given", tmp_path / "f.bin")
    fails(r"f\.bin: 4 bytes aren't a whole number of int64", tmp_path / "f.bin", dtype="int64")
    np.save(tmp_path / "g.npy", np.array([1, END], "u2"))
    np.save(tmp_path / "h.npy", np.array([1, END], "u4"))
    both = (tmp_path / "g.npy", tmp_path / "h.npy")
    fails(r"h\.npy: holds uint32, but .*g\.npy holds uint16", *both)
    fails(r"dtype: is int32, but .*g\.npy holds uint16", tmp_path / "g.npy", dtype="int32")
    (tmp_path / "i.idx").write_bytes(b"")
    fails(r"i\.bin: doesn't exist", tmp_path / "i.idx")
    with tarfile.open(tmp_path / "j.tar", "w") as tar:
        for name in ("0.npy", "0.mask.npy"):
            raw = io.BytesIO()
            np.save(raw, np.array([1, END], "u2"))
            info = tarfile.TarInfo(name)
            info.size = raw.tell()
            raw.seek(0)
            tar.addfile(info, raw)
    fails(r"j\.tar: its members hold arrays of 2 kinds \(mask\.npy, npy\)", tmp_path / "j.tar")


def test_unusual_and_left_out_data_is_reported(tmp_path):
    folder = tmp_path / "in"
    write("tar", folder)
    (folder / "README.md").write_text("tokens of mine")
    np.save(folder / "whole.npy", np.arange(250, dtype="<u2"))
    output = index_corpus([str(folder)], tmp_path / "out", "bytes", **SIZES)
    left_out = Dataset(output).manifest["report"]["left_out"]
    assert {reason: value["count"] for reason, value in left_out.items()} == {
        "no token ids": len(FLAT) // 256 + 1,
        "files without an end-of-text token, taken for one document": 1,
    }
    documents = [np.append(d[:-1], 7) for d in corpus(tokens=500)]
    write_megatron(tmp_path / "bare", documents)
    output = index_corpus([str(tmp_path / "bare")], tmp_path / "out2", "bytes", **SIZES)
    left_out = Dataset(output).manifest["report"]["left_out"]
    reason = "documents that end without the end-of-text token"
    assert (
        left_out[reason]["count"]
        == len(documents)
        == Dataset(output).manifest["corpus"]["documents"]
    )
    assert check(output) == []


def test_token_inputs_are_distinguished_from_text(tmp_path):
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


def test_the_command_makes_the_dataset_and_warns_about_moving_files(tmp_path, capsys):
    path, _ = write("npy", tmp_path / "in")
    words = [str(path), f"output={tmp_path / 'out'}", "tokenizer=bytes", "shard_tokens=4000"]
    words += ["member_tokens=1500", "validation_fraction=0.1"]
    assert verb.main(words) == 0
    output_text = capsys.readouterr().out
    assert "were not copied" in output_text
    assert "was built" in output_text
    assert verb.main(words) == 0
    assert "existed already" in capsys.readouterr().out
    with pytest.raises(UserError, match="tokenizer: is required"):
        verb.main([words[0], f"output={tmp_path / 'other'}"])


@pytest.mark.parametrize("kind", ["uint16", "npy", pytest.param("tar", marks=pytest.mark.slow)])
def test_every_flipped_byte_of_a_token_is_caught(kind, tmp_path):
    """Every byte of the ids of a small corpus: reading raises, and check names member and file."""
    path, options = write(kind, tmp_path / "in")
    if kind == "uint16":
        path = write_megatron(tmp_path / "in" / "small", corpus(tokens=300))
    elif kind == "npy":
        np.save(path, FLAT[:300].astype("<u2"))
    else:
        path = write_tar(tmp_path / "in" / "s.tar", FLAT[:96].astype("<u2").reshape(3, 32))
    sizes = {**SIZES, "validation_fraction": 0.0}
    output = index_corpus([str(path)], tmp_path / "out", "bytes", **sizes, **options)
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
                    split.shard(0).read_rows([0], [0], out)
            else:
                split.shard(0).read_rows([0], [0], out)
                assert (out[0] == tokens).all()
            os.pwrite(f.fileno(), bytes([byte]), at)
    path.write_bytes(good[: (at := min(inside))] + bytes([good[at] ^ 1]) + good[at + 1 :])
    (fault,) = check(output)
    assert "member 000000 is damaged" in fault


@pytest.mark.parametrize("kind", ["uint16", "flat", "npy", "npy rows", "tar"])
def test_every_truncation_is_caught_at_indexing_and_at_reading(kind, tmp_path):
    path, options = write(kind, tmp_path / "in")
    output = index_corpus([str(path)], tmp_path / "out", "bytes", **SIZES, **options)
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for size in sorted({0, 1, 10, 512, len(good) - 1, *rng.integers(0, len(good), 30).tolist()}):
        path.write_bytes(good[:size])
        with pytest.raises(UserError, match=re.escape(f"{path}: has {size:,} bytes, expected")):
            Dataset(output).split("train").read(0, 0, 1)
        assert any(str(path) in fault for fault in check(output))
        if (kind == "flat" and size and size % 2 == 0) or not good[max(size - 1024, 0) :].strip(
            b"\0"
        ):
            continue  # the length of raw ids isn't stored; a tar may lose some of its final zeros
        with pytest.raises(UserError, match=re.escape(str(path))):
            index_corpus([str(path)], tmp_path / "again", "bytes", **SIZES, **options)
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
            # Documents that begin with another sequence: nothing else contradicts this.
            with suppress(UserError):
                again = index_corpus([str(path)], tmp_path / f"{number}", "bytes", **SIZES)
                assert Dataset(again).identity != want
        else:
            with pytest.raises(UserError, match=re.escape(str(path.with_suffix("")))):
                index_corpus([str(path)], tmp_path / f"{number}", "bytes", **SIZES)


def test_a_tar_cut_between_members_or_with_a_damaged_header_is_refused(tmp_path):
    path = write_tar(tmp_path / "a.tar", FLAT[:512].astype("<u2").reshape(4, 128))
    good = path.read_bytes()
    with tarfile.open(path) as tar:
        cuts = [m.offset for m in tar.getmembers()] + [tar.offset, len(good) - 512]
    damaged = [good[:cut] + bytes([good[cut] ^ 1]) + good[cut + 1 :] for cut in cuts[:-2]]
    for raw in [*(good[:cut] for cut in cuts[:-1]), *damaged, good + good]:
        path.write_bytes(raw)
        with pytest.raises(UserError, match=re.escape(str(path))):
            index_corpus([str(path)], tmp_path / "out", "bytes")
