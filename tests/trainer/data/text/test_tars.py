"""webdataset tars: all members with text, or a clear error; never silently fewer."""

import gzip
import io
import json
import tarfile

import pytest
import zstandard
from webdataset import TarWriter

from forescale.data.text.documents import Policy
from forescale.ground.errors import UserError
from tests.trainer.data.read_files import expect_refused, lines, read


def tar(members: dict[str, bytes], **options) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as f:
        for name, payload in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(payload)
            f.addfile(entry, io.BytesIO(payload))
    return buffer.getvalue()


SMALL = {"a.txt": b"first", "b.json": b'{"text": "second"}', "c.jsonl": lines({"text": "third"})}
DOCUMENTS = [("x.tar/a.txt", b"first"), ("x.tar/b.json", b"second"), ("x.tar/c.jsonl@0", b"third")]


def test_tars_written_by_webdataset(tmp_path):
    with TarWriter(str(tmp_path / "x.tar")) as writer:
        writer.write({"__key__": "000", "txt": "eins ü", "json": {"text": "zwei", "n": 1}})
        writer.write({"__key__": "sub/001", "jsonl": lines({"text": "drei"}, {"n": 1})})
        writer.write({"__key__": "002", "txt": "", "cls": 3})
    documents, report = read(tmp_path / "x.tar")
    assert sorted(documents) == [
        ("x.tar/000.json", b"zwei"),
        ("x.tar/000.txt", "eins ü".encode()),
        ("x.tar/sub/001.jsonl@0", b"drei"),
    ]
    assert report.listed == {
        "empty": ["x.tar/002.txt"],
        "no text under 'text'": ["x.tar/sub/001.jsonl@17"],
        "other suffix": ["x.tar/002.cls"],
    }


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz", ".tar.zst"])
def test_formats_and_compressions(tmp_path, form, suffix):
    deep = "/".join(["ü" * 20] * 6)[:150] + "/end.txt"
    if form == tarfile.USTAR_FORMAT:
        deep = "sub/end.txt"
    raw = tar(
        {f"./{name}": payload for name, payload in SMALL.items()} | {deep: b"deep"}, format=form
    )
    pack = {".tar": bytes, ".tar.zst": zstandard.compress}.get(suffix, gzip.compress)
    (tmp_path / f"x{suffix}").write_bytes(pack(raw))
    documents, _ = read(tmp_path / f"x{suffix}")
    want = [*DOCUMENTS, (f"x.tar/{deep}", b"deep")]
    assert documents == [(name.replace("x.tar", f"x{suffix}"), text) for name, text in want]


def test_compressed_members(tmp_path):
    rows = zstandard.compress(lines({"text": "rows"}))
    packed = {"a.txt.gz": gzip.compress(b"text"), "b.jsonl.zst": rows}
    (tmp_path / "x.tar").write_bytes(tar(packed))
    documents, _ = read(tmp_path / "x.tar")
    assert documents == [("x.tar/a.txt.gz", b"text"), ("x.tar/b.jsonl.zst@0", b"rows")]
    packed["a.txt.gz"] = packed["a.txt.gz"][:-1]
    (tmp_path / "x.tar").write_bytes(tar(packed))
    expect_refused(r"x\.tar.*truncated or damaged", tmp_path / "x.tar")


def test_folders_links_and_hidden_members(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as f:
        for name, kind in (("sub", tarfile.DIRTYPE), ("sub/l.txt", tarfile.SYMTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "a.txt"
            f.addfile(entry)
        for name in ("sub/._a.txt", "sub/a.txt"):
            entry = tarfile.TarInfo(name)
            entry.size = 1
            f.addfile(entry, io.BytesIO(b"a"))
    documents, report = read(tmp_path / "x.tar")
    assert documents == [("x.tar/sub/a.txt", b"a")]
    hidden, link = ["x.tar/sub/._a.txt"], ["x.tar/sub/l.txt"]
    assert report.listed == {"hidden": hidden, "no regular file": link}


def end_of(raw: bytes) -> int:
    """Return where a tar's two zero blocks end; zeros after them are only padding."""
    return len(raw.rstrip(b"\0")) // 512 * 512 + 512 + 1024


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_every_truncation_is_found(tmp_path, form):
    members = SMALL | {"ü.txt": b"fourth"}  # has an extra header in the PAX format
    if form == tarfile.USTAR_FORMAT:
        members = SMALL
    raw, path = tar(members, format=form), tmp_path / "x.tar"
    path.write_bytes(raw)
    whole, _ = read(path)
    assert len(whole) == len(members)
    end = end_of(raw)
    for size in range(0, len(raw), 64):
        for near in (size, size + 1):
            path.write_bytes(raw[:near])
            if near >= end:
                assert read(path)[0] == whole
                continue
            expect_refused(r"x\.tar: truncated or damaged", path)


def test_every_flipped_byte_of_a_header_is_found_or_harmless(tmp_path):
    raw, path = tar(SMALL), tmp_path / "x.tar"
    for block in (0, 1024, 2048):  # header, payload, header, ...
        for at in range(block, block + 512):
            path.write_bytes(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :])
            fault, documents = None, []
            try:
                documents, _ = read(path)
            except UserError as e:
                fault = str(e)
            assert documents == DOCUMENTS if fault is None else "truncated or damaged" in fault, at


def test_every_zeroed_block_is_found(tmp_path):
    raw, path = tar(SMALL), tmp_path / "x.tar"
    for block in range(0, 3 * 1024, 512):
        path.write_bytes(raw[:block] + bytes(512) + raw[block + 512 :])
        if block % 1024 == 0:
            expect_refused("truncated or damaged", path)
        elif block == 512:  # plain text has no checksum: zeros are text
            assert read(path)[0][0] == ("x.tar/a.txt", bytes(5))
        else:
            assert read(path)[1].counts.get("malformed") == 1


def test_concatenated_tars(tmp_path):
    (tmp_path / "x.tar").write_bytes(tar(SMALL) + tar(SMALL))
    expect_refused(r"something follows its end: two tars joined\?", tmp_path / "x.tar")


def test_tars_without_text(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(tar({"a.jpg": b"1", "a.cls": b"1", "b.jpg": b"2"}))
    expect_refused(r"holds no text: its members end in \.jpg, \.cls; expected", path)
    path.write_bytes(tar({"a.json": b'{"caption": "x"}', "b.jsonl": lines({"url": "y"})}))
    expect_refused(r"no member has a text.*keys: caption, url", path)
    path.write_bytes(tar({}))
    assert read(path)[1].listed == {"empty": ["x.tar"]}
    path.write_bytes(b"no tar at all" * 100)
    expect_refused("truncated or damaged", path)


def test_policies_apply_to_members(tmp_path):
    broken = json.dumps({"text": "?"}).encode().replace(b"?", b"\xff")
    (tmp_path / "x.tar").write_bytes(tar({"a.txt": b"\xff", "b.json": broken}))
    documents, report = read(tmp_path / "x.tar", policy=Policy(undecodable="replace"))
    assert [text.decode() for _, text in documents] == ["\ufffd", "\ufffd"]
    assert report.counts == {"undecodable, replaced": 2}
    expect_refused(
        r"x\.tar/a\.txt: isn't UTF-8", tmp_path / "x.tar", policy=Policy(undecodable="fail")
    )


def test_members_of_many_suffixes_and_without_one(tmp_path):
    page = b"<p>one<script>no()</script><p>two &amp; three"
    members = {"README": b"plain", "a.rst": b"rst", "b.html": page, "c.nfo": b"more", "d": b"\0"}
    (tmp_path / "x.tar").write_bytes(tar(members))
    documents, report = read(tmp_path / "x.tar", suffixes=[".nfo"])
    assert documents == [
        ("x.tar/README", b"plain"),
        ("x.tar/a.rst", b"rst"),
        ("x.tar/b.html", b"one\ntwo & three\n"),
        ("x.tar/c.nfo", b"more"),
    ]
    assert report.listed == {
        "markup removed": ["x.tar/b.html"],
        "no suffix and not text": ["x.tar/d"],
    }
    (tmp_path / "x.tar").write_bytes(tar({"d": b"\0"}))
    expect_refused("its members end in no suffix; expected", tmp_path / "x.tar")
