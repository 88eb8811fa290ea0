"""Several processes build one dataset: its bytes are those of one process, after kills too."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from glob import glob

import pytest

from forescale.data.prepare import share
from forescale.data.prepare.builder import BuildConfig, build_dataset
from forescale.data.prepare.pool import Task, run_here
from forescale.data.prepare.share import Crew, _birth, _place, _read
from forescale.data.text.files import Files
from forescale.ground.console import silent
from forescale.ground.errors import UserError
from tests.trainer.data.synthetic_text import Texts

BUILD = """
import sys
from forescale.data.prepare.builder import BuildConfig, build_dataset

from forescale.data.text.files import Files
source, output = sys.argv[1:]
config = BuildConfig(vocab_size=400, validation=0.1, shard_tokens=20_000, member_tokens=5_000)
build_dataset(Files([source], unit_bytes=20_000), output, config)
"""
CONFIG = BuildConfig(vocab_size=400, validation=0.1, shard_tokens=20_000, member_tokens=5_000)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "rows.jsonl"
    lines = (
        {"text": f"document {i} of many, with words {i * i} " * (1 + i % 40)} for i in range(900)
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def alone(rows, tmp_path_factory):
    output = tmp_path_factory.mktemp("alone") / "out"
    return contents(build_dataset(Files([rows], unit_bytes=20_000), output, CONFIG))


def contents(output):
    return {path.name: path.read_bytes() for path in sorted(output.iterdir())}


def started(rows, output, count):
    return [
        subprocess.Popen(
            [sys.executable, "-c", BUILD, rows, output], stderr=subprocess.PIPE, text=True
        )
        for _ in range(count)
    ]


def test_three_processes_make_the_bytes_of_one(rows, alone, tmp_path):
    output = tmp_path / "out"
    processes = started(rows, output, 3)
    for process in processes:
        assert process.communicate(timeout=60)[1] == ""
        assert process.returncode == 0
    assert contents(output) == alone
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.lock"}


def test_kills_and_newcomers_change_no_byte(rows, alone, tmp_path):
    """FORESCALE_KILLS=40 kills 40 processes."""
    chance, killed, builds = random.Random(1), 0, 0
    while killed < int(os.environ.get("FORESCALE_KILLS", "3")):
        output = tmp_path / f"out{builds}"
        work, builds = tmp_path / f".out{builds}.building", builds + 1
        processes = started(rows, output, chance.randint(2, 8))
        for _ in range(chance.randint(1, 5)):
            results = chance.randint(1, 70)
            # Of pathlib, glob raises where a build ends and its folder goes.
            while alive(processes) and len(glob("[!bc]*/0*", root_dir=work)) < results:
                time.sleep(0.01)
            if victims := alive(processes):
                (victim := chance.choice(victims)).kill()
                killed += victim.wait() == -signal.SIGKILL
                processes += started(rows, output, chance.randint(0, 2))
        processes += started(rows, output, 1)
        for process in processes:
            process.communicate(timeout=120)
            assert process.returncode in (0, -signal.SIGKILL)
        assert contents(output) == alone
        assert not work.exists()


def alive(processes):
    return [process for process in processes if process.poll() is None]


@pytest.fixture
def crew(tmp_path):
    crew = Crew(tmp_path, silent)
    yield crew
    crew.leave("done")


def elsewhere(work, *, age=0.0, **facts):
    """Write the record of a process of another machine, and return its name."""
    path = work / "builders" / f"n9-7-{len(facts)}{age:.0f}"
    path.write_text(json.dumps({"host": "n9", "pid": 7, "place": "another", **facts}))
    os.utime(path, (moment := time.time() - age, moment))
    return path.name


def test_a_process_elsewhere_lives_by_its_signs(crew, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "40")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    states = [
        crew.state(elsewhere(tmp_path, **facts))
        for facts in (
            {}, {"age": 1000.0}, {"age": 1000.0, "ended": "SIGTERM"},
            {"job": "40", "restart": 1}, {"job": "40", "restart": 2, "a": 0},
        )
    ]  # fmt: skip
    assert states == ["lives", "dead", "ended", "dead", "lives"]


def test_nobody_waits_for_a_process_that_ended_before_its_first_sign(tmp_path, monkeypatch):
    def end(crew):
        raise SystemExit

    monkeypatch.setattr(Crew, "_sign", end)
    with pytest.raises(SystemExit):
        Crew(tmp_path, silent)
    assert [*(tmp_path / share.BUILDERS).iterdir()]
    assert not share.read_builders(tmp_path)


def test_a_process_here_lives_while_the_kernel_knows_it(crew, tmp_path):
    process = subprocess.Popen(["sleep", "60"])
    facts = {"pid": process.pid, "birth": _birth(process.pid), "place": _place()}
    name = elsewhere(tmp_path, age=1000.0, **facts)
    assert _read(tmp_path / "builders" / name).state(0.0) == "lives"
    process.kill()
    while _birth(process.pid):  # it isn't waited for yet
        time.sleep(0.01)
    assert crew.state(name) == "dead"
    process.wait()


def test_it_takes_over_what_the_dead_left_and_waits_for_the_living(tmp_path, monkeypatch):
    lines, naps = [], []
    crew = Crew(tmp_path, lambda sentence, done, total, unit, **_: unit or lines.append(sentence))
    living, dead = elsewhere(tmp_path), elsewhere(tmp_path, age=1000.0)
    claims = tmp_path / "claims" / "sign"
    claims.mkdir(parents=True)
    owners = {"0": dead, "1": living, "2": dead, "2.done": dead, "3": living, "3.done": living}
    for name, owner in owners.items():
        (claims / name).symlink_to(owner)
    ran = []

    def nap(seconds):
        naps.append(seconds)
        if len(naps) == 3:
            (claims / "1.done").symlink_to(living)

    monkeypatch.setattr(share.time, "sleep", nap)
    monkeypatch.setattr(share, "_LOOK", 0.0)
    tasks = [Task("", lambda i, tick: ran.append(i), (i,), 1, tmp_path / str(i)) for i in range(5)]
    crew.run("sign", "bytes", 5, tasks, run_here)
    assert sorted(ran) == [0, 2, 4]
    assert lines == ["sign: waits for a task of n9 (process 7)"]
    crew.leave("done")


def test_a_start_that_makes_nothing_before_its_time_limit_is_not_the_first_of_many(tmp_path):
    class Slow(Texts):
        def read(self, unit, report):
            raise KeyboardInterrupt("SIGUSR1")

    with pytest.raises(UserError, match=r"no unit before its time limit; .* longer slurm\.time"):
        build_dataset(Slow([b"a text"]), tmp_path / "out", CONFIG)
