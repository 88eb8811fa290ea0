"""The kit for GPUs: `pytest -m gpu` on those of this machine; and, so that it doesn't rot without
one, each check on the CPU or on a pretended GPU."""

import os
import signal
import time
from dataclasses import replace

import pytest

from forescale.config.hardware import has_gpu
from tests.benchmarks import bench_gpu
from tests.conftest import GPU_WORKERS
from tests.gpu import kit
from tests.gpu.checks import CHECKS, LEFT_OUT
from tests.gpu.kit import VISIBLE, Part
from tests.matrix import FULL

SECONDS = 140  # of a check on a GPU, at most: all of them stay within ten minutes


@pytest.fixture(scope="session")
def gpus() -> int:
    """How many GPUs there are. A machine that has one that torch can't use fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if (visible := os.environ[VISIBLE]) != "all":
            patch.setenv("CUDA_VISIBLE_DEVICES", visible)
        has_gpu.cache_clear()
        exists = has_gpu()
        has_gpu.cache_clear()
        if not exists:
            pytest.skip("this machine has no GPU that this process may use")
    (outcome,) = kit.run("cuda", [Part("gpu.checks:machine")], SECONDS)
    if outcome.problem:
        problem = outcome.problem.strip().splitlines()[-1]
        todo = "torch from PyPI is built for CUDA: pip install --force-reinstall torch"
        pytest.fail(f"torch can't use the GPU of this machine ({problem}). {todo}", pytrace=False)
    return outcome.value


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_on_a_gpu(name, gpus):
    part = CHECKS[name]
    if part.ranks > 1:
        ranks = min(part.ranks, 1 << (gpus.bit_length() - 1))  # a power of two
        if ranks == 1:
            pytest.skip("needs two GPUs, and this machine has one")
        part = replace(part, ranks=ranks)
    (outcome,) = kit.run("cuda", [part], SECONDS)
    if outcome.problem:
        pytest.fail(outcome.problem, pytrace=False)
    if outcome.value:
        pytest.skip(outcome.value)


def test_all_checks_on_a_gpu_end_within_ten_minutes():
    assert len(CHECKS) * SECONDS / GPU_WORKERS < 600


# Without a GPU each check runs at one of two places, and at both with FORESCALE_MATRIX=full.
ON_THE_CPU = {"saves", "resume", "mixers-fp32", "documents-fp32", "stages-fp32", "stages-of-ranks"}


@pytest.mark.slow  # trains dozens of small models
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("place", ["cpu", "pretended"])
def test_the_kit_runs_without_a_gpu(place):
    names = [name for name in CHECKS if (place, name) not in LEFT_OUT]
    if not FULL:
        names = [name for name in names if (name in ON_THE_CPU) == (place == "cpu")]
    parts = [CHECKS[name] for name in names]
    if place == "cpu":  # two ranks of gloo
        parts = [replace(part, ranks=min(part.ranks, 2)) for part in parts]
    if place == "pretended":  # on the CPU test_benchmarks.py runs them
        measurements = bench_gpu.parts(bench_gpu.TOY, rounds=1)
        if not FULL:
            measurements = dict([*measurements.items()][:1])
        names, parts = [*names, *measurements], [*parts, *measurements.values()]
    outcomes = dict(zip(names, kit.run(place, parts, limit=150), strict=True))
    problems = [f"{name}: {o.problem}" for name, o in outcomes.items() if o.problem]
    assert not problems, "\n".join(problems)
    assert not [outcomes[name].value for name in CHECKS if name in names and outcomes[name].value]


def test_what_another_place_leaves_out_is_a_check():
    assert {name for _, name in LEFT_OUT} <= {*CHECKS}
    assert {place for place, _ in LEFT_OUT} <= {*kit.PLACES} - {"cuda"}


def _returns(at, value):
    return value


def _differs(at):
    import torch

    at.close(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.001]), 1e-3)
    at.equal(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.001]), "the sum")


def _dies(at):
    os.kill(os.getpid(), signal.SIGKILL)


def _hangs(at):
    time.sleep(100)


@pytest.mark.slow  # starts torch
def test_a_part_that_fails_crashes_or_hangs_is_a_sentence_and_the_others_run():
    here = "gpu.test_gpu:"
    parts = [Part(here + name) for name in ("_differs", "_dies", "_hangs")]
    last = Part(f"{here}_returns", {"value": [1, "two"]})
    differs, dies, hangs, returns = kit.run("cpu", [*parts, last], limit=4)
    assert "the sum: off by 4.4" in differs.problem
    assert "ended with -9" in dies.problem
    assert "took over 4 s" in hangs.problem
    assert "_hangs" in hangs.problem, "it doesn't say where"
    assert (returns.value, returns.problem) == ([1, "two"], None)
