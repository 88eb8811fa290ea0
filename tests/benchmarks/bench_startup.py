"""Seconds from the command to the end of the first step: the default job, with a prepared corpus
and what torch.compile had cached. Reported alone: there is nothing to compare it with.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from forescale.run.rows import read_rows
from tests.benchmarks.pairing import Result
from tests.benchmarks.sizes import TOY_TRAINING, TrainingSizes

REAL, TOY = TrainingSizes(), TOY_TRAINING
PATIENCE = 600.0  # seconds


def measure(rounds: int, sizes: TrainingSizes = REAL) -> list[Result]:
    if sizes is REAL:
        first_step(sizes)  # fills the caches
    rows = [first_step(sizes) for _ in range(min(rounds, 3))]
    phases = {k: median(r[1][k] for r in rows) for k in rows[0][1]}
    facts = {"seconds inside the rank": phases}
    totals = [(total,) for total, _ in rows]
    return [Result("start-up to the first step", "s", ("ours",), totals, facts=facts)]


def first_step(sizes: TrainingSizes) -> tuple[float, dict[str, float]]:
    """Seconds until the first row is on disk, and the row's own by phase."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-P", "-m", "forescale", "train"]
        command += sizes.words(Path(folder))
        began = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            while not (rows := read_rows(Path(folder) / "first" / "metrics.jsonl")):
                if process.poll() is not None or time.monotonic() > began + PATIENCE:
                    raise RuntimeError(f"no first step from {' '.join(command)}")
                time.sleep(0.01)
            return time.monotonic() - began, rows[0]["seconds"]
        finally:
            process.kill()  # its ranks die with it
            process.wait()
            time.sleep(0.5)  # until they have
