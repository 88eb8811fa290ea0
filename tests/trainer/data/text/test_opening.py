"""Compressed text: equal to the plain one, never incomplete, and read in little memory."""

import gzip
import io
import os
import random
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import zstandard

from forescale.data.text import opening
from forescale.data.text.documents import Policy
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


MIB = 1 << 20
ROW = b'{"text": "x"}\n'
# The peak of this process alone: getrusage would count that of the process that started it.
READ = """
import sys
from forescale.data.text.documents import Policy, ReadingReport
from forescale.data.text.files import Files
from tests.trainer.data.read_files import expect_refused, read

def peak():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) // 1024 for line in f if line.startswith("VmHWM"))

before, policy = peak(), Policy(long=sys.argv[1], max_document_bytes=1000)
for path in sys.argv[2:]:
    found, report = read(path, policy=policy)
    print(len(found), max([len(text) for _, text in found], default=0), *report.counts)
print(peak() - before)
"""


def zst(size: int, window: int = 17) -> bytes:
    """Zeros, packed: the strongest bomb that zstd can make, a block of 128 KiB in 4 bytes. window:
    log2 of the bytes that the frame claims to look back."""
    blocks = size >> 17
    block = (1 << 17) << 3 | 1 << 1  # size and type (a repeated byte); 1 marks the last
    run = [(block | (i == blocks - 1)).to_bytes(3, "little") + b"\0" for i in range(blocks)]
    return struct.pack("<IBB", 0xFD2FB528, 0, (window - 10) << 3) + b"".join(run)


def gz(size: int) -> bytes:
    """Zeros, packed to a thousandth of their size."""
    return gzip.compress(bytes(16 * MIB), 9) * (size // (16 * MIB))


def sparse_tar(path: Path, name: str, size: int) -> Path:
    """A tar of 10 kB with a member of zeros that isn't stored (of GNU tar's format 1.0)."""
    listed = b"1\n%d\n0\n".ljust(512, b"\0") % size
    entry = tarfile.TarInfo(name)
    entry.size = len(listed)
    entry.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": name,
        "GNU.sparse.realsize": str(size),
    }
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as f:
        f.addfile(entry, io.BytesIO(listed))
    return path


def hole(path: Path, size: int, begin: bytes = b"") -> Path:
    with open(path, "wb") as f:
        f.write(begin)
        f.truncate(size)
    return path


def tar_of(path: Path, name: str, payload: bytes) -> Path:
    with tarfile.open(path, "w") as f:
        entry = tarfile.TarInfo(name)
        entry.size = len(payload)
        f.addfile(entry, io.BytesIO(payload))
    return path


def bombs(folder: Path, size: int) -> list[Path]:
    """Files of kilobytes, or that take none on the disk, with one document of `size` bytes each."""
    rows = []
    for name, raw in {
        "a.txt.zst": zst(size),
        "b.txt.gz": gz(size),
        "c.jsonl.zst": zstandard.compress(ROW) + zst(size),
        "d.html.zst": zst(size),
        "README.gz": gzip.compress(b"a") + gz(size),
        "f.tar.zst": zstandard.compress(sparse_tar(folder / "inner", "a.txt", size).read_bytes()),
    }.items():
        (folder / name).write_bytes(raw)
        rows.append(folder / name)
    (folder / "inner").unlink()
    rows += [
        sparse_tar(folder / "g.tar", "a.txt", size),
        sparse_tar(folder / "h.tar", "a.html", size),
        tar_of(folder / "j.tar", "a.txt.zst", zst(size)),
        tar_of(folder / "k.tar", "a.txt.gz", gz(size)),
        hole(folder / "l.txt", size),
        hole(folder / "m.jsonl", size, ROW),
    ]
    return rows


def read_apart(policy: str, paths) -> tuple[list[str], int]:
    """Read files in another process: a line for each, and the MiB by which its memory grew."""
    words = [sys.executable, "-c", READ, policy, *map(str, paths)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    *output, grown = done.stdout.splitlines()
    return output, int(grown)


ROOT = Path(__file__).parents[4]


def test_a_bomb_is_read_in_little_memory(tmp_path):
    size = 384 * MIB
    (tmp_path / "a.txt.zst").write_bytes(zst(size))
    tar, rows = sparse_tar(tmp_path / "g.tar", "a.txt", size), hole(tmp_path / "m.jsonl", size, ROW)
    paths = [tmp_path / "a.txt.zst", tar, rows]
    assert all(path.stat().st_blocks * 512 <= 16 << 10 for path in paths)
    output, grown = read_apart("cut", paths)
    assert output == ["1 1000 long, cut", "1 1000 long, cut", "1 1 long line"]
    assert grown < 130  # MiB


@pytest.mark.slow  # unpacks 13 GB
@pytest.mark.parametrize("policy", ["cut", "skip"])
def test_every_bomb_is_read_in_little_memory(tmp_path, policy):
    paths = bombs(tmp_path, 512 * MIB)
    assert all(path.stat().st_blocks * 512 <= 1 << 20 for path in paths)
    output, grown = read_apart(policy, paths)
    for path, line in zip(paths, output, strict=True):
        assert "long" in line, path
        assert int(line.split()[1]) <= 1001, path
    assert grown < 130


def test_without_a_limit_a_bomb_is_refused_and_honest_text_is_not(tmp_path):
    (tmp_path / "a.txt.zst").write_bytes(zst(300 * MIB))
    expect_refused(r"a\.txt\.zst: unpacks to more than 100 times the 9,6", tmp_path / "a.txt.zst")
    hole(tmp_path / "m.jsonl", 100 * MIB)
    expect_refused(r"m\.jsonl: unpacks to more than 100 times the 0 bytes", tmp_path / "m.jsonl")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"abc " * 5_000_000))  # 1,000 times its size
    documents, _ = read(tmp_path / "b.txt.gz")
    assert len(documents[0][1]) == 20_000_000


def test_what_a_file_unpacks_to_has_a_bound_whatever_the_policy(tmp_path, monkeypatch):
    """That of the members of a tar together."""
    monkeypatch.setattr(opening, "_UNPACKED", MIB)
    (tmp_path / "a.jsonl.zst").write_bytes(zst(4 * MIB))
    tar_of(tmp_path / "j.tar", "a.txt.zst", zst(4 * MIB))
    for name in ("a.jsonl.zst", "j.tar"):
        with pytest.raises(UserError, match=f"{name}: unpacks to more than 100 times its bytes"):
            read(tmp_path / name, policy=Policy(long="skip", max_document_bytes=1000))


def test_a_limit_that_fails_reads_no_further(tmp_path):
    (tmp_path / "a.txt.zst").write_bytes(zst(300 * MIB))
    expect_refused(
        r"a\.txt\.zst: is longer than 1,000 bytes",
        tmp_path / "a.txt.zst",
        policy=Policy(long="fail", max_document_bytes=1000),
    )


def test_a_frame_that_asks_for_more_memory_than_its_file_has_is_refused(tmp_path):
    """A window of 2 GiB is for files of that size; zstd's own tool refuses it too."""
    (tmp_path / "a.txt.zst").write_bytes(zst(1 << 17, window=31))
    sentence = r"a\.txt\.zst: unpacking it needs more memory than the file.*zstd -d --long=31"
    expect_refused(sentence, tmp_path / "a.txt.zst")
    (tmp_path / "a.txt.zst").write_bytes(zst(1 << 17, window=27))
    assert len(read(tmp_path / "a.txt.zst")[0][0][1]) == 1 << 17
    os.truncate(tmp_path / "a.txt.zst", 9)
    expect_refused("truncated or damaged", tmp_path / "a.txt.zst")


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_a_header_that_claims_gigabytes_is_damage(tmp_path, kind):
    """Of a PAX or GNU header tarfile holds as much as it claims."""
    entry = tarfile.TarInfo("a")
    entry.type, entry.size = kind, 6 << 30
    (tmp_path / "x.tar.zst").write_bytes(zstandard.compress(entry.tobuf()) + zst(300 * MIB))
    expect_refused("a header has more than 1,048,576 bytes", tmp_path / "x.tar.zst")


def test_a_sparse_list_without_end_is_damage(tmp_path):
    sparse_tar(tmp_path / "x.tar", "a.txt", 10)
    raw = (tmp_path / "x.tar").read_bytes()
    at = raw.index(b"1\n10\n0\n")
    endless = b"999999999\n" + b"1\n" * (4 * MIB)
    (tmp_path / "x.tar.zst").write_bytes(zstandard.compress(raw[:at] + endless))
    expect_refused("a header has more than 1,048,576 bytes", tmp_path / "x.tar.zst")
