"""A dataset that nodes of SLURM build together, or tasks of an array: the bytes of one process,
after a lost node and near a time limit too."""

import json
import sys
from pathlib import Path

import pytest

from tests.cluster.lab import Lab

KEYS = ["vocab_size=400", "shard_tokens=200000", "member_tokens=50000", "workers=1"]
# A step that keeps all, and takes its time (some 150 s of two tasks) as long as there is a file.
PATIENT = """import os, time

class Patient:
    def __call__(self, text):
        time.sleep(0.06 if os.path.exists("slowly") else 0)
        return 1.0
"""


class Corpus:
    """Rows of text in a folder, and the datasets that are built of them there."""

    def __init__(self, lab: Lab, folder: Path):
        self.lab, self.folder, self.rows = lab, folder, folder / "rows.jsonl"
        lines = (f"Line {i} of a long text, about number {i * i}.\n" for i in range(250_000))
        (folder / "patient.py").write_text(PATIENT)
        texts = ("".join(group) for group in zip(*[lines] * 50, strict=True))
        self.rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def forescale(self, *words: str) -> str:
        command = [sys.executable, "-P", "-m", "forescale", *words]
        return self.lab.run(*command, cwd=self.folder, env={"OMP_NUM_THREADS": "1"}, seconds=300)

    def build(self, verb: str, name: str, *keys: str) -> str:
        output = f"output={self.folder / name}"
        words = [*verb.split(), str(self.rows), output, *KEYS, *keys]
        steps = "curate.steps=[repair, {kind: classifier, target: patient.Patient}]"
        printed = self.forescale(*words, steps)
        return printed.partition("Submitted job ")[2].partition(":")[0]

    def contents(self, name: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (self.folder / name).iterdir()}


@pytest.fixture
def corpus(lab: Lab, tmp_path: Path) -> Corpus:
    return Corpus(lab, tmp_path)


def test_nodes_and_arrays_build_what_one_process_builds(lab: Lab, corpus: Corpus):
    corpus.build("shards", "alone")
    lost_node(lab, corpus)
    time_limit(lab, corpus)


def lost_node(lab: Lab, corpus: Corpus) -> None:
    of_slurm = ("slurm.nodes=2", "slurm.exclusive=true", f"slurm.scratch={lab.scratch}")
    job = corpus.build("submit shards", "both", *of_slurm) + "_0"
    finished = corpus.folder / ".both.building/curated"
    lab.wait(lambda: [*finished.glob("0*")], 120)
    _, node = lab.run("scontrol", "show", "hostnames", lab.show(job)["NodeList"]).split()
    lab.power_off(node)
    before = len([*finished.glob("0*")])
    status = corpus.forescale("status", "both")
    assert "both: building" in status
    assert f"job {job}: running" in status
    lab.wait(lambda: lab.show(job)["Restarts"] == "1", 120)
    lab.wait(lambda: lab.state(job) == "COMPLETED", 300)
    assert 0 < before < 64, "the node was lost while the build was under way"
    assert corpus.contents("both") == corpus.contents("alone")
    assert "1: curate: " in corpus.forescale("logs", "both", "follow=false", "lines=500")
    lab.power_on(node)


def time_limit(lab: Lab, corpus: Corpus) -> None:
    """SLURM sends its signal 75 to 105 s after a start: one without a unit isn't requeued."""
    of_slurm = ("slurm.array=3", "slurm.at_once=2", "slurm.time=2 min", "slurm.lead=15 s")
    slowly = corpus.folder / "slowly"
    slowly.touch()
    job = corpus.build("submit shards", "array", *of_slurm, f"slurm.scratch={lab.scratch}")
    tasks = [f"{job}_{i}" for i in range(3)]
    lab.wait(lambda: lab.show(tasks[0])["Restarts"] == "1", 200)
    assert not (corpus.folder / "array").exists(), "the signal came while the build was under way"
    slowly.unlink()
    for task in tasks:  # from now on no signal, however slow the machine is
        lab.run("scontrol", "update", f"JobId={task}", "TimeLimit=10", check=False)
    for task in tasks:
        lab.wait(lambda task=task: lab.state(task) == "COMPLETED", 300)
    assert corpus.contents("array") == corpus.contents("alone")
    assert "requeued to go on" in corpus.forescale("logs", "array", "follow=false")
