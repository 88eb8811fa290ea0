"""Building: the same bytes for the same text, no incomplete output, everything is counted."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pyppmd import Ppmd7Encoder

from forescale.data.check import check
from forescale.data.dataset import ORIGINS, Dataset
from forescale.data.prepare import sample
from forescale.data.prepare.builder import BuildConfig, build_dataset
from forescale.data.prepare.sample import first_bytes, primed
from forescale.data.prepare.tokens import kind_of
from forescale.data.text.documents import Policy, cut, pieces
from forescale.data.text.files import Files
from forescale.ground.errors import UserError
from forescale.ground.storage import read_table, write_json, write_table
from tests.trainer.data.synthetic_text import SMALL, Texts, synthetic


def digest(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(directory.iterdir())}


def texts_of(path: Path, split: str) -> list[str]:
    """Return the documents of a split as read from its shards."""
    dataset = Dataset(path)
    part, documents = dataset.split(split), []
    for shard, tokens in enumerate(part.shard_tokens):
        ids = part.read(shard, 0, tokens)
        ends = np.flatnonzero(ids == dataset.end_of_text)
        assert ends[-1] == tokens - 1  # documents are never split between shards
        documents += [
            dataset.tokenizer.decode(d[:-1], skip_special_tokens=False)
            for d in np.split(ids, ends + 1)[:-1]
        ]
    return documents


def test_the_same_text_gives_the_same_bytes(texts, dataset, tmp_path):
    again = build_dataset(Texts(texts), tmp_path / "again", SMALL)
    assert digest(again) == digest(dataset)
    other = build_dataset(Texts(texts), tmp_path / "other", replace(SMALL, seed=1))
    assert Dataset(other).identity != Dataset(dataset).identity
    assert Dataset(other).corpus_hash == Dataset(dataset).corpus_hash


@pytest.mark.parametrize("workers", [2, 4])
def test_the_bytes_do_not_depend_on_the_number_of_workers(texts, tmp_path, workers):
    source = Texts([*texts, b"", *texts[:9], b"\xff"], per_unit=5)
    alone = build_dataset(source, tmp_path / "alone", SMALL)
    many = build_dataset(source, tmp_path / "many", SMALL, workers=workers)
    assert digest(many) == digest(alone)


def test_hash_seeds_and_threads_do_not_change_the_bytes(texts, dataset, tmp_path):
    code = (
        "import sys; from tests.trainer.data.synthetic_text import *;"
        "from forescale.data.prepare.builder import *;"
        "build_dataset(Texts(synthetic()), sys.argv[1], SMALL)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "serial")]
    environment = {
        **os.environ,
        "RAYON_NUM_THREADS": "1",
        "PYTHONHASHSEED": "7",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    subprocess.run(command, check=True, env=environment)
    assert digest(tmp_path / "serial") == digest(dataset)


def test_the_bytes_are_the_same_for_any_memory_use(texts, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("forescale.data.prepare.tokens._RUN", 300)
    monkeypatch.setattr("forescale.data.prepare.tokens._BATCH", 100)
    monkeypatch.setattr("forescale.data.prepare.tokens._GATHERED", 200)
    monkeypatch.setattr("forescale.data.prepare.tokens._ROWS", 3)
    assert digest(build_dataset(Texts(texts), tmp_path / "d", SMALL)) == digest(dataset)


def test_the_shuffle_is_global(tmp_path):
    texts = [b"document %d" % i for i in range(400)]
    config = replace(SMALL, tokenizer="bytes", validation=0)
    path = build_dataset(Texts(texts, per_unit=10), tmp_path / "d", config)
    order = np.array([int(text.split()[1]) for text in texts_of(path, "train")])
    assert sorted(order) == list(range(400))
    assert abs(np.corrcoef(order, np.arange(400))[0, 1]) < 0.1
    first = texts_of(path, "train")[: len(order) // 4]
    assert len({int(text.split()[1]) // 10 for text in first}) > 30  # of the 40 units


def test_every_document_comes_out_once_and_counts_agree(texts, dataset):
    manifest = Dataset(dataset).manifest
    train, validation = texts_of(dataset, "train"), texts_of(dataset, "validation")
    assert sorted(train + validation) == sorted(t.decode() for t in texts)
    assert train != [t.decode() for t in texts if t.decode() in set(train)]  # shuffled
    for name, documents in (("train", train), ("validation", validation)):
        split = manifest["splits"][name]
        assert split["documents"] == len(documents)
        assert split["bytes"] == sum(len(t.encode()) for t in documents)
    assert len(manifest["splits"]["train"]["shards"]) >= 3
    assert manifest["dtype"] == "uint16"
    assert check(dataset) == []


def test_a_document_stays_held_out_when_others_are_added(texts, dataset, tmp_path):
    part = build_dataset(Texts(texts[::2]), tmp_path / "part", SMALL)
    held_out = set(texts_of(dataset, "validation"))
    assert set(texts_of(part, "validation")) == held_out & {t.decode() for t in texts[::2]}


def test_faulty_and_duplicate_documents_are_counted(texts, dataset, tmp_path):
    extra = [b"", b" \n", b"\xff", texts[3], texts[3], texts[5]]
    path = build_dataset(Texts(texts + extra), tmp_path / "d", SMALL)
    report = Dataset(path).manifest["report"]
    assert {reason: row["count"] for reason, row in report["left_out"].items()} == {
        "duplicate": 3,
        "empty": 2,
        "undecodable": 1,
    }
    assert report["left_out"]["duplicate"]["first"] == ["text-63", "text-64", "text-65"]
    size = 2 * len(texts[3]) + len(texts[5])
    assert report["duplicates"] == {"documents": 3, "bytes": size}
    assert Dataset(path).identity == Dataset(dataset).identity


def test_the_end_of_text_token_in_a_text_is_text(tmp_path):
    texts = [*synthetic(20), b"a <|endoftext|> b"]
    path = build_dataset(Texts(texts), tmp_path / "d", SMALL)
    assert "a <|endoftext|> b" in texts_of(path, "train") + texts_of(path, "validation")
    assert "not lossless in this tokenizer" not in Dataset(path).manifest["report"]["left_out"]


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_single_document_is_cut_at_a_line(tmp_path, share):
    text = b"".join(b"line %d\n" % i for i in range(400))
    config = replace(SMALL, tokenizer="bytes", validation=share)
    path = build_dataset(Texts([text]), tmp_path / "d", config)
    (train,), (validation,) = texts_of(path, "train"), texts_of(path, "validation")
    assert train + validation == text.decode()
    assert train.endswith("\n")
    assert abs(len(validation) / len(text) - share) < 0.01


def test_given_tokenizer_and_wide_vocabulary(texts, dataset, tmp_path):
    spec = json.loads((dataset / "tokenizer.json").read_text())
    spec["added_tokens"].append(
        {**spec["added_tokens"][0], "id": 70_000, "content": "<|far|>"}
    )  # an id beyond uint16
    spec["model"]["vocab"]["<|far|>"] = 70_000
    tokenizer_file = tmp_path / "tokenizer.json"
    tokenizer_file.write_text(json.dumps(spec))
    path = build_dataset(
        Texts(texts), tmp_path / "d", replace(SMALL, tokenizer=str(tokenizer_file))
    )
    assert Dataset(path).manifest["dtype"] == "uint32"
    assert (path / "tokenizer.json").read_bytes() == tokenizer_file.read_bytes()
    assert sorted(texts_of(path, "train")) == sorted(texts_of(dataset, "train"))
    assert check(path) == []
    assert str(tmp_path) not in (path / "manifest.json").read_text()


def test_a_tokenizer_that_loses_text_is_reported(texts, dataset, tmp_path):
    spec = json.loads((dataset / "tokenizer.json").read_text())
    spec["normalizer"] = {"type": "Lowercase"}
    spec["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
    tokenizer_file = tmp_path / "tokenizer.json"
    tokenizer_file.write_text(json.dumps(spec))
    lossy = [*texts, b"  space before"]
    path = build_dataset(
        Texts(lossy), tmp_path / "d", replace(SMALL, tokenizer=str(tokenizer_file))
    )
    row = Dataset(path).manifest["report"]["left_out"]["not lossless in this tokenizer"]
    assert "text-60" in row["first"]


def test_baselines_are_bits_per_byte(dataset, texts):
    rows = Dataset(dataset).manifest["baselines"]
    held_out = texts_of(dataset, "validation")
    assert rows["held_out_bytes"] == sum(len(t.encode()) for t in held_out)
    for name in ("xz", "zlib_per_file", "ppmd", "ppmd_all"):
        assert rows[name]["bits_per_byte"] == 8 * rows[name]["bytes"] / rows["held_out_bytes"]
    assert rows["xz"]["bytes"] < rows["zlib_per_file"]["bytes"]
    assert rows["ppmd_all"]["bytes"] < rows["ppmd"]["bytes"] < rows["xz"]["bytes"]
    train = [text.encode() for text in texts_of(dataset, "train")]
    assert rows["ppmd_all"]["sample_bytes"] == sum(map(len, train))


def test_ppmd_is_given_as_much_training_text_as_a_model(dataset, tmp_path, monkeypatch):
    data, cache = Dataset(dataset), tmp_path / "cache"
    train = [text.encode() for text in texts_of(dataset, "train")]
    held_out = "".join(texts_of(dataset, "validation")).encode()
    half = sum(map(len, train)) // 2
    before = b"".join(first_bytes(train, half))
    assert half <= len(before) < half + max(map(len, train))
    name, bits = primed(data, half, cache)
    assert f"given {len(before) / 1e6:.3g} MB" in name

    def size(text):
        encoder = Ppmd7Encoder(16, 1 << 30)
        return len(encoder.encode(text)) + len(encoder.flush())

    # So much more PPMd needs where the held-out text follows, up to the bytes that it holds back.
    assert bits * len(held_out) / 8 == pytest.approx(size(before + held_out) - size(before), abs=9)
    rows = data.manifest["baselines"]
    assert rows["ppmd_all"]["bits_per_byte"] < bits < rows["ppmd"]["bits_per_byte"]
    (path,) = cache.iterdir()  # for the next run on this dataset
    write_json(path, {"bits_per_byte": 1.5, "sample_bytes": half})
    assert primed(data, half, cache)[1] == 1.5
    path.write_text("damaged")
    assert primed(data, half, Path("/proc/none"))[1] == primed(data, half, cache)[1] == bits
    # A long run doesn't wait for it; the build has given it as much, or was without it.
    monkeypatch.setattr(sample, "COMPARED", half - 1)
    assert primed(data, half, tmp_path / "none") is None
    monkeypatch.undo()
    assert primed(data, rows["ppmd_all"]["sample_bytes"], tmp_path / "none") is None
    del rows["ppmd_all"]
    assert primed(data, half, tmp_path / "none") is None
    assert not (tmp_path / "none").exists()


def test_an_equal_request_finds_the_output_and_another_is_refused(texts, dataset, tmp_path):
    before = digest(dataset)
    assert build_dataset(Texts(texts), dataset, SMALL) == dataset
    with pytest.raises(UserError, match=r"built with different seed"):
        build_dataset(Texts(texts), dataset, replace(SMALL, seed=3))
    assert digest(dataset) == before
    (tmp_path / "notes").mkdir()
    with pytest.raises(UserError, match="not a dataset"):
        build_dataset(Texts(texts), tmp_path / "notes", SMALL)


def test_bad_input_raises_a_clear_error_and_leaves_nothing(tmp_path, texts):
    cases = [
        (Texts([b"", b"\xff"]), SMALL, "no usable document.*1 empty, 1 undecodable"),
        (Texts(texts), replace(SMALL, validation=0.9), "validation: 0.9"),
        (Texts(texts), replace(SMALL, member_tokens=0), "member_tokens"),
        (Texts(texts), replace(SMALL, tokenizer="none.json"), "no such file"),
        (Texts(texts), replace(SMALL, tokenizer="bytes", end_of_text="<x>"), "no token <x>"),
    ]
    for source, config, sentence in cases:
        with pytest.raises(UserError, match=sentence):
            build_dataset(source, tmp_path / "d", config)
        assert [p.name for p in tmp_path.iterdir() if p.name != ".d.lock"] == []


def test_text_that_changes_while_being_read_is_refused(texts, tmp_path):
    class Changing(Texts):
        def read(self, unit, report):
            yield from super().read(unit, report)
            self.texts = [*self.texts[:-1], b"other"]

    with pytest.raises(UserError, match="changed while it was being read"):
        build_dataset(Changing(list(texts)), tmp_path / "d", SMALL)
    assert [p.name for p in tmp_path.iterdir()] == [".d.lock"]


def test_finished_units_of_changed_files_are_not_used(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.txt").write_text(f"the text {name} of before\n")
    (folder / "d.txt").write_bytes(b"not UTF-8 \xff\n")
    config = replace(SMALL, tokenizer="bytes", validation=0)

    def build():
        source = Files([folder], policy=Policy(undecodable="fail"), unit_bytes=1)
        lines = []
        path = build_dataset(
            source, tmp_path / "d", config, lambda event, *a, **k: lines.append(event)
        )
        return path, lines[0]

    with pytest.raises(UserError, match=r"in/d\.txt: isn't UTF-8"):
        build()
    assert (tmp_path / ".d.building" / "hashes" / "000000").exists()
    (folder / "a.txt").write_text("the text a, of later\n")  # as long as before
    (folder / "d.txt").write_bytes(b"now is UTF8\n")
    path, lines = build()
    assert "the inputs or package versions have changed since" in lines
    assert sorted(texts_of(path, "train"))[1] == "the text a, of later\n"
    (folder / "b.txt").rename(folder / "e.txt")
    with pytest.raises(UserError, match=r"built with different source"):
        build()


def test_a_second_builder_waits_for_the_first_where_it_cannot_help(texts, tmp_path):
    began, waits, lines = threading.Event(), threading.Event(), []

    class Slow(Texts):
        def read(self, unit, report):
            if not began.is_set():
                began.set()
                assert waits.wait(60)
            yield from super().read(unit, report)

    def second(sentence, done, total, unit, **options):
        lines.extend([sentence] * (not unit))
        waits.set()

    source = Slow(texts, per_unit=len(texts))
    first = threading.Thread(target=build_dataset, args=(source, tmp_path / "d", SMALL))
    first.start()
    assert began.wait(60)
    path = build_dataset(source, tmp_path / "d", SMALL, second)
    first.join()
    assert lines == [f"{path}: built together with another process"]
    assert {p.name for p in tmp_path.iterdir()} == {"d", ".d.lock"}


def test_pieces_join_to_the_text_and_split_no_character():
    for text in ("ab\ncd\nef\n", "🙂" * 50, "naïve " * 30, "x", "a\n" + "y" * 100):
        raw = text.encode()
        for size in (4, 5, 7, 16, 1000):
            parts = list(pieces(raw, size))
            assert "".join(parts) == text
            assert max(len(p.encode()) for p in parts) <= size
    assert cut(b"aa\nbb\ncc", 0, 7) == 6


def test_nothing_is_held_out_with_validation_0(texts, tmp_path):
    path = build_dataset(Texts(texts), tmp_path / "d", replace(SMALL, validation=0))
    assert Dataset(path).split("validation").shard_tokens == []
    assert Dataset(path).manifest["baselines"] is None
    assert len(texts_of(path, "train")) == len(texts)
    assert check(path) == []


def test_a_finished_dataset_is_used_in_a_read_only_folder(texts, dataset, tmp_path):
    shared = tmp_path / "shared"
    shutil.copytree(dataset, shared / "d")
    assert build_dataset(Texts(texts), shared / "d", SMALL) == shared / "d"
    assert [p.name for p in shared.iterdir()] == ["d"]  # no lock file was written


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("src/a/b.PY", ".py"),
        ("books/x.txt.gz", ".txt"),
        ("web/part-7.jsonl@20480", ".jsonl"),
        ("web/part-7.parquet:12", ".parquet"),
        ("src/Makefile", ""),
        ("src.d/Makefile", ""),
        ("src/.gitignore", ""),
        ("src/a file. With words", ""),
        ("books/x.txt (last part)", ".txt"),
        ("web/part-7.jsonl@20480 (first part)", ".jsonl"),
    ],
)
def test_the_kind_of_a_document_is_the_suffix_of_its_file(name, kind):
    assert kind_of(name) == kind


@pytest.fixture
def with_origins(tmp_path):
    """A dataset of two folders, whose texts say where they come from."""
    for folder, suffix, count in (("one", ".py", 40), ("one", ".md", 30), ("two", ".md", 30)):
        (tmp_path / folder).mkdir(exist_ok=True)
        for i in range(count):
            (tmp_path / folder / f"{i}{suffix}").write_text(f"{folder} {suffix} {i}\n" * 5)
    config = BuildConfig(tokenizer="bytes", validation=0.4, shard_tokens=1000, member_tokens=300)
    source = Files([tmp_path / "one", tmp_path / "two"])
    return build_dataset(source, tmp_path / "data", config)


def test_each_held_out_document_has_its_input_and_its_kind(with_origins):
    dataset = Dataset(with_origins)
    origins, texts = dataset.origins, texts_of(with_origins, "validation")
    assert len(dataset.split("validation").shard_tokens) > 1
    assert len(texts) == len(origins["source"]) == len(origins["kind"]) > 20
    for text, source, kind in zip(texts, origins["source"], origins["kind"], strict=True):
        assert text.split(" ")[:2] == [origins["sources"][source], origins["kinds"][kind]]
    assert len(np.unique(origins["source"])) == len(np.unique(origins["kind"])) == 2
    assert check(with_origins) == []


def test_documents_of_a_small_input_are_divided(tmp_path):
    for folder, count in (("many", 40), ("few", 3), ("one", 1)):
        (tmp_path / folder).mkdir()
        for i in range(count):
            lines = (f"{folder} {i} {n}\n" for n in range(100))
            (tmp_path / folder / f"{i}.txt").write_text("".join(lines))
    config = BuildConfig(tokenizer="bytes", validation=0.02)
    source = Files([tmp_path / name for name in ("many", "few", "one")])
    paths = [
        build_dataset(source, tmp_path / str(workers), config, workers=workers)
        for workers in (1, 2)
    ]
    assert digest(paths[0]) == digest(paths[1])
    assert check(paths[0]) == []
    train, held_out = (texts_of(paths[0], split) for split in ("train", "validation"))
    assert {text.count("\n") for text in held_out if text.startswith("many")} == {100}
    tails = [text for text in held_out if not text.startswith("many")]
    assert sorted(text.split()[0] for text in tails) == ["few"] * 3 + ["one"]
    assert all(5 <= text.count("\n") <= 15 for text in tails)
    whole = {path.read_text() for path in tmp_path.glob("[a-z]*/*.txt")}
    heads = {text for text in train if text not in whole}
    assert {head + tail for head in heads for tail in tails} & whole == whole - {*train, *held_out}
    assert len(heads) == 4
    origins = Dataset(paths[0]).origins
    assert origins["kinds"] == [".txt"]
    assert len(set(origins["source"])) == 3


def test_it_is_no_part_of_the_identity_and_need_not_be_there(with_origins):
    identity, table = Dataset(with_origins).identity, read_table(with_origins)
    del table[ORIGINS]
    (with_origins / ORIGINS).unlink()
    write_table(with_origins, table)
    assert Dataset(with_origins).identity == identity
    assert Dataset(with_origins).origins is None
    assert check(with_origins) == []


def test_a_changed_file_is_a_fault(with_origins):
    origins = json.loads((with_origins / ORIGINS).read_text())
    origins["kind"][0] = 1 - origins["kind"][0]
    (with_origins / ORIGINS).write_text(json.dumps(origins))
    assert any(ORIGINS in fault for fault in check(with_origins))
