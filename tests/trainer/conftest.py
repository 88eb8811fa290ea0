"""A small dataset and a small run, made once; tests that change a run take a copy."""

import os
import shutil
import time
from pathlib import Path

import pytest

from forescale import cli
from forescale.run.directory import Run
from tests.schemas import expect_document
from tests.trainer.small_run import make_dataset, make_run


@pytest.fixture(scope="session")
def small_data(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("small") / "data")


@pytest.fixture(scope="session")
def trained(small_data) -> Run:
    """A complete run named `small`; only read it."""
    return make_run(small_data, small_data.parent / "runs")


@pytest.fixture
def own_run(trained, tmp_path, monkeypatch) -> Run:
    """A copy under runs/small of the current directory, to be changed at will."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained.path, "runs/small", symlinks=True)
    return Run("runs/small")


class CommandLine:
    """Runs command lines in this process."""

    def __init__(self, capsys):
        self._capsys = capsys

    def __call__(self, *words: str) -> tuple[int, str, str]:
        """Return the exit code, stdout and stderr of a command."""
        self._capsys.readouterr()
        code = cli.main(list(map(str, words)))
        out, err = self._capsys.readouterr()
        if "--json" in words:
            expect_document(words, out)
        return code, out, err

    def prints(self, *words: str, **how) -> str:
        """Return the stdout of a command that ends with code 0."""
        code, out, err = self(*words, **how)
        assert code == 0, err
        return out

    def refuses(self, *words: str, **how) -> str:
        """Return the stderr of a command that ends with code 2 and without a traceback. Only those
        with notes or a list of faults print something before."""
        code, out, err = self(*words, **how)
        assert (code, "Traceback" in err) == (2, False)
        assert not out or words[0] in ("check", "doctor", "plan", "train")
        return err


@pytest.fixture
def forescale(capsys):
    """Run a command line in this process: (exit code, stdout, stderr); see CommandLine."""
    return CommandLine(capsys)


@pytest.fixture
def clock(monkeypatch):
    """time.monotonic as a test moves it: clock(seconds)."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def forward(seconds):
        now[0] += seconds

    return forward


_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser():
    """An open browser. Without one the test skips, or fails if FORESCALE_NEEDS_BROWSER=1."""
    names = (os.environ.get("FORESCALE_BROWSER", ""), *_BROWSERS)
    program = next((path for name in names if name and (path := shutil.which(name))), None)
    reason = None if program else "no browser is installed (tests/browser.sh installs one)"
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        reason = "playwright is not installed (it is in the dev extra)"
    if reason:
        if os.environ.get("FORESCALE_NEEDS_BROWSER") == "1":
            pytest.fail(f"FORESCALE_NEEDS_BROWSER is set, but {reason}", pytrace=False)
        pytest.skip(reason)
    with sync_playwright() as p:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        opened = p.chromium.launch(executable_path=program, args=options)
        yield opened
        opened.close()
