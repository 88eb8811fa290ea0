"""Folders, globs and paths as units of work: a fixed order, names without machine paths."""

import gzip
import io
import os
import pickle
import tarfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forescale.data.text import files
from forescale.data.text.documents import Policy, ReadingReport
from forescale.data.text.files import Files
from forescale.data.tokenised.inplace import in_place_kind
from forescale.ground.errors import UserError
from tests.trainer.data.read_files import expect_refused, lines, read


def tree(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def names(*paths):
    return [name for name, _ in read(*paths)[0]]


def test_a_folder_is_read_in_sorted_order_and_the_rest_is_reported(tmp_path):
    root = tree(tmp_path / "corpus", ".a", ".git/x.txt", "b/a.md", "b/p.png", "z.txt", "B.TXT")
    (root / "c.py").write_bytes(b"\xff\xfe")
    (root / "d.txt").write_text(" \n")
    (root / "b" / "package.json").write_text("{}")
    (root / "gone.txt").symlink_to("nowhere")
    (root / "linked").symlink_to("b")
    os.mkfifo(root / "pipe.txt")
    documents, report = read(root)
    assert documents == [
        ("corpus/B.TXT", b"B.TXT"),
        ("corpus/b/a.md", b"b/a.md"),
        ("corpus/z.txt", b"z.txt"),
    ]
    assert report.as_dict() == {
        "broken link": {"count": 1, "first": ["corpus/gone.txt"]},
        "empty": {"count": 1, "first": ["corpus/d.txt"]},
        "hidden": {"count": 2, "first": ["corpus/.a", "corpus/.git"]},
        "linked folder": {"count": 1, "first": ["corpus/linked"]},
        "no regular file": {"count": 1, "first": ["corpus/pipe.txt"]},
        "other suffix": {"count": 2, "first": ["corpus/b/p.png", "corpus/b/package.json"]},
        "undecodable": {"count": 1, "first": ["corpus/c.py (byte 0)"]},
    }


def test_inputs_keep_the_order_in_which_they_are_given(tmp_path):
    tree(tmp_path, "a.txt", "b.txt", "c.md")
    assert names(tmp_path / "c.md", tmp_path / "*.txt") == ["c.md", "a.txt", "b.txt"]


def test_globs_name_files_relative_to_the_fixed_part_of_the_pattern(tmp_path):
    tree(tmp_path, "x/1/a.txt", "x/2/a.txt", "x/2/b.md", "x/c.txt")
    assert names(tmp_path / "x" / "*" / "a.txt") == ["1/a.txt", "2/a.txt"]
    assert names(tmp_path / "x" / "**" / "*.txt") == ["1/a.txt", "2/a.txt", "c.txt"]
    everything = ["1/a.txt", "2/a.txt", "2/b.md", "c.txt"]
    for pattern in ("*", "**", "**/*"):
        assert names(tmp_path / "x" / pattern) == everything, pattern


def test_a_path_that_looks_like_a_pattern(tmp_path):
    assert names(tree(tmp_path, "a[1].txt") / "a[1].txt") == ["a[1].txt"]


def test_names_hold_no_machine_path(tmp_path, monkeypatch):
    for place in ("here", "there/deep"):
        tree(tmp_path / place / "corpus", "b/a.md", "z.txt")
    monkeypatch.chdir(tmp_path / "here")
    here = Files(["corpus", "corpus/*.txt", "./corpus/z.txt"])
    monkeypatch.chdir(tmp_path / "there" / "deep" / "corpus")
    there = Files([".", str(Path.cwd() / "*.txt"), "z.txt"])
    assert [u.label for u in here.units()] == [u.label for u in there.units()]
    assert here.describe() == there.describe()
    assert here.sources == ["corpus", "*.txt", "z.txt"]
    assert "tmp" not in str(here.describe())


def test_inputs_with_equal_names_get_numbers(tmp_path):
    tree(tmp_path, "a/x.txt", "b/x.txt")
    files = Files([tmp_path / "a" / "x.txt", tmp_path / "b" / "x.txt"])
    assert files.sources == ["x.txt", "x.txt (2)"]
    assert [unit.source for unit in files.units()] == [0, 1]


def test_a_name_that_is_not_utf8(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    with open(path, "wb") as f:
        f.write(b"text")
    assert read(tmp_path)[0] == [(f"{tmp_path.name}/caf\ufffd.txt", b"text")]


def test_compressed_json_is_read_as_lines_like_c4_and_dolma(tmp_path):
    (tmp_path / "c4-train.00000-of-01024.json.gz").write_bytes(gzip.compress(lines({"text": "a"})))
    assert [text for _, text in read(tmp_path)[0]] == [b"a"]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nowhere", "nowhere: no such file or folder; check the path"),
        ("*.txt", r"no such file or folder"),
        ("", "holds no text file; expected .txt .md .rst"),
        ("a.pdf", r"a\.pdf: its suffix isn't a known kind of text; expected .txt"),
        ("*.pdf", r"\*\.pdf: holds no text file"),
        (
            "rows.json",
            r"rows\.json: a \.json file isn't a list of documents; convert it to lines: jq",
        ),
        ("pipe.txt", r"pipe\.txt: isn't a regular file"),
        ("gone.txt", r"gone\.txt: doesn't exist; check the path, and the target if it is a link"),
    ],
)
def test_bad_inputs_raise_a_clear_error(tmp_path, name, sentence):
    tree(tmp_path, "a.pdf", "rows.json", ".hidden.txt")
    if name in ("pipe.txt", "gone.txt"):
        os.mkfifo(tmp_path / "pipe.txt")
        (tmp_path / "gone.txt").symlink_to("nothing")
    expect_refused(sentence, tmp_path / name)


def test_an_empty_input_is_not_the_working_directory():
    expect_refused("one of the inputs is empty", "")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_inputs_without_permission(tmp_path):
    tree(tmp_path, "a.txt", "b/c.txt")
    (tmp_path / "b").chmod(0)
    expect_refused(r"/b: permission denied", tmp_path)
    (tmp_path / "b").chmod(0o700)
    (tmp_path / "a.txt").chmod(0)
    expect_refused(r"a\.txt: permission denied", tmp_path)


@pytest.fixture
def bucket(tmp_path):
    """A corpus in a folder and in a store that fsspec reads; (path, address)."""
    fsspec = pytest.importorskip("fsspec")
    tree(tmp_path / "corpus", "b/a.md", "b/p.png", ".git/x.txt", "z.txt", "100%25.txt")
    rows = [{"text": f"row {i}"} for i in range(50)]
    (tmp_path / "corpus" / "rows.jsonl").write_bytes(lines(*rows))
    (tmp_path / "corpus" / "rows.jsonl.gz").write_bytes(gzip.compress(lines(*rows)))
    pq.write_table(
        pa.table({"text": [f"cell {i}" for i in range(50)]}), tmp_path / "corpus/t.parquet"
    )
    store = fsspec.filesystem("memory")
    store.put(str(tmp_path / "corpus"), "/bucket/corpus", recursive=True)
    yield tmp_path / "corpus", "memory://bucket/corpus"
    store.rm("/bucket", recursive=True)


def test_a_bucket_gives_the_same_as_a_folder(bucket):
    local, remote = bucket
    for options in ({}, {"unit_bytes": 100}):
        documents, report = read(remote, **options)
        want, account = read(local, **options)
        assert documents == want
        assert report.counts == account.counts
    assert Files([remote]).units() == Files([local]).units()
    assert Files([remote]).describe() == Files([local]).describe()
    assert names(f"{remote}/**/*.md") == names(local / "**" / "*.md") == ["b/a.md"]
    assert read(f"{remote}/rows.jsonl.gz") == read(local / "rows.jsonl.gz")


def test_files_at_a_web_server(bucket):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = partial(Quiet, directory=str(bucket[0].parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            root = f"http://127.0.0.1:{server.server_port}"
            want = read(bucket[0])[0]
            assert read(f"{root}/corpus/")[0] == want
            # A signature in the address doesn't affect the kind of file, and is never shown.
            signed = Files([f"{root}/corpus/rows.jsonl.gz?key=secret"])
            documents = [d for unit in signed.units() for d in signed.read(unit, ReadingReport())]
            assert [d.name for d in documents] == [
                n for n, _ in read(bucket[0] / "rows.jsonl.gz")[0]
            ]
            assert "secret" not in str(signed.describe())
            with pytest.raises(UserError, match=r"no line has a text under 'body'") as e:
                read(f"{root}/corpus/rows.jsonl?key=secret", text_key="body")
            assert "secret" not in str(e.value)
        finally:
            server.shutdown()
            thread.join()


def test_missing_addresses_raise_a_clear_error(bucket):
    expect_refused("memory://bucket/nothing: has no files", "memory://bucket/nothing")
    expect_refused(r"p\.png: its suffix isn't a known kind of text", f"{bucket[1]}/b/p.png")


def test_text_of_many_suffixes_and_without_one(tmp_path):
    """What is text by its name or by its content is read; the rest is counted and named."""
    names = ("a.rst", "b.tex", "c.org", "d.cpp", "E.TXT", "README", "sub/part-00000", "f.rst.gz")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        text = f"text of {name}\n".encode()
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    (tmp_path / "LICENSE.gz").write_bytes(gzip.compress("Füße".encode()))
    (tmp_path / "binary").write_bytes(b"\x7fELF\0\0 ")
    (tmp_path / "latin").write_bytes("Füße".encode("latin-1"))
    (tmp_path / "empty").touch()
    (tmp_path / "log.nfo").write_text("more")
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8")
    root = tmp_path.name
    documents, report = read(tmp_path)
    assert {name.removeprefix(f"{root}/") for name, _ in documents} == {*names, "LICENSE.gz"}
    assert dict(documents)[f"{root}/README"] == b"text of README\n"
    assert report.listed == {
        "no suffix and not text": [f"{root}/binary", f"{root}/latin"],
        "other suffix": [f"{root}/log.nfo", f"{root}/photo.jpg"],
        "empty": [f"{root}/empty"],
    }
    documents, report = read(tmp_path, suffixes=["NFO"])
    assert dict(documents)[f"{root}/log.nfo"] == b"more"
    assert report.listed["other suffix"] == [f"{root}/photo.jpg"]


def test_text_cut_within_a_character_where_it_is_judged_is_text(tmp_path):
    text = b"a" + "é".encode() * 100_000
    (tmp_path / "README").write_bytes(text)
    assert read(tmp_path / "README")[0] == [("README", text)]


@pytest.mark.parametrize(
    ("name", "suffixes", "sentence"),
    [
        ("binary", [], "binary: has no suffix, and its content isn't text; expected .txt"),
        ("a.nfo", [], r"a.nfo: its suffix isn't a known kind.*suffixes=\[.xyz\] adds others"),
        ("a.nfo", ["nf o"], "suffixes: 'nf o' isn't a suffix; write such as"),
        ("a.nfo", [".gz"], "suffixes: '.gz' has its own meaning"),
        ("a.nfo", ["/"], "suffixes: '/' isn't a suffix"),
    ],
)
def test_what_is_no_text_is_one_sentence(tmp_path, name, suffixes, sentence):
    (tmp_path / name).write_bytes(b"\0")
    expect_refused(sentence, tmp_path / name, suffixes=suffixes)


@pytest.fixture
def corpus(tmp_path):
    """Every kind of file, with faults to report."""
    root = tmp_path / "corpus"
    root.mkdir()
    for i in range(40):
        (root / f"note {i:02d}.txt").write_text(f"note {i} " * (i % 5))
    rows = lines(*({"text": f"row {i} " * (i % 9)} for i in range(200)))
    (root / "rows.jsonl").write_bytes(rows)
    (root / "rows.jsonl.gz").write_bytes(gzip.compress(rows.replace(b"row", b"packed row")))
    table = pa.table({"text": [f"cell {i}" if i % 10 else None for i in range(100)]})
    pq.write_table(table, root / "table.parquet", row_group_size=20)
    with tarfile.open(root / "web.tar", "w") as f:
        for i in range(20):
            entry = tarfile.TarInfo(f"{i:03d}.txt")
            entry.size = 5
            f.addfile(entry, io.BytesIO(b"%05d" % i))
    (root / "photo.jpg").write_bytes(b"jpg")
    return root


def test_units_are_fixed_by_the_files(corpus):
    units = Files([corpus], unit_bytes=1000).units()
    assert units == Files([corpus], unit_bytes=1000).units()
    assert next(unit.label for unit in units if "note" in unit.label).endswith("more")
    assert {"corpus/rows.jsonl (part 1 of 9)", "corpus/rows.jsonl.gz", "corpus/web.tar"} <= {
        unit.label for unit in units
    }


def test_documents_and_report_are_the_same_for_units_of_any_size(corpus):
    whole = read(corpus, unit_bytes=1 << 30)
    assert len(whole[0]) == 32 + 177 * 2 + 90 + 20
    assert whole[1].counts == {"empty": 8 + 23 * 2, "no text under 'text'": 10, "other suffix": 1}
    for unit_bytes in (1, 100, 3000):
        assert read(corpus, unit_bytes=unit_bytes) == whole


def test_units_read_by_other_processes_in_any_order_give_the_same(corpus):
    files = Files([corpus], unit_bytes=700)
    whole, report = read(corpus)
    other = pickle.loads(pickle.dumps(files))
    documents = {}
    for unit in reversed(pickle.loads(pickle.dumps(files.units()))):
        part = ReadingReport()
        documents[unit] = [(d.name, d.text) for d in other.read(unit, part)], part
    merged = ReadingReport()
    for unit in files.units():
        merged.merge(documents[unit][1])
    assert [d for unit in files.units() for d in documents[unit][0]] == whole
    assert merged.as_dict() == report.as_dict()


def test_a_unit_holds_files_of_one_input(corpus):
    files = Files([corpus / "note 0*.txt", corpus / "note 1*.txt"])
    assert [unit.label for unit in files.units()] == [
        "note 00.txt and 9 more",
        "note 10.txt and 9 more",
    ]
    assert [unit.source for unit in files.units()] == [0, 1]
    assert files.sources == ["note 0*.txt", "note 1*.txt"]


def test_small_files_are_grouped_up_to_the_size_of_a_unit(tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.txt").write_bytes(b"x" * 30)
    (tmp_path / "5.txt").write_bytes(b"x" * 300)
    sizes = [unit.size for unit in Files([tmp_path], unit_bytes=100).units()]
    assert sizes == [90, 60, 300, 90, 30]


def test_the_description_distinguishes_requests(corpus):
    description = Files([corpus]).describe()
    assert description["files"] == 44
    assert description["bytes"] == sum(
        p.stat().st_size for p in corpus.iterdir() if p.suffix != ".jpg"
    )
    assert Files([corpus], text_key="body").describe() != description
    assert Files([corpus], policy=Policy(undecodable="replace")).describe() != description


def test_long_documents_of_every_kind(corpus):
    policy = Policy(long="cut", max_document_bytes=4)
    documents, report = read(corpus, policy=policy)
    assert {len(text) for _, text in documents} == {4}
    assert report.counts["long, cut"] == len(documents)


def test_links_of_a_folder_to_itself_end(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_MOST_MATCHES", 1000)
    (tmp_path / "a.txt").write_text("text")
    for name in ("one", "two"):  # of two, the ways double with each level
        (tmp_path / name).symlink_to(".")
    (tmp_path / "loop").symlink_to("loop")
    assert in_place_kind(str(tmp_path)) is None
    documents, report = read(tmp_path)
    assert [text for _, text in documents] == [b"text"]
    assert report.counts == {"linked folder": 2, "broken link": 1}
    for look in (in_place_kind, read):
        with pytest.raises(UserError, match="matches more than 1,000 paths"):
            look(f"{tmp_path}/**")


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.bin", "a.npy"])
def test_a_hole_of_a_terabyte_is_refused_before_it_is_read(tmp_path, name):
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, 1 << 40)
    with pytest.raises(UserError, match="unpacks to more than 100 times its bytes"):
        in_place_kind(str(tmp_path / name))
    if not name.endswith((".bin", ".npy")):
        expect_refused("unpacks to more than 100 times its bytes", tmp_path / name)
