"""Bad input to `forescale train`, through the real command line: one sentence that names the key or
the file, code 2, no traceback, and no new files."""

import shutil
from pathlib import Path

import pytest

from forescale import models
from forescale.data.prepare import corpus
from tests import disks

TRAIN = ("train", "first", "train.tokens=null", "train.steps=4", "schedule=constant")
SMALL = ("train.sequence_length=32", "schedule.warmup=0", "train.compile=off")


@pytest.fixture
def place(tmp_path, monkeypatch, small_data):
    """An empty directory to work in, with a dataset beside it."""
    shutil.copytree(small_data, tmp_path / "data")
    monkeypatch.setenv("FORESCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listing(folder):
    return sorted(
        (str(p.relative_to(folder)), p.is_file() and p.stat().st_size) for p in folder.rglob("*")
    )


@pytest.fixture
def refused(place, forescale):
    """Run train with overrides and return its message. Checks what holds for every refusal."""

    def run(*overrides, data="data.path=data", lines=1, leaves=()):
        before = listing(place)
        code, out, err = forescale(*TRAIN, *SMALL, data, *overrides)
        assert code == 2
        assert err.startswith("forescale: ")
        assert err.count("\n") == lines, err
        assert err.endswith((".\n", "?\n"))
        assert "Traceback" not in out + err
        assert [row for row in listing(place) if row[0] not in leaves] == before
        return err

    return run


def test_a_missing_data_path(refused):
    message = refused(data="data.path=elsewhere")
    assert message == "forescale: elsewhere: no such dataset; make one with `forescale shards`.\n"
    message = refused(data="data.path=.")
    assert ".: not a dataset (no manifest.json); make one" in message


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json"])
def test_a_dataset_with_a_flipped_byte(refused, place, name):
    flip(place / "data" / name)
    assert f"data/{name}: damaged" in refused()


@pytest.mark.parametrize("name", ["manifest.json", "files.json", "tokenizer.json"])
def test_a_dataset_with_an_empty_file(refused, place, name):
    (place / "data" / name).write_bytes(b"")
    assert f"data/{name}: " in refused()


def test_a_dataset_with_a_file_missing(refused, place):
    (place / "data" / "tokenizer.json").unlink()
    assert "data/tokenizer.json" in refused()


def test_all_wrong_keys_are_named_with_the_nearest_valid_ones(refused):
    message = refused("train.step=7", "optimiser.lerning_rate=1", "logging.evry=3", lines=3)
    assert "train.step: no such key; did you mean train.steps?" in message
    assert "optimiser.lerning_rate: no such key; did you mean optimizer.learning_rate?" in message
    assert "logging.evry: no such key; did you mean logging.every?" in message


def test_wrong_values(refused):
    message = refused("train.seed=many", "engine=zero7", "checkpoint.every=soon", lines=3)
    assert "train.seed: expects a whole number, got 'many'" in message
    assert "engine: 'zero7' is not a choice; choose one of zero" in message
    assert "checkpoint.every: expects a length such as" in message


def test_a_batch_that_does_not_divide_by_the_ranks(refused):
    message = refused("train.global_batch=8", "train.micro_batch=4", "launch.processes=3")
    assert "train.global_batch: 8 windows don't divide by 3 ranks that feed 4 at once" in message
    assert "make it a multiple of 12" in message


def test_an_invalid_run_name(refused):
    assert "run.name: 'a?b' can't be the name of a directory" in refused("run.name=a?b")
    message = refused(f"run.name={'x' * 300}", leaves=["runs"])
    assert "the name is too long; choose a shorter one" in message


def test_a_file_where_the_runs_should_be(refused, place):
    (place / "runs").write_text("mine")
    assert "runs: is a file, but a directory is needed" in refused()
    (place / "runs").unlink()
    (place / "runs").mkdir()
    (place / "runs" / "first").write_text("mine")
    assert "runs/first: is a file, but a directory is needed" in refused()


def test_a_missing_origin(refused):
    assert "trunk: no run has this name or path" in refused("run.from.run=trunk")
    message = refused("run.from.step=3")
    assert "run.from.step: needs run.from.run; set run.from.run=NAME" in message


def test_a_full_disk(refused, place):
    with disks.small_disk(place / "runs", "64k") as disk:
        filling = disks.fill(disk)
        assert "the disk is full; free some space and run the same command again" in refused()
        assert [p.name for p in disk.iterdir()] == [filling.name]


def test_a_full_disk_for_the_corpus(place, forescale, monkeypatch):
    """The corpus is prepared first, in a cache that has no room for it."""
    source = Path(models.__file__).parent
    monkeypatch.setattr(corpus, "installed_roots", lambda missing: {"python": source})
    before = listing(place)
    with disks.small_disk(place / "cache", "32k") as disk:
        code, out, err = forescale(*TRAIN, *SMALL, "data=embedded")
        assert code == 2
        assert "the disk is full; free some space and run the same" in err.splitlines()[-1]
        assert "Traceback" not in out + err
        assert not [path for path in disk.rglob("*.json") if path.name == "manifest.json"]
    assert [row for row in listing(place) if row[0] != "cache"] == before


def test_a_read_only_directory(refused, place):
    with disks.small_disk(place / "runs", "64k") as disk:
        disks.make_read_only(disk)
        assert "runs/" in (message := refused())
        assert "the file system is read-only; choose a writable directory." in message
