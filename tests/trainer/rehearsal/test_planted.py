"""Mistakes that only a GPU would show: each is named with its file and line."""

from contextlib import chdir
from importlib.util import find_spec
from pathlib import Path

import pytest

from forescale.config.schema import ConfigError
from forescale.verbs.rehearse import problems_of_job
from tests.trainer.rehearsal.test_rehearsal import rehearsed

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="needs the package triton")
JOB = ("plan.gpus=8", "train.micro_batch=2", "train.global_batch=64", "train.steps=10")


def line_of(file: str, text: str) -> str:
    """Return the place of the only line of a planted file with a text."""
    lines = (HERE / file).read_text().splitlines()
    (at,) = (i for i, line in enumerate(lines, 1) if text in line)
    return f"{file}:{at}"


def of(model: str, *words: str) -> tuple[int, dict, str]:
    code, facts, text = rehearsed(*JOB, f"model._target_={model}", *words)
    return code, facts["ranks"][0] if facts else {}, text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "line", "words", "compile"),
    [
        ("MixesDevices", "x_BLD * torch.ones", ("cuda:0", "cpu"), "auto"),
        ("MixesDevices", "x_BLD * torch.ones", ("cuda:0", "cpu"), "off"),
        ("MixesTypes", "x_BLD @ torch.ones", ("bfloat16", "float32"), "auto"),
        ("MixesTypesOfConvolution", "F.conv1d(", ("bfloat16", "float32"), "off"),
    ],
)
def test_a_mix_up_is_a_problem_with_its_line(model, line, words, compile):
    code, report, text = of(f"planted.{model}", "rehearse.kernels=off", f"train.compile={compile}")
    assert code == 2
    assert report["phase"] == "forward"
    place = line_of("planted.py", line)
    assert report["error"]["place"].endswith(place)
    (sentence,) = (row for row in text.splitlines() if "in forward" in row)
    assert f"at {place}: " in sentence  # from the directory of the command
    for word in words:
        assert word in sentence
    assert len(sentence) < 300


@pytest.mark.slow
def test_a_value_that_is_read_is_a_wait_and_a_break_with_its_line():
    code, report, text = of("planted.Reads", "rehearse.kernels=off")
    assert code == 0, text
    place = line_of("planted.py", ".item()")
    assert ("read", 2) in {(w["kind"], w["times"]) for w in report["waits"] if place in w["place"]}
    assert "rank 0: step 2 of 2" in text
    assert any(place in why for why in report["breaks"])


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["off", pytest.param("on", marks=needs_triton)])
def test_what_a_gpu_takes_is_no_problem(kernels):
    words = ("train.compile=off", f"rehearse.kernels={kernels}")
    code, report, text = of("planted.UsesWhatGpusHave", *words)
    assert code == 0, text
    place = line_of("planted.py", "torch.where(")
    waits = {(w["kind"], w["times"]) for w in report["waits"] if place in w["place"]}
    assert waits == {("size", 2)}
    names = {one["name"] for one in report["operations"]}
    # The compiled part is Inductor's, where there are kernels, and of operations as CUDA has them.
    assert any(name.startswith("triton_poi_fused") for name in names) == (kernels == "on")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "line"),
    [("SplitsByValues", "x_BLD.split("), ("HasNoFakeKernel", "self.gru(x_BLD)")],
)
def test_what_a_rehearsal_can_not_know_is_in_doubt(model, line):
    words = (f"model._target_=planted.{model}", "rehearse.kernels=off", "train.compile=off")
    code, _, text = rehearsed(*JOB, *words)
    assert code == 2
    (sentence,) = (row for row in text.splitlines() if "in forward" in row)
    assert line_of("planted.py", line) in sentence
    assert "a GPU may" in sentence or "with others it may go on" in sentence
    with chdir(HERE), pytest.raises(ConfigError):  # submit doesn't refuse the job for that
        problems_of_job([*JOB, *words])


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("compile", ["auto", "off"])
def test_a_kernel_of_the_users_own_is_assembled_or_named(compile):
    words = (f"train.compile={compile}", "rehearse.kernels=on")
    code, report, text = of("planted_kernels.LaunchesKernel", *words)
    assert code == 0, text
    assert sum(k["runs"] for k in report["kernels"] if k["name"].startswith("doubled")) == 2
    code, report, text = of("planted_kernels.LaunchesBadKernel", *words)
    assert code == 2
    place = line_of("planted_kernels.py", "def unknown_instruction")
    at, _, line = report["error"]["place"].rpartition(":")
    assert at.endswith("planted_kernels.py")
    assert 0 <= int(place.rpartition(":")[2]) - int(line) <= 1  # of it, or of its decorator
    (sentence,) = (row for row in text.splitlines() if "in forward" in row)
    assert "the kernel unknown_instruction" in sentence
    assert "'no_such'" in sentence
