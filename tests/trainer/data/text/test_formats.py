"""Formats of text: JSON lines cut anywhere give each line once; a page gives what a reader sees."""

import gzip
import html
import io
import json

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from forescale.data.text.formats import lines_between, text_of
from forescale.data.text.opening import Budget
from tests.trainer.data.read_files import expect_refused, lines, read

FREE = Budget("rows", "rows", None)
PIECES = st.lists(
    st.sampled_from([b"\n", b"\r\n", b"a", b"bc", b'{"x": 1}', b"long " * 9]), max_size=30
)


@given(PIECES, st.integers(1, 90))
def test_ranges_of_any_size_hold_the_lines_of_the_whole(pieces, size):
    raw = b"".join(pieces)
    whole = list(lines_between(io.BytesIO(raw), FREE))
    assert b"".join(line for _, line in whole) == raw
    documents = []
    for start in range(0, len(raw), size):
        f = io.BytesIO(raw)
        f.seek(max(0, start - 1))
        documents += lines_between(f, FREE, start, start + size)
    assert documents == whole


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_units_of_any_size_give_the_same_documents(tmp_path_factory, data):
    texts = data.draw(st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=12))
    end = data.draw(st.sampled_from([b"\n", b"\r\n", b"\n\n"]))
    rows = [json.dumps({"text": "x" + t}, ensure_ascii=data.draw(st.booleans())) for t in texts]
    raw = end.join(row.encode("utf-8", "surrogatepass") for row in rows)
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_bytes(raw + data.draw(st.sampled_from([b"", end])))
    size = data.draw(st.integers(1, 200))
    assert read(path, unit_bytes=size) == read(path, unit_bytes=1 << 30)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_rows_that_give_no_document_are_counted(tmp_path, suffix):
    raw = lines({"text": "one"}, {"text": "zwei ü"}, {"other": 1}, {"text": "", "n": 2})
    raw += b'{"text": 3}\nnot json\n\n[1]\n{"text": "\\ud800"}\n{"text": "\xff"}\n'
    raw += b"[" * 100_000 + b'\n{"text": null}\n{"text": "end"}'
    pack = {
        "": bytes,
        ".gz": gzip.compress,
        # two frames, as parallel compressors write
        ".zst": lambda b: b"".join(map(zstandard.compress, (b[:30], b[30:]))),
    }[suffix]
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(pack(raw))
    documents, report = read(path)
    name = path.name
    assert documents == [
        (f"{name}@0", b"one"),
        (f"{name}@16", "zwei ü".encode()),
        (f"{name}@{raw.index(b'end') - 10}", b"end"),
    ]
    assert report.counts == {
        "no text under 'text'": 4,
        "empty": 1,
        "malformed": 2,
        "undecodable": 2,
    }
    assert report.listed["malformed"][0] == f"{name}@{raw.index(b'not json')}"


def test_replacing_what_is_not_utf8(tmp_path):
    from forescale.data.text.documents import Policy

    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\xffb"}\n{"text": "\\udc00"}\n')
    documents, report = read(tmp_path / "a.jsonl", policy=Policy(undecodable="replace"))
    assert [text.decode() for _, text in documents] == ["a\ufffdb", "\ufffd"]
    assert report.counts == {"undecodable, replaced": 2}
    expect_refused(
        r"a\.jsonl@0: isn't UTF-8 \(byte 11\)",
        tmp_path / "a.jsonl",
        policy=Policy(undecodable="fail"),
    )


def test_a_byte_order_mark_before_the_first_row(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines({"text": "a"}, {"text": "b"}))
    assert [text for _, text in read(tmp_path / "a.jsonl")[0]] == [b"a", b"b"]


def test_long_lines_cross_blocks(tmp_path):
    text = "word " * 700_000
    (tmp_path / "long.jsonl.gz").write_bytes(gzip.compress(lines({"t": text}, {"t": "b"}), 1))
    documents, _ = read(tmp_path / "long.jsonl.gz", text_key="t")
    assert [t.decode() for _, t in documents] == [text, "b"]


def test_a_key_inside_another(tmp_path):
    rows = lines({"meta": {"text": "a"}}, {"meta": 1}, {"meta.text": "b"}, {"text": "c"})
    (tmp_path / "a.jsonl").write_bytes(rows)
    documents, report = read(tmp_path / "a.jsonl", text_key="meta.text")
    assert [text for _, text in documents] == [b"a", b"b"]
    assert report.counts == {"no text under 'meta.text'": 2}


def test_a_file_without_rows_is_reported(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n\n")
    (tmp_path / "b.jsonl").write_bytes(b"")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b""))
    documents, report = read(tmp_path)
    assert documents == []
    folder = tmp_path.name
    empty = [f"{folder}/{name}" for name in ("a.jsonl", "b.jsonl", "c.jsonl.gz")]
    assert report.listed == {"empty": empty}


@pytest.mark.parametrize("unit_bytes", [20, 1 << 20])
@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (
            lines(*[{"body": "x", "id": 1}] * 50),
            r"no line.*under 'text'; set text_key \(keys: body, id\)",
        ),
        (b'[{"text": "x"}]', r"holds a JSON array.*jq -c '\.\[\]'"),
        (json.dumps([{"text": "x"}], indent=1).encode(), "no line has a text under 'text'"),
        (lines({"text": 5}, {"text": ["x"]}), r"a\.jsonl: the values of key 'text' aren't text"),
    ],
)
def test_a_file_without_text_under_the_key_is_refused(tmp_path, raw, sentence, unit_bytes):
    (tmp_path / "a.jsonl").write_bytes(raw)
    expect_refused(sentence, tmp_path / "a.jsonl", unit_bytes=unit_bytes)


PAGE = """<!DOCTYPE html><html><head><title>A &amp; B</title><style>p { x: "<b>" }</style>
<SCRIPT>if (a < b) f("</p>");</SCRIPT></head><body><!-- <p>no --><h1 class="x">Head</h1>
<p>One   <b>bold</b> word, 1 &lt; 2 and 3 < 4<br/>next&nbsp;line<ul><li>a<li>b</ul></body></html>
"""


def test_a_page_is_read_as_its_text(tmp_path):
    (tmp_path / "a.html").write_text(PAGE)
    documents, report = read(tmp_path / "a.html")
    text = "A & B\n\nHead\n\nOne bold word, 1 < 2 and 3 < 4\nnext\xa0line\n\na\nb\n"
    assert [(name, raw.decode()) for name, raw in documents] == [("a.html", text)]
    assert report.listed == {"markup removed": ["a.html"]}


def test_a_page_without_text_is_empty(tmp_path):
    (tmp_path / "a.htm").write_text("<p><!-- -->\n<br>")
    documents, report = read(tmp_path / "a.htm")
    assert (documents, report.counts) == ([], {"markup removed": 1, "empty": 1})


@given(st.text(alphabet="<>/!-abp &;'\"\nİ", max_size=60))
def test_any_page_gives_its_words(page):
    words = text_of(page).split()
    if "<" not in page:
        assert words == html.unescape(page).split()


@pytest.mark.parametrize(
    "part", ["<", "<!--", "<a '", "</", "<script>", "<style></", "<?", "&#", "<p ", "\n "]
)
def test_the_work_does_not_grow_with_the_square_of_the_page(part):
    """With a parser whose work does, this test doesn't end."""
    text_of(part * (200_000 // len(part)))
