"""What a page about many runs costs: `forescale status` of long ones, as a command, and how long
each redraw of `--live` takes, when nothing is new and when every run has made a step; and of many
that have ended, the first time and from its index.

The rows are synthetic, with the fields of real ones. Before ledgers the first table read each row
three times, and so did every redraw.
"""

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.pairing import Result

WIDTH = 200  # columns, so that none is left out


@dataclass(frozen=True)
class Sizes:
    """How many runs, and steps of each; ended: how many short ones that have ended."""

    runs: int = 12
    steps: int = 50_000
    ended: int = 10_000


REAL, TOY = Sizes(), Sizes(2, 300, 2)


def measure(rounds: int, sizes: Sizes = REAL) -> list[Result]:
    with tempfile.TemporaryDirectory() as folder:
        root = make_runs(Path(folder), sizes)
        first = [(_command(root, Path(folder, f"{i}")),) for i in range(min(rounds, 3))]
        same, grown, megabytes = _redraws(root, rounds, sizes.steps)
        ended = ended_runs(Path(folder) / "short", sizes.ended)
        many = [_first_and_second(ended, Path(folder, f"cache-{i}")) for i in range(min(rounds, 3))]
    size = f"{sizes.runs} runs of {sizes.steps:,} steps"
    facts = {"megabytes of rows": megabytes}
    return [
        Result(f"table of {size}", "CPU s", ("first",), first, "at most 2", facts),
        Result("redraw, nothing new", "ms", ("redraw",), same, "at most 50"),
        Result("redraw, a new step in each run", "ms", ("redraw",), grown),
        Result(
            f"table of {sizes.ended:,} runs that have ended", "CPU s", ("first", "second"), many
        ),
    ]


def make_runs(folder: Path, sizes: Sizes) -> Path:
    """Return the directory of the runs."""
    from forescale.run.directory import Parent
    from forescale.run.start import start
    from tests.trainer.small_run import make_dataset, make_job

    root, steps = folder / "runs", f"train.steps={sizes.steps + 1_000}"
    job = make_job(make_dataset(folder / "data"), root, "run-00", steps)
    run = start(job).run
    attempt = run.new_attempt()
    attempt.start_from(Parent(0), run)
    for step in range(1, sizes.steps + 1):
        attempt.metrics.add(row(step))
        if step % 1_000 == 0:
            attempt.metrics.add(score(step))
            attempt.event("checkpoint_saved", step=step)
    for number in range(1, sizes.runs):
        shutil.copytree(run.path, root / f"run-{number:02}", symlinks=True)
    return root


def ended_runs(folder: Path, number: int) -> Path:
    """Return the directory of complete runs with 2 checkpoints each; their files are links."""
    from tests.trainer.small_run import make_dataset, make_run

    run = make_run(make_dataset(folder / "data"), folder / "runs", "run-0")
    for i in range(1, number):
        path = run.path.with_name(f"run-{i}")
        shutil.copytree(run.path, path, symlinks=True, copy_function=os.link)
    if number > TOY.ended:
        time.sleep(11)  # what has just changed is not stored
    return folder / "runs"


def _first_and_second(root: Path, cache: Path) -> tuple[float, float]:
    return _command(root, cache), _command(root, cache)


def row(step: int) -> dict[str, Any]:
    """Return a train row with the fields and digits of a real one."""
    rng = random.Random(step)
    phases = {"data": 0.01, "compute": 0.3, "logging": 1e-3, "evaluation": 1e-5, "checkpoint": 1e-3}
    return {
        "kind": "train",
        "step": step,
        "attempt": 1,
        "g0": (step - 1) * 256,
        "g1": step * 256,
        "tokens": step * 262_144,
        "shares": {"web": 200_000, "code": 62_144},
        "tokens_hash": f"{rng.getrandbits(128):032x}",
        **{f"flops_{name}": rng.random() * 1e20 for name in ("causal", "full", "6nd")},
        "loss": 2 + rng.random(),
        "grad_norm": rng.random(),
        "applied": True,
        "learning_rate": {"adamw": rng.random() / 1e3, "muon": rng.random() / 1e2},
        "tokens_per_second": rng.random() * 1e6,
        "mfu": rng.random(),
        "memory_bytes": rng.getrandbits(36),
        "seconds": {name: round(rng.random() * most, 6) for name, most in phases.items()},
    }


def score(step: int) -> dict[str, Any]:
    """Return a row of a held-out loss."""
    scores = {"loss": 3.0, "loss_stderr": 0.1, "bits_per_byte": 1.0, "windows": 700}
    at = {"step": step, "attempt": 1, "tokens": step * 262_144, "dataset": "validation"}
    return {"kind": "validation", **at, **scores}


def _command(root: Path, cache: Path) -> float:
    """CPU seconds of the whole command. cache: the folder of its index."""
    before = os.times()
    words = [sys.executable, "-P", "-m", "forescale", "status", f"run.root={root}"]
    environment = {**os.environ, "COLUMNS": str(WIDTH)}
    environment["FORESCALE_CACHE"] = str(cache)
    subprocess.run(words, env=environment, check=True, capture_output=True)
    after = os.times()
    kinds = ("children_user", "children_system")
    return sum(getattr(after, kind) - getattr(before, kind) for kind in kinds)


def _redraws(root: Path, rounds: int, steps: int) -> tuple[list, list, float]:
    """Milliseconds of each redraw: nothing new; a new step in each run."""
    from forescale.monitor.overview import Index
    from forescale.monitor.status import runs_under
    from forescale.verbs.status import StatusJob, page_of

    job, index = StatusJob(), Index(root)
    job.run.root = str(root)
    same, grown = [], []

    def draw() -> float:
        began = time.process_time()
        page_of(job, index, WIDTH)
        return (time.process_time() - began) * 1e3

    draw()
    for number in range(1, rounds + 1):
        same.append((draw(),))
        for run in runs_under(root):
            run.attempts()[-1].metrics.add(row(steps + number))
        grown.append((draw(),))
    sizes = [run.metrics.stat().st_size for run in runs_under(root)]
    return same, grown, round(sum(sizes) / 1e6, 1)
