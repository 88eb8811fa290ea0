"""Compressed text: equal to the plain one, and never incomplete."""

import gzip
import random

import pytest
import zstandard

from forescale.ground.errors import UserError
from tests.trainer.data.read_files import expect_refused, read

TEXT = "".join(random.Random(1).choices("abcdef \n", k=400)).strip().encode()
SKIPPED = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"  # a frame without text, as pzstd writes them
PACKED = {
    "a.txt.gz": gzip.compress(TEXT, mtime=0),
    "b.txt.zst": zstandard.compress(TEXT),
    "c.md.zst": zstandard.ZstdCompressor(write_checksum=True).compress(TEXT),
}
JOINED = {
    "two.txt.gz": gzip.compress(TEXT[:150]) + gzip.compress(TEXT[150:]),
    "empty members.txt.gz": gzip.compress(b"") + gzip.compress(TEXT) + gzip.compress(b""),
    "padded.txt.gz": gzip.compress(TEXT) + bytes(512),
    "two.txt.zst": zstandard.compress(TEXT[:150]) + zstandard.compress(TEXT[150:]),
    "skippable.txt.zst": SKIPPED + zstandard.compress(TEXT) + SKIPPED,
}


@pytest.mark.parametrize("name", PACKED | JOINED)
def test_compressed_text_is_read_completely(tmp_path, name):
    (tmp_path / name).write_bytes((PACKED | JOINED)[name])
    assert read(tmp_path / name)[0] == [(name, TEXT)]


@pytest.mark.parametrize("name", PACKED)
def test_every_truncation_is_found(tmp_path, name):
    path, packed = tmp_path / name, PACKED[name]
    for size in range(len(packed)):
        path.write_bytes(packed[:size])
        expect_refused(r"truncated or damaged.*restore the file", path)


@pytest.mark.parametrize("name", ["a.txt.gz", "c.md.zst"])
def test_every_flipped_byte_of_a_checksummed_file_is_found_or_harmless(tmp_path, name):
    path, packed = tmp_path / name, PACKED[name]
    for at in range(len(packed)):
        path.write_bytes(packed[:at] + bytes([packed[at] ^ 0x10]) + packed[at + 1 :])
        try:
            documents, _ = read(path)
        except UserError:
            continue
        assert documents == [(name, TEXT)], at  # such as a time stamp in a header


@pytest.mark.parametrize("name", PACKED)
def test_data_after_the_end_is_found(tmp_path, name):
    (tmp_path / name).write_bytes(PACKED[name] + b"something else")
    expect_refused("truncated or damaged", tmp_path / name)


def test_a_file_of_another_kind(tmp_path):
    for name in PACKED:
        (tmp_path / name).write_bytes(b"plain text and nothing else")
        expect_refused("truncated or damaged", tmp_path / name)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_text_of_many_blocks(tmp_path, suffix):
    text = random.Random(2).randbytes(1_500_000).hex().encode()
    packed = gzip.compress(text, 1) if suffix == ".gz" else zstandard.compress(text)
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(packed)
    assert read(path)[0] == [(path.name, text)]
    path.write_bytes(packed[:-1])
    expect_refused("truncated or damaged", path)
