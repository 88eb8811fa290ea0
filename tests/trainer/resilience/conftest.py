"""Small commands in place of ranks."""

import os
import sys
import textwrap

import pytest

from forescale.resilience.launcher import start_ranks
from tests.launching import LISTEN


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    """Returns a function that runs a snippet, with `rank` set, on ranks: (code, lines reported)."""
    monkeypatch.setattr(os, "environ", os.environ.copy())

    def run(snippet, processes=2):
        reported = []
        body = f"{LISTEN}import os, time\nrank = int(os.environ['RANK'])\n"
        body += textwrap.dedent(snippet)
        code = start_ranks([sys.executable, "-c", body], processes, tmp_path, reported.append)
        return code, reported

    return run
