"""Documents come in one order, and whatever gives none is counted and named."""

import gzip
import json

import pytest
import zstandard

from trainer.data.text import Files, Report
from trainer.errors import UserError


def read(*paths, **options):
    report = Report()
    return [(d.name, d.text) for d in Files(paths, **options).documents(report)], report


def lines(*rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_a_folder_in_sorted_order_with_an_account_of_the_rest(tmp_path):
    root = tmp_path / "corpus"
    (root / "b").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / ".git" / "x.txt").write_text("hidden")
    (root / ".a").write_text("hidden")
    (root / "z.txt").write_text("last")
    (root / "b" / "a.md").write_text("first")
    (root / "b" / "picture.png").write_bytes(b"png")
    (root / "c.py").write_bytes(b"\xff\xfe")
    (root / "d.txt").write_text(" \n")
    found, report = read(root)
    assert found == [("corpus/b/a.md", b"first"), ("corpus/z.txt", b"last")]
    assert report.as_dict() == {
        "empty": {"count": 1, "first": ["corpus/d.txt"]},
        "hidden": {"count": 2, "first": ["corpus/.a", "corpus/.git"]},
        "other suffix": {"count": 1, "first": ["corpus/b/picture.png"]},
        "undecodable": {"count": 1, "first": ["corpus/c.py (byte 0)"]},
    }


def test_sources_keep_the_order_in_which_they_are_given(tmp_path):
    for name in ("a.txt", "b.txt", "c.md"):
        (tmp_path / name).write_text(name)
    found, _ = read(tmp_path / "c.md", tmp_path / "*.txt")
    assert [name for name, _ in found] == ["c.md", "a.txt", "b.txt"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl_plain_and_compressed(tmp_path, suffix):
    raw = lines({"text": "one"}, {"text": "zwei ü"}, {"other": 1}, {"text": "", "n": 2})
    raw += b'{"text": 3}\nnot json\n\n[1]\n{"text": "\\ud800"}\n{"text": "\xff"}\n{"text": "end"}'
    pack = {
        "": bytes,
        ".gz": gzip.compress,
        # two frames, as parallel compressors write
        ".zst": lambda b: b"".join(map(zstandard.compress, (b[:30], b[30:]))),
    }[suffix]
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(pack(raw))
    found, report = read(path)
    name = path.name
    assert found == [
        (f"{name}:1", b"one"),
        (f"{name}:2", "zwei ü".encode()),
        (f"{name}:11", b"end"),
    ]
    assert report.counts == {
        "no text under 'text'": 3,
        "empty": 1,
        "malformed": 1,
        "undecodable": 2,
    }
    assert report.listed["malformed"] == [f"{name}:6"]


def test_long_lines_cross_blocks(tmp_path):
    text = "word " * 700_000
    (tmp_path / "long.jsonl.gz").write_bytes(gzip.compress(lines({"t": text}, {"t": "b"}), 1))
    found, _ = read(tmp_path / "long.jsonl.gz", text_key="t")
    assert [t.decode() for _, t in found] == [text, "b"]


def test_counts_stay_exact_beyond_the_names_that_are_listed(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(*[{"text": ""}] * 1000, {"text": "x"}))
    _, report = read(tmp_path / "a.jsonl")
    assert report.counts["empty"] == 1000
    assert len(report.listed["empty"]) == 200


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_cut_off_file_is_named(tmp_path, suffix):
    raw = lines(*({"text": f"{i} and more"} for i in range(2000)))
    packed = gzip.compress(raw) if suffix == ".gz" else zstandard.compress(raw)
    path = tmp_path / f"rows.jsonl{suffix}"
    for size in (len(packed) - 1, len(packed) // 2, 3):
        path.write_bytes(packed[:size])
        with pytest.raises(UserError, match=r"rows\.jsonl.*cut off or damaged"):
            read(path)


def test_bad_sources_have_a_sentence(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no text file"):
        read(tmp_path)
    (tmp_path / "a.pdf").write_bytes(b"pdf")
    with pytest.raises(UserError, match="suffix says no kind of text"):
        read(tmp_path / "a.pdf")
    (tmp_path / "a.jsonl").write_bytes(lines({"body": "x", "id": 1}))
    with pytest.raises(UserError, match=r"'text'.*its lines have body, id"):
        read(tmp_path / "a.jsonl")
