"""Rehearsals beside the plan, which real ranks have confirmed (test_real_costs.py)."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from forescale.ground.errors import UserError
from forescale.rehearsal import depth
from forescale.rehearsal.library import library
from forescale.rehearsal.rank import Request
from forescale.rehearsal.rehearsal import _rank
from forescale.verbs import rehearse
from tests.preferences import preferences
from tests.questions import write_rows
from tests.trainer.small_run import make_run

HERE = Path(__file__).parent
TINY = ("model.width=256", "model.num_heads=4", "model.num_layers=2", "train.sequence_length=256")
JOB = (*TINY, "plan.gpus=8", "train.micro_batch=2", "train.global_batch=64", "train.steps=10")


@cache
def rehearsed(*words: str) -> tuple[int, dict, str]:
    """Return exit code, JSON and standard error of a rehearsal."""
    command = [sys.executable, "-m", "forescale", "rehearse", "--json", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE, check=False)
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


MATRIX = {  # each feature that a job can choose is in one of them
    "zero0": "engine=zero0 optimizer=adamw precision=fp16 model.position=alibi model.mlp=gelu "
    "model.norm=layernorm model.activation_checkpointing=full",
    "zero0-fp32": "engine=zero0 precision=fp32 model.position=learned model.mlp=relu2",
    "zero1": "engine=zero1 model.mixer=window model.mixer.window=64 data.document_mask=true "
    "data.packing=best_fit train.activation_memory_budget=0.5",
    "zero1-offload": "engine=zero1 engine.offload_optimizer=true optimizer=adamw "
    "objective=masked model.causal=false model.position=sinusoidal",
    "zero2": "engine=zero2 optimizer=lion precision.fp8=tensorwise train.deterministic=false",
    "zero2-offload": "engine=zero2-offload model.mixer=lstm model.num_heads=null",
    "zero3": "engine=zero3 precision=fp16 objective=seq2seq model.encoder_layers=2 "
    "model.position=relative",
    "zero3-offload": "engine=zero3-offload precision.fp8=rowwise "
    "model.activation_checkpointing=selective",
    "zero3-near": "engine=zero3 engine.hierarchical_partition=8 plan.gpus=16 optimizer=adamw "
    "rehearse.ranks=[15]",
    "alone": "engine=zero3 model.mixer=mingru model.num_heads=null model.mlp=geglu "
    "train.compile=off plan.gpus=1 train.global_batch=4",
    "ramps": "model.mixer=gated_deltanet train.first_length=64 train.length_ramp=50% "
    "train.first_batch=32 train.batch_ramp=4steps",
    "columns": "engine.sequence_parallel=2 engine.tensor_parallel=2 engine=zero3 "
    "model.mixer=latent objective=prefix",
    "matrices": "engine.tensor_parallel=4 engine=zero2 rehearse.ranks=[7] "
    "model.parametrization=mup model.activation_checkpointing=full",
    "experts": "model.mlp=moe engine.expert_parallel=4 engine=zero3 optimizer=adamw",
    "experts-fixed": "model.mlp=moe model.mlp.capacity=1.25 engine.expert_parallel=2 "
    "model.mtp_layers=1 rehearse.ranks=[7]",
    "experts-columns": "model.mlp=moe model.mlp.scores=sigmoid model.mlp.bias_speed=0.001 "
    "engine.sequence_parallel=2 engine.expert_parallel=2 engine=zero2",
}


def check(*words: str) -> None:
    """Rehearse a job, which builds it, makes steps, scores a micro-batch and copies a checkpoint,
    and compare what was counted with the plan."""
    code, facts, text = rehearsed(*words, "rehearse.kernels=off")
    assert code == 0, text
    planned: dict[tuple[str, int], int] = {}
    for c in facts["planned"]["collectives"]:
        key = c["kind"], c["ranks"]
        planned[key] = planned.get(key, 0) + c["payload"]
    (report,) = facts["ranks"]
    assert report["phase"] == "done"
    counted = {(c["kind"], c["ranks"]): c["bytes"] for c in report["collectives"]}
    few = 4096  # bytes of the norm and the summary of a step
    assert counted.keys() >= planned.keys()
    for key, payload in counted.items():
        assert 0 <= payload - planned.get(key, 0) < few, key
    (states,) = facts["planned"]["memory_bytes"]
    assert report["between_bytes"] == pytest.approx(states["between steps"], rel=0.1)
    # A matrix in Muon's iterations is not planned: a good part of so small a model.
    assert report["peaks"]["update"] == pytest.approx(states["most in the update"], rel=0.15)
    assert report["saved_bytes"] == pytest.approx(states["copied for a checkpoint"], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("case", MATRIX)
def test_a_rank_does_what_the_plan_says(case):
    check(*JOB, *MATRIX[case].split())


# Launches of a step with Muon, each product and sum by itself. May only fall.
LAUNCHES = {"zero0": 1360, "zero1": 1200, "zero2": 1210, "zero3": 1340}


@pytest.mark.slow
@pytest.mark.parametrize("engine", LAUNCHES)
def test_the_host_waits_for_the_norm_and_the_summary_alone(engine):
    _, facts, text = rehearsed(*JOB, f"engine={engine}", "rehearse.kernels=off")
    assert facts, text
    (report,) = facts["ranks"]
    waits = {each["place"].partition(":")[0]: each["times"] for each in report["waits"]}
    expected = {"forescale/engine/world.py": 1, "forescale/engine/step.py": 1}
    if engine == "zero2":  # for the reduction beside each of two backward passes
        expected["deepspeed/runtime/zero/stage_1_and_2.py"] = 2
    assert waits == expected
    assert sum(each["times"] for each in report["operations"]) <= LAUNCHES[engine]


@pytest.mark.slow
def test_operations_are_those_of_cuda():
    """Torch's CPU build takes them apart, which its CUDA build doesn't."""
    _, facts, text = rehearsed(*JOB, "train.compile=off", "rehearse.kernels=off")
    assert facts, text
    names = {each["name"] for each in facts["ranks"][0]["operations"]}
    assert {"aten::_fused_rms_norm", "aten::silu_backward"} <= names


@pytest.mark.slow
@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs torch's CUDA build (3 GB)")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a driver is here")
def test_torchs_cuda_build_needs_no_driver():
    check(*JOB, *MATRIX["zero1"].split())


@pytest.mark.slow
def test_adapters_that_learn_preferences_do_what_the_plan_says(small_data, tmp_path):
    origin = make_run(small_data, tmp_path, "small", "train.sequence_length=128")
    file = write_rows(tmp_path / "preferences.jsonl", preferences())
    words = [f"data={file}", "run.name=after", f"run.root={tmp_path}", f"data.cache={tmp_path}"]
    words += ["lora.rank=4", "lora.dropout=0.1", "optimizer=adamw", "train.global_batch=16"]
    command = [sys.executable, "-m", "forescale", "finetune", origin.path, *words]
    subprocess.run([*command, "prepare_only=true"], check=True, capture_output=True)
    run = ("run.name=after", f"run.root={tmp_path}")
    check(*run, "plan.gpus=4", "train.micro_batch=2", "engine=zero2")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_two_shallow_depths_tell_all_of_a_deep_model(engine, monkeypatch, capfd):
    words = [*JOB, "model.num_layers=7", f"engine={engine}", "--json", "rehearse.kernels=off"]
    monkeypatch.setattr(depth, "_MOST", 1.0)
    assert rehearse.main(words) == 0
    from_two = json.loads(capfd.readouterr().out)
    assert from_two["depths"] == [2, 4]
    monkeypatch.undo()
    assert rehearse.main(words) == 0
    whole = json.loads(capfd.readouterr().out)
    assert whole["depths"] is None
    (two,), (all_,) = from_two["ranks"], whole["ranks"]
    assert two["waits"] == all_["waits"]
    for one, other in zip(two["collectives"], all_["collectives"], strict=True):
        assert (one["kind"], one["calls"]) == (other["kind"], other["calls"])
        # Of stage 3, the weights that are used again while they are there.
        assert one["bytes"] == pytest.approx(other["bytes"], rel=0.03 if engine == "zero3" else 0)
    # Blocks of 512 bytes, and the parameters that the border of a partition cuts.
    for key in ("between_bytes", "peak_bytes"):
        assert two[key] == pytest.approx(all_[key], rel=0.02)
    launches = [sum(each["times"] for each in one["operations"]) for one in (two, all_)]
    assert launches[0] == pytest.approx(launches[1], rel=0.02)


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("kill -9 $$", "was killed"),
        (
            "cat >/dev/null; echo ValueError: this one >&2; exit 3",
            "ended with code 3: ValueError: this one",
        ),
        ("exit 1", "ended with code 1"),  # it reads no request
    ],
)
def test_a_rank_that_ends_is_a_sentence(tmp_path, monkeypatch, script, problem):
    (program := tmp_path / "python").write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    request = Request("x" * 200_000, 8, 3, 1, False, "", {})
    with pytest.raises(UserError, match=problem) as e:
        _rank(request, print)
    assert e.value.where == "rank 3"
    assert len(str(e.value)) < 400


def test_a_report_may_be_larger_than_a_pipe(tmp_path, monkeypatch):
    script = """cat >/dev/null; printf '{"x": "%0200000d"}' 0; printf '\\377\\n' >&2"""
    (program := tmp_path / "python").write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    assert len(_rank(Request("", 8, 3, 1, False, "", {}), print)["x"]) == 200_000


@pytest.mark.parametrize(
    ("script", "fact"),
    [
        (None, "needs a C++ compiler"),
        ("echo 'a.cpp:1:2: error: no <concepts>' >&2; exit 1", "no <concepts>"),
        ("echo 'ld: final link failed: No space left on device' >&2; exit 1", "FORESCALE_CACHE"),
        ("exit 0", "no message"),  # and no library
    ],
)
def test_a_library_that_can_not_be_built_is_a_sentence(tmp_path, monkeypatch, script, fact):
    monkeypatch.setenv("FORESCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", f"{tmp_path / 'compiler'} -with an-option")
    if script is not None:
        (tmp_path / "compiler").write_text(f"#!/bin/sh\n[ $1 = -with ] || exit 0\n{script}\n")
        (tmp_path / "compiler").chmod(0o755)
    with pytest.raises(UserError) as e:
        library()
    assert fact in str(e.value)
    assert [*tmp_path.glob("cache/rehearsal/*")] == []
