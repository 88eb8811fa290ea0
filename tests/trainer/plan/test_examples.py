"""The examples of `forescale plan --help` and `forescale submit --help` run as they are written."""

import shlex
import shutil
from pathlib import Path

import pytest

from forescale.verbs import plan, submit

LINES = "run.name=a train.seed=1\nrun.name=b train.seed=2\n"


def words_of(example):
    """The words of an example without its remark, which is in brackets after three spaces."""
    return shlex.split(example.partition("   (")[0])


@pytest.fixture
def here(trained, small_data, tmp_path, monkeypatch):
    """A directory with all that the examples name; returns what to write instead of a word."""
    monkeypatch.chdir(tmp_path)
    for name in ("first", "big"):
        shutil.copytree(trained.path, f"runs/{name}", symlinks=True)
    for step in (10_000, 20_000):
        shutil.copytree(trained.checkpoint_path(8), f"runs/big/checkpoints/step-{step:08d}")
    Path("sweep.txt").write_text(LINES)
    return {"data.path=/data/books": f"data.path={small_data}"}


@pytest.mark.parametrize("example", plan.EXAMPLES)
def test_an_example_of_plan_runs(example, here, forescale):
    code, out, err = forescale(*(here.get(word, word) for word in words_of(example)))
    assert (code, err) == (0, "")
    assert out


@pytest.mark.parametrize("example", submit.EXAMPLES)
def test_an_example_of_submit_runs(example, here, forescale):
    code, out, err = forescale(*words_of(example), "--dry-run")
    assert (code, err) == (0, "")
    assert out.startswith("#!")
