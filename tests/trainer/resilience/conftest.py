"""Small commands in place of ranks."""

import os
import sys
import textwrap

import pytest

from forescale.resilience.launcher import start_ranks
from forescale.resilience.template import Template
from tests.launching import LISTEN

# The start of a snippet whose process can be a template.
SERVE = (
    "from forescale.resilience import forking, launcher\nchannel = forking.requested()\n"
    "if channel: forking.serve(channel, launcher.STOP_SIGNALS)\n"
)


@pytest.fixture(params=["new", "forked"])
def ranks(tmp_path, monkeypatch, request):
    """Returns a function that runs a snippet, with `rank` set, on ranks: (code, lines reported)."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    templates = []

    def run(snippet, processes=2):
        reported = []
        body = f"{SERVE}{LISTEN}import os, time\nrank = int(os.environ['RANK'])\n"
        command = [sys.executable, "-c", body + textwrap.dedent(snippet)]
        if request.param == "forked":
            templates.append(Template(command))
        way = {"template": templates[-1]} if templates else {}
        return start_ranks(command, processes, tmp_path, reported.append, **way), reported

    yield run
    for template in templates:
        template.end()
