"""GPUs that are tried, with a mock in their place: how each fault is named."""

import subprocess
import sys

import pytest

from forescale.monitor.gpus import try_gpus
from tests.trainer.monitor.mock_gpus import MockGpus


@pytest.mark.parametrize(
    ("count", "faults", "problems"),
    [
        (8, {}, []),
        (1, {}, []),
        (8, {"free": {3: 40}}, ["GPU 3: 40.0 of 80.0 GiB of memory are free"]),
        (8, {"flops": {5: 300e12}}, ["GPU 5: multiplies matrices at 300 TFLOP/s"]),
        (2, {"flops": {0: 300e12}}, ["GPU 0: multiplies matrices at 300 TFLOP/s"]),
        (8, {"links": {(6, 7): 5e9}}, ["GPUs 6 and 7: copy at 5 GB/s"]),
        (4, {"links": {(3, 0): 5e9}}, ["GPUs 3 and 0: copy at 5 GB/s"]),
        (8, {"errors": {2: "CUDA error: uncorrectable ECC"}}, ["GPU 2: CUDA error: uncorrec"]),
        (8, {"errors": {(0, 1): "peer access"}}, ["GPUs 0 and 1: peer access"]),
        (2, {"errors": {0: "a", 1: "b"}}, ["GPU 0: a", "GPU 1: b"]),
    ],
)
def test_each_fault_is_named_by_index(count, faults, problems):
    trial = try_gpus(MockGpus(count, **faults))
    assert len(trial.problems) == len(problems)
    for sentence, begin in zip(trial.problems, problems, strict=True):
        assert sentence.startswith(begin)
        assert "\n" not in sentence


def test_a_ring_of_pairs_is_measured():
    assert [*try_gpus(MockGpus(4)).links] == [(0, 1), (1, 2), (2, 3), (3, 0)]
    assert [*try_gpus(MockGpus(2)).links] == [(0, 1)]
    trial = try_gpus(MockGpus(3, errors={1: "dead"}))
    assert [*trial.links] == [(2, 0)], "the links of a GPU that failed are not tried"
    assert trial.text == "700 TFLOP/s in fp16, 200 GB/s to the next"


def test_torch_is_only_imported_for_gpus():
    code = "import sys, forescale.monitor.gpus; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
