"""The embedded corpus: which files are left out, which are held out; its name and hash depend only
on its content."""

import shutil
from pathlib import Path

import pytest

from forescale.data.dataset import Dataset
from forescale.data.prepare import corpus
from forescale.data.prepare.builder import BuildConfig
from forescale.data.text.documents import ReadingReport
from forescale.ground.console import progress_display
from forescale.ground.errors import UserError
from tests.benchmarks.overlap import overlap

SOURCE = "def function_{0}(value):\n    return value + {0}\n\n\nclass Name{0}:\n    pass\n"


@pytest.fixture
def roots(tmp_path) -> dict[str, Path]:
    """Two packages, with everything that an installation holds beside source code."""
    for package in ("alpha", "beta"):
        for folder in ("", "inner", "tests", "config-3.13-x86_64"):
            directory = tmp_path / "site" / package / folder
            directory.mkdir(parents=True, exist_ok=True)
            for i in range(4):
                (directory / f"m{i}.py").write_text(SOURCE.format(f"{i}{package[0]}{folder[:1]}"))
    alpha = tmp_path / "site" / "alpha"
    (alpha / "version.py").write_text("v = 1")
    (alpha / "_sysconfigdata__x.py").write_text("prefix = '/somewhere'")
    (alpha / "test_it.py").write_text("assert True")
    (alpha / "data.json").write_text("{}")
    (alpha / "table.py").write_text("T = [\n" + "    0x12345, 99,\n" * 400 + "]\n")
    (alpha / "made.py").write_text("# This file is auto-generated, do not edit\nx = 1\n")
    (alpha / "wide.py").write_text("x = '" + "abc " * 300 + "'\n")
    (alpha / "huge.py").write_text("# word by word\nname = other\n" * 8000)
    (alpha / "same.py").write_text("call(argument, other)\n" * 400)
    (alpha / "latin.py").write_bytes(b"# caf\xe9\n")
    return {p: tmp_path / "site" / p for p in ("alpha", "beta")}


def test_names_order_and_exclusions(roots):
    report = ReadingReport()
    source = corpus.PythonSource(roots)
    names = [d.name for unit in source.units() for d in source.read(unit, report)]
    sources = [f"{f}m{i}.py" for f in ("inner/", "") for i in range(4)]
    assert names == [f"{p}/{n}" for p in roots for n in sources]
    assert report.listed == {
        "over 200,000 bytes": ["alpha/huge.py"],
        "undecodable": ["alpha/latin.py (byte 5)"],
        "generated, as its head says": ["alpha/made.py"],
        "table: zlib leaves under 10 %": ["alpha/same.py"],
        "table: over 10 % digits": ["alpha/table.py"],
        "table: a line over 1,000 bytes": ["alpha/wide.py"],
    }


def test_this_installation_has_a_corpus():
    source = corpus.PythonSource()
    names = {name for name, _ in source.files}
    assert {"python/argparse.py", "torch/nn/modules/linear.py"} <= names
    assert source.held_out == {"jinja2", "requests", "starlette"} <= {*source.sources}
    assert not any("/test/" in n or "site-packages" in n for n in names)
    assert set(source.describe()["packages"]) >= {"python", "torch"}
    assert "+" not in source.describe()["packages"]["torch"]


@pytest.fixture
def projects(tmp_path, monkeypatch) -> dict[str, Path]:
    """Two projects to train on and one that is held out. Of beta two files are as one of held."""
    lines = {
        name: [f"def {name}_{i}(first, second): return {i} * first + second" for i in range(60)]
        for name in ("alpha", "beta", "held")
    }
    for name, functions in lines.items():
        (tmp_path / name).mkdir()
        for i in range(6):
            (tmp_path / name / f"m{i}.py").write_text("\n".join(functions[10 * i : 10 * i + 10]))
    copied = lines["held"][20:30]
    (tmp_path / "beta" / "copy.py").write_text("\n".join(["import os", *copied, "x = 1"]))
    changed = [line.replace(" * first", " * (other_name)") for line in copied]
    (tmp_path / "beta" / "near.py").write_text("\n".join([*changed[:7], *copied[7:]]))
    (tmp_path / "beta" / "words.py").write_text("\n".join(line[:20] for line in copied))
    monkeypatch.setattr(corpus, "HELD_OUT", ("held", "absent"))
    return {name: tmp_path / name for name in lines}


def test_a_project_is_on_one_side_and_no_passage_on_both(projects, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "installed_roots", lambda missing: projects)
    monkeypatch.setattr(corpus, "EMBEDDED", BuildConfig(vocab_size=300))
    dataset = Dataset(corpus.prepare_embedded(tmp_path / "cache", tokens="bytes"))
    sources = {row["name"]: row["documents"] for row in dataset.manifest["report"]["sources"]}
    assert sources == {"alpha": 6, "beta": 7, "held": 6}
    splits = {split: row["documents"] for split, row in dataset.manifest["splits"].items()}
    assert splits == {"train": 13, "validation": 6}
    assert {dataset.origins["sources"][i] for i in dataset.origins["source"]} == {"held"}
    left_out = dataset.manifest["report"]["left_out"]["shares 13 words with held-out text"]
    assert left_out["first"] == ["beta/copy.py", "beta/near.py"]
    assert overlap(dataset, 100) == 0, "of bytes"


@pytest.mark.slow
def test_almost_no_held_out_token_of_the_corpus_is_in_a_long_passage_of_training():
    dataset = Dataset(corpus.prepare_embedded())
    assert overlap(dataset) < 0.001  # measured: 0; where files were held out by their hash, 0.04
    assert 0.5e6 < dataset.manifest["splits"]["validation"]["bytes"] < 2e6


def test_the_corpus_is_built_once_and_again_after_an_upgrade(roots, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(corpus, "installed_roots", lambda missing: roots)
    monkeypatch.setattr(corpus, "EMBEDDED", BuildConfig(vocab_size=300, validation=0.2))
    monkeypatch.setenv("FORESCALE_CACHE", str(tmp_path / "cache"))
    with progress_display() as progress:
        path = corpus.prepare_embedded(progress=progress)
    assert path.parent == tmp_path / "cache"
    output = capsys.readouterr().err
    assert "find duplicates: 16 documents" in output
    assert "tokenise: " in output

    built = path.stat().st_mtime_ns
    assert corpus.prepare_embedded() == path
    assert path.stat().st_mtime_ns == built

    elsewhere = Path(shutil.copytree(tmp_path / "site", tmp_path / "elsewhere" / "site"))
    moved = {p: elsewhere / p for p in roots}
    monkeypatch.setattr(corpus, "installed_roots", lambda missing: moved)
    other = corpus.prepare_embedded(tmp_path / "cache2")
    assert other.name == path.name
    assert (other / "manifest.json").read_bytes() == (path / "manifest.json").read_bytes()

    small = Dataset(corpus.prepare_embedded(tokens="bytes"))
    assert small.vocab_size == 257
    assert small.path != path, "as bytes it is another dataset, of the same documents"
    assert small.split("train").num_tokens > Dataset(path).split("train").num_tokens

    (elsewhere / "alpha" / "m0.py").write_text("upgraded = True\n")
    upgraded = corpus.prepare_embedded()
    assert upgraded != path
    assert Dataset(upgraded).corpus_hash != Dataset(path).corpus_hash


def test_missing_source_code_raises_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="no Python source"):
        corpus.PythonSource({"python": tmp_path})
