"""A node's wants with a run directory to write in; SLURM's commands as stand-ins."""

import os
from dataclasses import replace

import pytest

from forescale.slurm.preflight.findings import Requirements
from tests.slurm.plain_requirements import PLAIN


@pytest.fixture
def requirements(tmp_path) -> Requirements:
    return replace(PLAIN, run=str(tmp_path))


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """commands(name="shell lines", ...) puts stand-ins on the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def put(**scripts: str) -> None:
        for name, lines in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\n{lines}\n")
            (folder / name).chmod(0o755)

    return put
