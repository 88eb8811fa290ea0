"""The files of conf/slurm: each is read, and becomes a script that bash can read."""

import subprocess
from pathlib import Path

import pytest

from forescale.config.compose import CONF, compose
from forescale.slurm.config import SubmitJob
from forescale.slurm.script import Order
from forescale.slurm.submission import Submission

GENERAL = {"plain", "lab", "pyxis", "apptainer"}
FILES = sorted((CONF / "slurm").glob("*.yaml"))
MANUAL = Path(__file__).parents[2] / "slurm/README.md"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_profile_becomes_a_script(file):
    words = [f"slurm={file.stem}", "train.micro_batch=1", "train.global_batch=64"]
    settings = compose(SubmitJob, [*words, "machine=cpu"]).slurm
    folder = Submission(Path("/runs/first/jobs/0001"))
    script = Order(["first"], [Path("/runs/first")], [folder], settings, 70, file.stem).script()
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert f"#SBATCH --ntasks-per-node={settings.ranks_per_node}" in script
    assert all(f"export {name}=" in script for name in settings.exports)


@pytest.mark.parametrize("file", [f for f in FILES if f.stem not in GENERAL], ids=lambda f: f.stem)
def test_a_site_that_we_have_not_run_on_is_said_to_be_untried_with_its_source(file):
    first, *rest = file.read_text().splitlines()
    assert "untried" in first
    assert any("https://" in line for line in rest if line.startswith("#"))
    assert f"`{file.stem}`" in MANUAL.read_text()
