"""All damage of a tokenised corpus is found: every byte, every length, every header."""

import os
import re
import struct
import tarfile
from contextlib import suppress

import numpy as np
import pytest

from forescale.data.check import check
from forescale.data.dataset import Dataset
from forescale.data.tokenised.inplace import index_corpus
from forescale.ground.errors import UserError
from tests.trainer.data.tokenised_files import (
    FLAT,
    SIZES,
    corpus,
    placed,
    write,
    write_megatron,
    write_tar,
)


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
