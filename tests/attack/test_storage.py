"""A run on storage that fails for a moment: the system calls of its saves give errors."""

import errno
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.launching import train
from tests.trainer.data.small_dataset import write_dataset

SHIM = Path(__file__).with_name("failing_storage.c")
FAULTS = {"fsync": errno.ESTALE, "rename": errno.EIO, "open": errno.ETIMEDOUT}


@pytest.mark.slow  # a real run
def test_a_run_whose_saves_meet_failing_storage_goes_on(tmp_path):
    if not (compiler := shutil.which("cc")):
        pytest.skip("needs a C compiler")
    shim, faults = tmp_path / "shim.so", tmp_path / "faults"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", shim, SHIM, "-ldl"], check=True)
    faults.mkdir()
    for call, number in FAULTS.items():
        (faults / call).write_text(str(number))
    data = write_dataset(tmp_path / "data", [[300] * 12], [[200]])
    words = ("run.name=a", f"data.path={data}", "train.steps=6", "checkpoint.every=2 steps")
    shaken = {"STORAGE_FAULTS": str(faults), "STORAGE_PART": "/checkpoints/"}
    shaken["LD_PRELOAD"] = str(shim)
    output = train(tmp_path, *words, cold=True, **shaken)
    assert not list(faults.iterdir()), "not every fault has struck"
    rows = (tmp_path / "a" / "events.jsonl").read_text().splitlines()
    retries = [row for row in map(json.loads, rows) if row["kind"] == "save_retried"]
    assert len(retries) == len(FAULTS)
    assert sorted(p.name for p in (tmp_path / "a" / "attempts").iterdir()) == ["0001"]
    assert output.count("next try in") == len(FAULTS)
