"""The command, as tests of several files give it."""

import json

import pytest


@pytest.fixture
def planned(forescale, small_data):
    """Run `forescale plan --json`; return (exit code, the parsed JSON, standard error)."""

    def run(*words):
        data = ["data=dataset", f"data.path={small_data}", "plan.divisions=0"]  # it takes a second
        code, out, err = forescale("plan", *data, "--json", *words)
        return code, json.loads(out), err

    return run
