"""Seconds from the command to the end of the first step: the default job, with a prepared corpus
and what torch.compile had cached; and those of one process that does nothing but that step
(bare_start.py), less than any run with DeepSpeed has to do. And the seconds from the death of a
rank (SIGKILL) to the end of the next step.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

from forescale.config.frozen import frozen_file
from forescale.resilience.injector import records
from forescale.run.directory import Run
from forescale.run.rows import read_rows
from forescale.run.start import open_sources, settle
from tests.benchmarks.pairing import Result, interleaved
from tests.benchmarks.sizes import TOY_TRAINING, TrainingSizes

REAL, TOY = TrainingSizes(), TOY_TRAINING
PATIENCE = 600.0  # seconds
ROOT = Path(__file__).parents[2]


def measure(rounds: int, sizes: TrainingSizes = REAL) -> list[Result]:
    inside: dict[str, list[dict[str, float]]] = {"a rank": [], "the bare process": []}
    with tempfile.TemporaryDirectory() as folder:
        frozen = freeze(Path(folder), sizes)

        def product() -> float:
            seconds, parts = first_step(sizes)
            inside["a rank"].append(parts)
            return seconds

        def bare() -> float:
            seconds, parts = bare_step(frozen)
            inside["the bare process"].append(parts)
            return seconds

        rows = interleaved(min(rounds, 5), product, bare)
    facts = {
        f"seconds inside {where}": {k: median(each[k] for each in spans[1:]) for k in spans[0]}
        for where, spans in inside.items()  # the first round warmed up
    }
    labels = ("ours", "one bare process")
    again = [next_step(sizes) for _ in range(min(rounds, 5))]
    parts = {name: median(each[name] for _, each in again) for name in again[0][1]}
    after = [(seconds,) for seconds, _ in again]
    return [
        Result("start-up to the first step", "s", labels, rows, facts=facts),
        Result("a rank's death to the next step", "s", ("ours",), after, facts=parts),
    ]


def freeze(folder: Path, sizes: TrainingSizes) -> Path:
    """Write the job for a bare process, whose micro-batch is what all ranks have at once."""
    from tests.benchmarks.training import make_job

    job = make_job(folder, sizes)
    job = settle(job, open_sources(job.data))
    train = replace(job.train, micro_batch=job.train.global_batch)
    path = folder / "config.yaml"
    path.write_bytes(frozen_file(replace(job, train=train)))
    return path


def first_step(sizes: TrainingSizes) -> tuple[float, dict[str, float]]:
    """Seconds until the first row is on disk, and the row's own by phase."""
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "first" / "metrics.jsonl"
        command = [sys.executable, "-P", "-m", "forescale", "train", *sizes.words(Path(folder))]
        seconds = seconds_until(lambda: bool(read_rows(metrics)), command, Path(folder))
        return seconds, read_rows(metrics)[0]["seconds"]


def next_step(sizes: TrainingSizes) -> tuple[float, dict[str, float]]:
    """Seconds from a fault to the next step's row, and the row's own by phase."""
    with tempfile.TemporaryDirectory() as folder:
        run, ended = Run(Path(folder) / "first"), []

        def is_there() -> bool:
            if rows := [row for row in read_rows(run.metrics) if row["attempt"] == 2]:
                ended.append((time.time(), rows[0]["seconds"]))
            return bool(rows)

        keys = ("checkpoint.every=5 steps", "faults=[kill@8:rank0]")
        command = [sys.executable, "-P", "-m", "forescale", "train", *sizes.words(Path(folder))]
        seconds_until(is_there, [*command, *keys], Path(folder))
        return ended[0][0] - records(run)[0]["time"], ended[0][1]


def bare_step(frozen: Path) -> tuple[float, dict[str, float]]:
    """Seconds until a bare process has made its step, and those of its parts."""
    with tempfile.NamedTemporaryFile() as printed:
        command = [sys.executable, "-m", "tests.benchmarks.bare_start", str(frozen)]
        seconds = seconds_until(lambda: _last_line(printed.name), command, ROOT, printed)
        return seconds, json.loads(_last_line(printed.name))


def _last_line(path: str) -> str:
    """The last line of a file if it is one of JSON, else ""."""
    line = Path(path).read_text().rpartition("{")
    return line[1] + line[2] if line[2].endswith("}\n") else ""


def seconds_until(
    done: Callable[[], object], command: list[str], folder: Path, output=subprocess.DEVNULL
) -> float:
    """Seconds from a command's start until `done`; then it is killed, and its ranks with it."""
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.DEVNULL)
    try:
        while not done():
            if process.poll() is not None or time.monotonic() > began + PATIENCE:
                raise RuntimeError(f"no first step from {' '.join(command)}")
            time.sleep(0.01)
        return time.monotonic() - began
    finally:
        process.kill()
        process.wait()
        time.sleep(0.5)  # until its ranks have ended
