"""Runs `forescale train` for tests in a process of its own, and sends it signals.

That process is a fork of one that has imported all (tests/warm.py), and so are its ranks, unless
the start is `cold`: as a user starts it, each process from nothing and with its own seed of hashes,
and the summary at its end, whose sample of text takes as long as a hundred steps.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from forescale.config.target import CELL
from tests import warm

ROOT = Path(__file__).parents[1]
SHORT = [
    *("train.sequence_length=32", "train.global_batch=8", "train.micro_batch=2"),
    *("train.compile=off", "schedule.warmup=2", "schedule.decay=20%", "validation.windows=8"),
    "logging.peak_flops=1e11",  # each rank would measure it
]
# The start of a snippet in place of a rank: it gets stop signals.
LISTEN = "from forescale.resilience.launcher import unblock_stop_signals as f\nf()\n"
TINY = ["model.num_layers=2", "model.width=32", "model.num_heads=2", "model.mlp_width=64"]


Process = subprocess.Popen | warm.Launcher


def start(
    folder: Path, *overrides: str, model=TINY, cold: bool = False, **environment: str
) -> Process:
    """`forescale train run.root=FOLDER ...`, with a small model, at one thread a rank."""
    words = ["train", f"run.root={folder}", *SHORT, *model, *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    if not cold:
        return warm.Launcher([*words, CELL], folder, environment)
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "forescale", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
    )


def train(folder: Path, *overrides: str, code: int = 0, **how: Any) -> str:
    """Run it to its end and return its output. Fails with it unless it exits with `code`, within
    four minutes. how: see `start`."""
    process = start(folder, *overrides, **how)
    try:
        output, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"it didn't end, and it printed:\n{process.communicate()[0]}")
    assert process.returncode == code, output
    return output


def wait_until(
    process: Process,
    condition: Callable[[], object],
    description: str,
    every: float = 0.002,
) -> None:
    """Return as soon as `condition` is true of a run that goes on; look `every` so many seconds.
    Fails with the run's output if it ends before, or after four minutes (a machine with other work
    takes half of one)."""
    deadline = time.monotonic() + 240
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(
                f"{description} didn't come, and the run printed:\n{process.communicate()[0]}"
            )
        time.sleep(every)


def interrupt(process: Process, run: Path, step: int, number: int) -> str:
    """Send a signal as soon as the run's rows have reached `step`; return the output.

    SIGKILL is sent to the launcher alone: its ranks must not outlive it.
    """
    wait_until(process, lambda: any(row["step"] >= step for row in rows(run)), f"step {step}")
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode in (75, -signal.SIGKILL), output
    return output


def ranks_of(process):
    """The ranks of a launcher that exist at this moment, by their numbers."""
    ranks = {}
    for child in _children(process, recursive=True):
        with suppress(psutil.Error):
            if child.name().startswith("rank-"):
                ranks[int(child.name()[5:])] = child
    return ranks


def template_of(process) -> psutil.Process | None:
    """The process of which the ranks of a launcher are forks, where there is one."""
    for child in _children(process):
        with suppress(psutil.Error):
            if "--frozen" in child.cmdline():
                return child
    return None


def _children(process, recursive=False) -> list[psutil.Process]:
    """None once the launcher itself has ended."""
    try:
        return psutil.Process(process.pid).children(recursive=recursive)
    except psutil.NoSuchProcess:
        return []


def processes(folder: Path) -> list[int]:
    """Return the ids of the launchers and ranks that train in `folder`, after 0.2 s."""
    time.sleep(0.2)
    ids = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = process.cmdline()
            trains = "forescale" in words or any(word.endswith("warm.py") for word in words)
            if trains and Path(process.cwd()) == folder:
                ids.append(process.pid)
    return ids


def rows(run: Path, kind: str = "train") -> list[dict]:
    """Return the run's rows of a kind; only complete lines, as it may be writing now."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def events(run: Path) -> list[str]:
    """Return the kinds of the events of all attempts, in order."""
    files = sorted(run.glob("attempts/*/events.jsonl"))
    return [json.loads(line)["kind"] for f in files for line in f.read_text().splitlines()]


def texts(run: Path) -> list[tuple[int, str, str]]:
    """Return the step, the prompt and the text of each that the run has written, in order."""
    files = sorted(run.glob("attempts/*/events.jsonl"))
    rows = [json.loads(line) for f in files for line in f.read_text().splitlines()]
    return [(r["step"], r["prompt"], r["text"]) for r in rows if r["kind"] == "text_written"]


TRAJECTORY = ("step", "g0", "g1", "tokens", "tokens_hash", "loss", "grad_norm", "learning_rate")


def trajectory(run: Path) -> list[dict]:
    """Return what an exact resume repeats: data, loss, norm and rate of every step."""
    return [{key: row[key] for key in TRAJECTORY} for row in rows(run)]


def keep_only(run: Path, step: int) -> None:
    """Remove what was saved after `step`: the next attempt starts there."""
    for path in (run / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)


def whole_and_repeated(
    folder: Path, *command: str, step: int, cold: bool = False
) -> tuple[list[dict], list[dict]]:
    """Return the trajectory of a run, and the same after it has lost what it saved after `step` and
    was started again by the same command, cold or not: a start less than `whole_and_resumed`."""
    run, command = folder / "whole", ("run.name=whole", "checkpoint.keep=9", *command)
    train(folder, *command)
    whole = trajectory(run)
    keep_only(run, step)
    assert f"(step {step})" in train(folder, *command, cold=cold)
    again = [row["step"] for row in rows(run) if row["attempt"] == 2]
    assert again == [row["step"] for row in whole][step:]
    return whole, trajectory(run)


def whole_and_resumed(
    folder: Path, *command: str, step: int, cold: bool = False, model=TINY
) -> tuple[list[dict], list[dict]]:
    """Return the trajectories of an undisturbed run, `whole`, and of one that is killed once it is
    past `step` and started again by the same command, `cut`, cold or not."""
    train(folder, "run.name=whole", *command, model=model)
    process = start(folder, "run.name=cut", *command, cold=cold, model=model)
    interrupt(process, folder / "cut", step, signal.SIGKILL)
    assert "Resuming from" in train(folder, "run.name=cut", *command, cold=cold, model=model)
    whole, cut = (trajectory(folder / name) for name in ("whole", "cut"))
    return whole, cut
