"""Which number format a machine multiplies matrices in, and what precision=auto becomes."""

import ctypes
import re
from contextlib import nullcontext

import pytest

from forescale.config import hardware, train
from forescale.config.compose import compose
from forescale.config.frozen import freeze
from forescale.config.hardware import (
    capability,
    check_fp8,
    check_fp16,
    exactness,
    gpu_memory,
    native_precision,
)
from forescale.config.schema import plain
from forescale.config.train import TrainJob
from forescale.ground.errors import UserError
from forescale.plan.config import PlanJob


@pytest.mark.parametrize(
    ("cpuinfo", "kind"),
    [
        ("flags\t\t: fpu avx avx2 fma", "fp32"),
        ("flags\t\t: fpu avx2 avx512f avx512bw avx512vl", "bf16"),
        ("Features\t: fp asimd bf16", "bf16"),
        ("Features\t: fp asimd", "fp32"),
        ("model name\t: bf16 avx512bw", "fp32"),
        (None, "fp32"),
    ],
)
def test_a_cpu_is_asked_by_its_flags(tmp_path, cpuinfo, kind):
    (tmp_path / "proc").mkdir()
    if cpuinfo is not None:
        (tmp_path / "proc/cpuinfo").write_text(f"processor\t: 0\n{cpuinfo}\n")
    assert native_precision(tmp_path) == kind


@pytest.mark.parametrize("flags", ["avx512bw", "avx512bw avx512_fp16"])
def test_fp16_needs_a_cpu_that_has_it(tmp_path, flags):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(f"flags\t\t: {flags}\n")
    check_fp16("bf16", on_gpu=False, root=tmp_path)
    with nullcontext() if "fp16" in flags else pytest.raises(UserError, match="no instructions"):
        check_fp16("fp16", on_gpu=False, root=tmp_path)


def test_a_gpu_that_ranks_may_use_computes_in_bf16(tmp_path, monkeypatch):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert native_precision(tmp_path) == "bf16"
    (tmp_path / "hidden/dev").mkdir(parents=True)
    (tmp_path / "hidden/dev/nvidia0").touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert native_precision(tmp_path / "hidden") == "fp32"


def test_torch_agrees_about_this_cpu():
    import torch

    if native_precision() == "bf16" and not torch.cuda.is_available():
        assert torch.ops.mkldnn._is_mkldnn_bf16_supported()
    with (
        nullcontext() if torch.ops.mkldnn._is_mkldnn_fp16_supported() else pytest.raises(UserError)
    ):
        check_fp16("fp16", on_gpu=False)


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_a_job_names_what_it_trains_in(monkeypatch, kind):
    monkeypatch.setattr(train, "native_precision", lambda: kind)
    job = compose(TrainJob, ["run.name=x"])
    assert job.precision.kind == kind
    assert f"kind: {kind}" in freeze(job)
    assert compose(PlanJob, ["machine=cpu"]).precision.kind == kind
    assert compose(PlanJob, ["machine=h100-sxm"]).precision.kind == "bf16"
    assert compose(TrainJob, ["precision=fp16"]).precision.kind == "fp16"


def test_a_run_that_goes_on_on_another_machine_keeps_its_own(monkeypatch):
    """Whether its name is typed or not; what is typed holds."""
    monkeypatch.setattr(train, "native_precision", lambda: "fp32")
    frozen = plain(compose(TrainJob, ["precision=bf16"]))
    for words in ([], ["run.name=first"], ["train.seed=5"]):
        assert compose(TrainJob, words, find=lambda run: frozen).precision.kind == "bf16"
    assert compose(TrainJob, ["precision=fp16"], find=lambda run: frozen).precision.kind == "fp16"
    assert compose(TrainJob, [], find=lambda run: None).precision.kind == "fp32"


@pytest.mark.parametrize(
    ("deterministic", "on_gpu", "holds", "says"),
    [
        (True, True, True, "Exact: .* not yet proven on a GPU"),
        (False, True, False, "Fast: .* up to rounding only"),
        (True, False, True, r"Exact: on a CPU .* bit for bit\."),
        (False, False, True, "Exact: .* with train.deterministic=false too"),
    ],
)
def test_the_promise_of_bits_depends_on_key_and_device(deterministic, on_gpu, holds, says):
    promise = exactness(deterministic, on_gpu)
    assert promise.holds == holds
    assert re.match(says, promise.sentence)


class Driver:
    """What is asked of libcuda.so.1, of GPUs with these capabilities."""

    def __init__(self, *gpus, broken=0):
        self.gpus, self.broken = gpus, broken

    def cuInit(self, flags):  # noqa: N802
        return self.broken

    def cuDeviceGetCount(self, count):  # noqa: N802
        count._obj.value = len(self.gpus)
        return 0

    def cuDeviceGet(self, device, i):  # noqa: N802
        device._obj.value = 10 + i
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):  # noqa: N802
        assert isinstance(device, ctypes.c_int)
        value._obj.value = self.gpus[device.value - 10][{75: 0, 76: 1}[attribute]]
        return 0

    def cuDeviceTotalMem_v2(self, size, device):  # noqa: N802
        size._obj.value = 80 * 2**30 // self.gpus[device.value - 10][0]
        return 0


def test_the_oldest_gpu_decides():
    assert capability(Driver((9, 0), (8, 9), (10, 0))) == (8, 9)
    assert capability(Driver()) is None
    assert capability(Driver((9, 0), broken=100)) is None  # a driver without a GPU


def test_the_smallest_memory_of_a_gpu():
    assert gpu_memory(Driver((8, 0), (10, 0))) == 8 * 2**30
    assert gpu_memory(Driver()) is None


@pytest.mark.parametrize(
    ("lowest", "says"),
    [
        (None, "needs GPUs of CUDA capability 8.9 or more, and this machine has no NVIDIA GPU"),
        ((8, 6), "and this machine has a GPU of 8.6; leave it out"),
        ((8, 9), 'torchao is not installed; pip install "forescale[fp8]"'),
    ],
)
def test_fp8_needs_a_gpu_that_has_it_and_torchao(monkeypatch, lowest, says):
    check_fp8("none")
    monkeypatch.setattr(hardware, "capability", lambda: lowest)
    monkeypatch.setattr(hardware, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        check_fp8("rowwise")
    assert str(caught.value).startswith("precision.fp8=rowwise: ")
    assert says in str(caught.value)
    monkeypatch.setattr(hardware, "find_spec", lambda name: name)
    if lowest == (8, 9):
        check_fp8("rowwise")


def test_a_precision_that_is_found_out_keeps_fp8(monkeypatch):
    monkeypatch.setattr(train, "native_precision", lambda: "bf16")
    job = compose(TrainJob, ["precision.fp8=rowwise"])
    assert (job.precision.kind, job.precision.fp8) == ("bf16", "rowwise")
    frozen = plain(job)
    for words, fp8 in ((["train.seed=5"], "rowwise"), (["precision.fp8=none"], "none")):
        again = compose(TrainJob, ["run.name=x", *words], find=lambda run: frozen)
        assert again.precision.fp8 == fp8
    assert compose(PlanJob, ["precision.fp8=rowwise"]).precision.label == "bf16+fp8-rowwise"
