"""`forescale shards`: the user's text in, a dataset and an account out."""

import gzip
import json
import re

import pytest
import zstandard

from forescale import open_dataset
from forescale.data.dataset import Dataset


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "books"
    root.mkdir()
    for i in range(8):
        (root / f"{i}.txt").write_text(f"Once upon a time {i} " * 20)
    (root / "copy.md").write_text("Once upon a time 0 " * 20)
    (root / "broken.py").write_bytes(b"\xff\xfe\x00")
    (root / "picture.png").write_bytes(b"\x89PNG")
    return root


def test_a_folder_becomes_a_dataset_with_an_account(folder, forescale):
    code, out, err = forescale("shards", "books", "output=data", "vocab_size=300")
    assert code == 0
    train = Dataset("data").split("train")
    assert f"{train.num_documents:,} documents" in out
    assert f"{train.num_bytes:,} bytes" in out
    assert f"{train.num_tokens:,} tokens" in out
    assert f"{train.num_bytes / train.num_tokens:.2f} bytes per token" in out
    assert "1  duplicate: books/copy.md" in out
    assert "1  undecodable: books/broken.py (byte 0)" in out
    assert "1  other suffix: books/picture.png" in out
    assert out.endswith("Next: forescale train mine data.path=data\n")
    assert "tokenise" in err  # progress


def test_again_finds_it_and_otherwise_is_refused(folder, forescale):
    words = ("shards", "books", "output=data", "vocab_size=300")
    assert forescale(*words)[0] == 0
    before = {p.name: p.stat().st_mtime_ns for p in (folder.parent / "data").iterdir()}
    assert "existed already" in forescale.prints(*words)
    assert "built with different seed" in forescale.refuses(*words, "seed=3")
    assert {p.name: p.stat().st_mtime_ns for p in (folder.parent / "data").iterdir()} == before


def test_more_files_are_a_further_source_with_the_same_tokenizer(folder, forescale):
    words = ("shards", "books", "output=data", "vocab_size=300")
    assert forescale(*words)[0] == 0
    (folder / "more.txt").write_text("A text that came later. " * 20)
    assert "shards FILES output=DIR curate.against=[data]" in forescale.refuses(*words)
    words = ("curate.against=[data]", "curate.near_duplicates=drop")
    out = forescale.prints("shards", "books", "output=later", *words)
    assert "9  is in data: books/0.txt" in out
    data, later = Dataset("data"), Dataset("later")
    assert later.manifest["tokenizer"] == data.manifest["tokenizer"]
    assert later.manifest["corpus"]["documents"] <= 2  # the later one, and its last part
    assert "complete" in forescale.prints("check", "later")
    (folder.parent / "data").rename(folder.parent / "moved")
    assert "judged against" in forescale.prints("check", "later")
    words = ("curate.against=[moved]", "curate.near_duplicates={kind: drop, across_sources: false}")
    assert "across_sources" in forescale.refuses("shards", "books", "output=x", *words)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("curate.near_duplicates={kind: drop, minhash: {bands: 0}}",
         "curate.near_duplicates.minhash.bands: 0 is out of range"),
        ("curate.near_duplicates={kind: drop, stays: last}", "near_duplicates.stays: 'last'"),
        ("curate.repeated_passages={kind: cut, words: 1}", "curate.repeated_passages.words: 1 is"),
        ("curate.steps=[classifier]", "curate.steps.0: needs one of model and target"),
        ("curate.steps=[{kind: urls, block: [no.txt]}]",
         "curate.steps.0.block: there is no file no.txt"),
        ("curate.steps=[{kind: length, least: 3}]", "did you mean least_words?"),
    ],
)  # fmt: skip
def test_a_wrong_setting_of_a_curation_is_named_by_its_key(folder, forescale, word, sentence):
    assert sentence in forescale.refuses("shards", "books", "output=data", word)


def test_a_class_that_scores_may_be_in_the_working_directory(folder, forescale):
    code = "class Score:\n    def __call__(self, text):\n        return float('7' in text)\n"
    (folder.parent / "scoring_here.py").write_text(code)
    step = "curate.steps=[{kind: classifier, target: scoring_here.Score}]"
    out = forescale.prints("shards", "books", "output=data", "tokenizer=bytes", "workers=2", step)
    assert "classifier: low score" in out


def test_lines_plain_and_compressed(tmp_path, monkeypatch, forescale):
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"body": f"document {i} " * 9}).encode() for i in range(12)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines[:4]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines[4:8])))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(b"\n".join(lines[8:])))
    files = ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst")
    err = forescale.refuses("shards", *files, "output=data", "tokenizer=bytes")
    assert "set text_key (keys: body)" in err
    words = ("text_key=body", "tokenizer=bytes", "validation_fraction=0.3")
    assert forescale("shards", *files, "output=data", *words)[0] == 0
    splits = Dataset("data").manifest["splits"].values()
    # Of each document of a small input the first part is for training, the last one held out.
    assert [split["documents"] for split in splits] == [12, 12]
    assert open_dataset("data").vocab_size == 257


def test_inputs_of_every_kind_and_their_shares(folder, forescale):
    (folder / "empty.txt").write_text(" ")
    rows = "".join(json.dumps({"text": f"row {i} " * 40}) + "\n" for i in range(10))
    (folder.parent / "rows.jsonl").write_text(rows)
    words = ("books", "rows.jsonl", "*.jsonl", "output=data", "tokenizer=bytes", "workers=2")
    out = forescale.prints("shards", *words)
    assert "Shares of the inputs:" in out
    assert re.search(r"55\.\d% +\d,\d+ tokens .* 8 documents  books\n", out)
    assert re.search(r"44\.\d% +\d,\d+ tokens .* 10 documents  rows.jsonl\n", out)
    assert re.search(r" 0\.0% +0 tokens .* 0 documents  \*.jsonl\n", out)
    assert "Duplicates removed, the first of each kept: 11 (" in out
    assert "1  empty: books/empty.txt\n" in out
    assert re.search(r"128 to 255 +10  █{40}\n", out)  # the lengths
    assert "whose last part is held out: 18" in out
    assert re.search(r"Only \d+ tokens are held out", out)


def test_a_worker_that_finds_a_fault_says_it_in_one_sentence(folder, forescale):
    words = ("books", "books", "output=data", "undecodable=fail", "workers=2")
    err = forescale.refuses("shards", *words)
    assert err.splitlines()[-1] == (
        "forescale: books/broken.py: isn't UTF-8 (byte 0); "
        "fix it, or choose undecodable=skip or replace."
    )


def test_the_keys_reach_the_builder(folder, forescale):
    keys = {"vocab_size": 290, "seed": 5, "shard_tokens": 500, "member_tokens": 250}
    words = [f"{k}={v}" for k, v in keys.items()]
    words += ["validation_fraction=0.25", "tokenizer=bytes"]
    assert forescale("shards", "books", "output=data", *words)[0] == 0
    build = Dataset("data").manifest["build"]
    assert {k: build[k] for k in keys} == keys
    assert build["validation"] == 0.25
    assert build["tokenizer"] == "bytes"
    assert len(Dataset("data").split("train").shard_tokens) > 1


def test_a_given_tokenizer_is_used(folder, forescale, trained):
    words = ("shards", "books", "output=data", f"tokenizer={trained.tokenizer}")
    assert forescale(*words)[0] == 0
    tokenizer = (folder.parent / "data" / "tokenizer.json").read_bytes()
    assert tokenizer == trained.tokenizer.read_bytes()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["books"], "output: is empty"),
        (["output=data"], "input: is empty"),
        (["nothing", "output=data"], "nothing: no such file or folder"),
        (["books/picture.png", "output=data"], "its suffix isn't a known kind of text"),
        (["books", "output=books"], "exists and isn't a dataset"),
        (["books", "output=data", "tokenizer=nothing.json"], "no such file"),
        (["books", "output=data", "vocab_size=20"], "vocab_size: must be at least 257"),
        (["books", "output=data", "validation_fraction=0.9"], "validation_fraction: must be at"),
        (["books", "output=data", "shard_tokens=5"], "shard_tokens: 5 is less than"),
        (["books", "output=books/0.txt/data"], "is a file, but a directory is needed"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(folder, forescale, words, sentence):
    before = sorted(p.name for p in folder.parent.rglob("*"))
    err = forescale.refuses("shards", *words)
    assert sentence in err
    left = [p for p in folder.parent.rglob("*") if not p.name.endswith(".lock")]
    assert sorted(p.name for p in left) == before
