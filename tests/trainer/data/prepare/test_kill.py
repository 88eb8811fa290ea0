"""A build killed with kill -9 at any moment: the next attempt continues and gives the same
bytes."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from forescale.data.check import check
from forescale.data.prepare.builder import build_dataset
from tests.matrix import full_only
from tests.trainer.data import synthetic_text
from tests.trainer.data.synthetic_text import Texts, synthetic

SMALL = replace(synthetic_text.SMALL, parquet=True)
SOURCE = Texts([*synthetic(), *synthetic(5), b"\xff"], per_unit=11)  # duplicates and a faulty one
MANY = Texts([*SOURCE.texts, *synthetic(200, seed=2)], per_unit=3)

# Begins every script: `build(output, condition)` builds in a child, which kills itself at the first
# change to the file system for which the condition holds; returns whether it was killed.
PREAMBLE = """
import os, signal, sys
import forescale.data.prepare.parquet
from tests.trainer.data.prepare.test_kill import MANY, SMALL, SOURCE, build_dataset
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}
def build(output, condition):
    def hook(event, args):
        if event in CHANGES and condition(event, args):
            os.kill(os.getpid(), signal.SIGKILL)
    if not (child := os.fork()):
        sys.addaudithook(hook)
        build_dataset(SOURCE, output, SMALL)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status != 0
"""

# Killed at its first change; the next child at its second, and so on until one finishes.
AT_EVERY_CHANGE = """
from itertools import count
for kills in count():
    seen = count()
    if not build(sys.argv[1], lambda *change: next(seen) == kills):
        break
print(kills)
"""

# Killed when everything except the rename is done; then again with a file of every kind damaged, in
# turn. Prints that file and the others that the next attempt made again.
DAMAGED = """
from pathlib import Path
output = Path(sys.argv[1])
work = output.with_name(f".{output.name}.building")
def build_but_for_the_name():
    return build(output, lambda event, args: event == "os.rename" and str(args[1]) == str(output))
def one_of_each_kind():
    last = {}
    for path in state():
        last[path.parent, path.name[:5], path.suffix] = path
    return last.values()
def state():
    files = [p for p in sorted(work.rglob("*")) if p.is_file() and p.parent.name != "builders"]
    return {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in files}
assert build_but_for_the_name()
for path in one_of_each_kind():
    for damage in ("flip", "cut"):
        raw = path.read_bytes()
        at = len(raw) // 3
        path.write_bytes(raw[:at] + (bytes([raw[at] ^ 1]) + raw[at + 1:]) * (damage == "flip"))
        before = state()
        assert build_but_for_the_name()
        assert path.read_bytes() == raw
        again = {p for p, facts in state().items() if before.get(p) != facts}
        print(path.relative_to(work), *(p.relative_to(work) for p in again - {path}))
assert not build(output, lambda *change: False)
"""

# With workers: at the N-th progress report all processes are killed, or one worker.
AT_A_REPORT = """
import psutil
from forescale.ground.errors import UserError
output, source, at, victim = sys.argv[1], globals()[sys.argv[2]], int(sys.argv[3]), sys.argv[4]
seen = 0
def progress(*args, **more):
    global seen
    seen += 1
    children = psutil.Process().children()
    if seen == at and victim == "all":
        os.killpg(0, signal.SIGKILL)
    if seen >= at and victim == "worker" and children:
        os.kill(children[at % len(children)].pid, signal.SIGKILL)
try:
    build_dataset(source, output, SMALL, progress, workers=2)
except UserError as e:
    sys.exit(str(e))
"""


def digest(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(directory.iterdir())}


def start(script: str, *words: object) -> subprocess.Popen:
    """Start a process in a process group and session of its own."""
    path = os.pathsep.join(sys.path)
    return subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + script, *map(str, words)],
        env={**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def expect_gone(session: int) -> None:
    """Check that no process of a killed session is left within 30 seconds."""
    for _ in range(300):
        left = [pid for pid in psutil.pids() if session_of(pid) == session]
        if not left:
            return
        time.sleep(0.1)
    raise AssertionError(f"still running: {left}")


def session_of(pid: int) -> int | None:
    try:
        return None if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE else os.getsid(pid)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return None


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, str]:
    return digest(build_dataset(SOURCE, tmp_path_factory.mktemp("whole") / "d", SMALL))


@pytest.fixture
def expect_same(undisturbed, tmp_path):
    """Check that the next attempt gives the same as an undisturbed build, and leaves nothing
    else."""

    def expect() -> None:
        build_dataset(SOURCE, tmp_path / "d", SMALL)
        assert digest(tmp_path / "d") == undisturbed
        assert check(tmp_path / "d") == []
        assert sorted(p.name for p in tmp_path.iterdir()) == [".d.lock", "d"]

    return expect


def test_a_build_killed_at_every_change_to_the_file_system(expect_same, tmp_path):
    build = start(AT_EVERY_CHANGE, tmp_path / "d")
    out, err = build.communicate(timeout=100)
    assert build.returncode == 0, err
    assert int(out) > 10  # it was killed many times
    expect_same()


@pytest.mark.slow  # many builds
def test_only_damaged_units_are_made_again(expect_same, tmp_path):
    build = start(DAMAGED, tmp_path / "d")
    out, err = build.communicate(timeout=100)
    assert build.returncode == 0, err
    rows = [line.split() for line in out.splitlines()]
    kinds = {damaged.partition("/")[0] for damaged, *_ in rows}
    assert kinds >= {"hashes", "ranges", "samples", "tokens", "rows", "tokenizer", "baselines"}
    always = {f"dataset/{name}.json" for name in ("manifest", "tokenizer", "files", "origins")}
    for damaged, *others in rows:
        if damaged != "request.json":  # without it the other files can't be used
            kind, _, shard = damaged.partition(".")[0].partition("/")
            whole = {f"rows/{shard}", f"dataset/{shard}.tar", f"dataset/{shard}.index.json"}
            whole |= {f"rows/{shard}.parquet", f"dataset/{shard}.parquet"}
            assert set(others) <= always | (whole if kind in ("rows", "dataset") else set())
    expect_same()


@pytest.mark.parametrize("at", [1, 9, 30])
def test_a_build_killed_while_workers_run(expect_same, tmp_path, at):
    build = start(AT_A_REPORT, tmp_path / "d", "SOURCE", at, "all")
    _, err = build.communicate(timeout=100)
    assert build.returncode == -signal.SIGKILL, err
    expect_gone(build.pid)
    assert not (tmp_path / "d").exists()
    expect_same()


@pytest.mark.parametrize("at", [1, 20])
def test_a_killed_worker_is_reported_and_the_next_attempt_continues(expect_same, tmp_path, at):
    build = start(AT_A_REPORT, tmp_path / "d", "SOURCE", at, "worker")
    _, err = build.communicate(timeout=100)
    assert build.returncode == 1
    sentence = (
        "its worker process was killed, probably because memory ran out; run the same command again"
    )
    assert sentence in err
    expect_gone(build.pid)
    expect_same()


@pytest.mark.slow  # kills a build again and again
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(n, marks=full_only) for n in (2, 3))])
def test_a_build_killed_at_random_moments(tmp_path, seed):
    whole = digest(build_dataset(MANY, tmp_path / "whole", SMALL))
    rng = random.Random(seed)
    for _ in range(100):
        build = start(AT_A_REPORT, tmp_path / "d", "MANY", -1, "none")
        try:
            build.communicate(timeout=rng.uniform(0.2, 1))
            break
        except subprocess.TimeoutExpired:
            parent = psutil.Process(build.pid)
            workers = [p for p in parent.children() if rng.random() < 0.5]
            for process in rng.choice([[parent, *workers], [*workers, parent], workers]):
                process.kill()
            build.communicate()
            expect_gone(build.pid)
    assert digest(build_dataset(MANY, tmp_path / "d", SMALL, workers=2)) == whole
