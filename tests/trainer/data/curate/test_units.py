"""A curated build: what steps keep becomes the dataset, and every document that goes is counted."""

import json
from dataclasses import dataclass
from importlib.metadata import version
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forescale.data.curate import curation as module
from forescale.data.curate.curation import Curation
from forescale.data.curate.duplicates import Duplicates
from forescale.data.curate.steps import inputs
from forescale.data.curate.steps.repair import Repair
from forescale.data.curate.steps.urls import Urls
from forescale.data.curate.substrings import Substrings
from forescale.data.dataset import Dataset
from forescale.data.prepare.builder import BuildConfig, build_dataset
from forescale.data.prepare.sample import documents
from forescale.data.text.documents import ReadingReport
from forescale.data.text.files import Files
from forescale.monitor.report.curation import page

CONFIG = BuildConfig(tokenizer="bytes", validation=0.0)


@dataclass(frozen=True)
class Shout:
    """Changes small letters of documents with the word shout, drops those with the word spam."""

    VERSION: ClassVar[int] = 1
    SOURCE: ClassVar[str] = "this test"

    def __call__(self, draft):
        draft.attributes["language"] = "en" if "the" in draft.text else "xx"
        if "spam" in draft.text:
            return "says spam"
        if "empty" in draft.text:
            draft.text = " "
        if "shout" in draft.text:
            draft.text = draft.text.upper()
        return None


@pytest.fixture
def curation(monkeypatch):
    monkeypatch.setattr(module, "step_classes", lambda: {"shout": Shout})
    return Curation([Shout()], samples=2)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    words = ["the shout {}", "spam {}", "the plain {}", "empty {}"]
    lines = [
        {"text": words[i % 4].format(i), "url": f"https://www.site{i % 3}.org/{i}"}
        for i in range(400)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def built(rows, output, curation, workers=1):
    source = Files([rows], unit_bytes=2_000, url_key=curation.url_key)
    build_dataset(source, output, CONFIG, workers=workers, curation=curation)
    return Dataset(output)


def texts(dataset):
    return sorted(
        t.decode() for split in ("train", "validation") for t in documents(dataset, split)
    )


def test_the_dataset_has_what_the_steps_keep_and_the_counts_say_the_rest(rows, tmp_path, curation):
    dataset = built(rows, tmp_path / "out", curation)
    remaining = [i for i in range(400) if i % 4 in (0, 2)]
    assert texts(dataset) == sorted(
        f"THE SHOUT {i}" if i % 4 == 0 else f"the plain {i}" for i in remaining
    )
    counts = dataset.curation
    step = counts["steps"]["shout"]
    assert step["read"][0] == 400
    assert step["changed"] == [100, 0]
    assert {reason: pair[0] for reason, pair in step["dropped"].items()} == {
        "says spam": 100,
        "nothing left": 100,
    }
    assert [sum(row) for row in counts["lengths"]] == [400, 200]
    assert counts["languages"] == {"en": [200, 0], "xx": [0, 200]}
    assert {k: sum(v) for k, v in counts["domains"].items()} == {
        "site0.org": 134, "site1.org": 133, "site2.org": 133,
    }  # fmt: skip
    assert {kind: len(samples) for kind, samples in counts["samples"].items()} == {
        "shout: changed": 2, "shout: nothing left": 2, "shout: says spam": 2,
    }  # fmt: skip
    left_out = dataset.manifest["report"]["left_out"]
    assert left_out["shout: says spam"]["count"] == 100
    assert left_out["shout: says spam"]["first"][0].startswith("rows.jsonl@")
    html = page(dataset)
    assert "200 of 400 documents remain" in html
    assert "says spam" in html


def test_a_dataset_depends_on_no_number_of_workers_and_on_no_cut_of_the_input(
    rows, tmp_path, curation
):
    whole = Files([rows], unit_bytes=1 << 20, url_key="url")
    build_dataset(whole, tmp_path / "a", CONFIG, curation=curation)
    a, b = Dataset(tmp_path / "a"), built(rows, tmp_path / "b", curation)
    assert a.identity == b.identity
    assert a.curation == b.curation


def test_another_version_of_a_step_is_another_request(rows, tmp_path, curation, monkeypatch):
    built(rows, tmp_path / "out", curation)
    monkeypatch.setattr(Shout, "VERSION", 2)
    with pytest.raises(Exception, match="different curation"):
        built(rows, tmp_path / "out", curation)


@pytest.fixture
def repeated(tmp_path):
    """60 texts of 120 words; 20 of them again with three words changed; 10 that hold 40 words of
    another one."""
    rng = np.random.default_rng(1)
    letters = rng.integers(97, 123, (60, 120, 6), np.uint8)
    texts = [" ".join(bytes(word).decode() for word in rows) for rows in letters]
    near = []
    for place in (0, 50):
        for text in texts[:10]:
            words = text.split()
            near.append(" ".join([*words[:place], "changed", *words[place + 1 :]]))
    passages = [
        "fresh " * 3 + " ".join(texts[30 + i].split()[40:80]) + f" rest{i}" for i in range(10)
    ]
    passages.append(" ".join(texts[45].split()[30:70]))
    path = tmp_path / "repeated.jsonl"
    rows = ({"text": text, "url": "https://a.org"} for text in texts + near + passages)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, texts


def test_near_duplicates_go_and_repeated_passages_are_cut(repeated, tmp_path):
    path, originals = repeated
    curation = Curation(near_duplicates=Duplicates(), repeated_passages=Substrings(20, 5))
    dataset = built(path, tmp_path / "out", curation)
    remaining = texts(dataset)
    cut = [f"fresh fresh fresh rest{i}" for i in range(10)]
    assert remaining == sorted([*originals, *cut])
    steps = dataset.curation["steps"]
    assert steps["near_duplicates"]["dropped"]["near-duplicate"][0] == 20
    assert steps["repeated_passages"]["changed"][0] == 10
    assert steps["repeated_passages"]["dropped"]["nothing left"][0] == 1
    assert dataset.curation["domains"] == {"a.org": [70, 21]}
    assert [sum(row) for row in dataset.curation["lengths"]] == [91, 70]
    *_, dropped, stayed = dataset.curation["samples"]["near_duplicates: near-duplicate"][0]
    assert stayed in {text[: len(stayed)] for text in originals}
    assert dropped != stayed
    left_out = dataset.manifest["report"]["left_out"]
    assert left_out["near-duplicate"]["count"] == 20
    assert left_out["nothing left"]["count"] == 1
    source = Files([path], unit_bytes=5_000, url_key="url")
    other = Dataset(build_dataset(source, tmp_path / "other", CONFIG, workers=2, curation=curation))
    assert other.identity == dataset.identity
    assert other.curation == dataset.curation


def test_another_list_of_a_step_is_another_request_wherever_it_lies(tmp_path):
    def described(folder, text):
        (path := tmp_path / folder).mkdir(exist_ok=True)
        (path / "domains.txt").write_text(text)
        return Curation([Urls(block=(str(path / "domains.txt"),))]).describe()

    first = described("a", "spam.org")
    assert described("b", "spam.org") == first
    assert described("a", "spam.org\nother.org") != first


def test_another_version_of_a_package_of_a_step_is_another_request(monkeypatch):
    (described,) = Curation([Repair()]).describe()["steps"]
    assert described["packages"] == {"ftfy": version("ftfy")}
    monkeypatch.setattr(inputs, "version", lambda name: "0.0")
    assert Curation([Repair()]).describe()["steps"][0]["packages"] == {"ftfy": "0.0"}


def test_an_address_may_be_nested_in_lines_and_tables(tmp_path):
    rows = [{"id": i, "meta": {"url": f"https://a.org/{i}", "text": f"text {i}"}} for i in range(9)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    for name in ("a.jsonl", "b.parquet"):
        source = Files([tmp_path / name], "meta.text", url_key="meta.url")
        read = [d for unit in source.units() for d in source.read(unit, ReadingReport())]
        assert [d.url for d in read] == [row["meta"]["url"] for row in rows]
        assert [d.text.decode() for d in read] == [row["meta"]["text"] for row in rows]
        for key in ("url", "meta.other", "id"):
            source = Files([tmp_path / name], "meta.text", url_key=key)
            read = [d for unit in source.units() for d in source.read(unit, ReadingReport())]
            assert [d.url for d in read] == [""] * 9
