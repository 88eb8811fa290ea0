"""Several processes build one dataset: its bytes are those of one process, after kills too."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from forescale.data.prepare.builder import BuildConfig, build_dataset
from forescale.data.prepare.share import ALONE, Share, share_of
from forescale.data.text.files import Files

BUILD = """
import sys
from forescale.data.prepare.builder import BuildConfig, build_dataset
from forescale.data.prepare.share import share_of
from forescale.data.text.files import Files
source, output = sys.argv[1:]
config = BuildConfig(vocab_size=400, validation=0.1, shard_tokens=20_000, member_tokens=5_000)
build_dataset(Files([source], unit_bytes=20_000), output, config, share=share_of())
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


def started(rows, output, count, start):
    slurm = {"SLURM_STEP_NUM_TASKS": str(count), "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    slurm["SLURM_RESTART_COUNT"] = str(start)
    return [
        subprocess.Popen(
            [sys.executable, "-c", BUILD, rows, output],
            env={**os.environ, **slurm, "SLURM_PROCID": str(place)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for place in range(count)
    ]


def test_three_processes_make_the_bytes_of_one(rows, alone, tmp_path):
    output = tmp_path / "out"
    processes = started(rows, output, 3, 0)
    for process in processes:
        assert process.communicate(timeout=60)[1] == ""
        assert process.returncode == 0
    assert contents(output) == alone
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.lock"}


def test_what_was_finished_when_all_are_killed_is_used_by_another_number(rows, alone, tmp_path):
    output = tmp_path / "out"
    processes = started(rows, output, 2, 0)
    hashes = tmp_path / ".out.building" / "hashes"
    while not (hashes.is_dir() and len([*hashes.iterdir()]) > 3):
        time.sleep(0.01)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not output.exists()
    for process in started(rows, output, 3, 1):
        assert process.communicate(timeout=60)[1] == ""
    assert contents(output) == alone


def test_a_process_without_a_task_ends_too(tmp_path):
    (path := tmp_path / "one.txt").write_text("A text. " * 40)
    processes = started(path, tmp_path / "out", 2, 0)
    for process in processes:
        assert process.communicate(timeout=60)[1] == ""
        assert process.returncode == 0
    assert (tmp_path / "out" / "manifest.json").exists()


def test_each_task_is_of_one_process_and_the_loads_are_even():
    weights = [7, 1, 5, 5, 3, 2, 9, 1]
    shares = [Share(i, 3, "").mine(weights) for i in range(3)]
    assert sorted(i for mine in shares for i in mine) == [*range(8)]
    loads = [sum(weights[i] for i in mine) for mine in shares]
    assert max(loads) - min(loads) <= 1
    assert ALONE.mine(weights) == [*range(8)]


def test_only_tasks_of_srun_share():
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "5"}
    assert share_of(batch) == ALONE
    task = {**batch, "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_ID": "2"}
    assert share_of(task) == Share(3, 8, "5-2-0")
    assert share_of({**task, "SLURM_STEP_NUM_TASKS": "1"}) == ALONE
