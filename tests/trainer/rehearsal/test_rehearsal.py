"""Rehearsals beside the plan, which real ranks have confirmed (test_real_costs.py)."""

import json
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

import pytest
import torch

from forescale import cli
from forescale.config.sections.objective import OBJECTIVES
from forescale.ground.errors import UserError
from forescale.models.mixers import MIXERS
from forescale.models.mlps import MLPS
from forescale.plan.plan import Plan
from forescale.rehearsal import depth, rehearsal
from forescale.rehearsal.config import RehearseJob
from forescale.rehearsal.library import library
from forescale.rehearsal.rank import Request
from forescale.rehearsal.rehearsal import _rank
from forescale.run.command import job_of
from tests import warm
from tests.preferences import preferences
from tests.questions import rows, write_rows
from tests.trainer.rehearsal import forks
from tests.trainer.rehearsal.device_lines import ROOT, device_statements
from tests.trainer.small_run import make_run

HERE = Path(__file__).parent
TINY = (
    *("model.width=256", "model.num_heads=4", "model.num_layers=2", "model.num_kv_heads=null"),
    *("model.mlp_width=null", "model.vocab_size=null"),
)
STEPS = ("plan.gpus=8", "train.micro_batch=2", "train.global_batch=64", "train.steps=10")
JOB = (*TINY, *STEPS, "train.sequence_length=256")
MATRIX = {  # each choice of conf/ and each feature is in one of them
    "zero0": "recipe=gpt2-124m engine=zero0 optimizer=adamw precision=fp16 model.mlp=gelu "
    "model.position=alibi model.activation_checkpointing=full",
    "zero0-fp32": "recipe=gpt2-350m engine=zero0 optimizer=muon precision=fp32 model.mlp=relu2",
    "zero1": "recipe=llama-160m engine=zero1 optimizer=muon model.mixer=window "
    "model.mixer.window=64 data.document_mask=true data.packing=best_fit "
    "train.activation_memory_budget=0.5 validation.abilities=[reverse] data.damaged=substitute",
    "zero1-offload": "recipe=bert-base engine.offload_optimizer=true objective=masked "
    "model.mlp=gelu_exact model.position=sinusoidal",
    "zero2": "recipe=llama-1b engine=zero2 optimizer=lion precision.fp8=tensorwise "
    "train.deterministic=false",
    "zero2-offload": "engine=zero2-offload precision=bf16 model.mixer=lstm model.num_heads=null "
    "train.sequence_length=64 "
    "engine.deepspeed={wall_clock_breakdown:false}",
    "zero3": "recipe=t5-small engine=zero3 optimizer=muon precision=fp16 objective=seq2seq "
    "model.encoder_layers=2 model.mlp=relu model.position=relative model.num_kv_heads=2",
    "zero3-offload": "recipe=llama-3b engine=zero3-offload optimizer=muon precision.fp8=rowwise "
    "model.activation_checkpointing=selective",
    "zero3-near": "recipe=llama-7b engine=zero3 engine.hierarchical_partition=8 plan.gpus=128 "
    "train.global_batch=256 rehearse.ranks=[127] model.mixer=attention model.mlp=swiglu "
    "objective=next_token",
    "alone": "engine=zero3 model.mixer=mingru model.num_heads=null model.mlp=geglu "
    "train.compile=off plan.gpus=1 train.global_batch=4 checkpoint.background=false",
    "ramps": "recipe=llama-13b engine.pipeline_parallel=1 optimizer=muon "
    "model.mixer=gated_deltanet train.first_length=64 train.length_ramp=50% train.first_batch=32 "
    "train.batch_ramp=4steps",
    "columns": "engine.sequence_parallel=2 engine.tensor_parallel=2 engine=zero3 "
    "model.mixer=latent objective=prefix",
    "matrices": "recipe=llama-70b model.num_kv_heads=4 engine.tensor_parallel=4 engine=zero2 "
    "engine.pipeline_parallel=1 engine.sequence_parallel=1 "
    "optimizer=muon model.parametrization=mup model.dropout=0.1 rehearse.ranks=[4] "
    "data.cache=no-such-folder",
    "experts": "recipe=mixtral-8x7b model.num_kv_heads=2 model.mlp=moe engine.expert_parallel=4",
    "experts-fixed": "model.mlp=moe model.mlp.capacity=1.25 model.mlp.shared=1 "
    "model.mlp.expert_width=256 engine.expert_parallel=2 model.mtp_layers=1 rehearse.ranks=[7]",
    "experts-columns": "model.mlp=moe model.mlp.scores=sigmoid model.mlp.bias_speed=0.001 "
    "engine.sequence_parallel=2 engine.context_parallel=2 engine.expert_parallel=2 engine=zero2 "
    "data.document_mask=true",
    "depth": "recipe=depth model.depth=4 model.width=null model.num_heads=null "
    "model.num_layers=null objective=pairs objective.separator=9 model.position=learned "
    "precision=auto",
    "ring": "recipe=llama-405b engine.pipeline_parallel=1 engine.pipeline_schedule=1f1b "
    "engine.pipeline_chunks=null engine.tensor_parallel=1",
    "stages": "recipe=deepseek-v3 engine.pipeline_parallel=2 engine.pipeline_schedule=1f1b "
    "engine.pipeline_chunks=null engine.expert_parallel=2 model.mlp.experts=4 model.mlp.top_k=2 "
    "model.mlp.dense_layers=1 model.mlp.expert_width=64 model.mixer.rank=32 "
    "model.mixer.query_rank=64 model.head_dim=64",
    "own": "model._target_=planted.Small objective=own "
    "objective._target_=forescale.data.objective.NextToken optimizer=own "
    "optimizer._target_=torch.optim.AdamW callbacks=[{_target_:planted.Sees}]",
}
# What the processes of rehearsals note (lines/sitecustomize.py).
DEVICE_LINES = TemporaryDirectory()


def words_of(case: str) -> tuple[str, ...]:
    """Return the words of a case of the matrix."""
    is_own = "model._target_" in MATRIX[case]
    shape = ("train.sequence_length=256", *STEPS) if is_own else JOB
    return (*shape, *MATRIX[case].split(), "rehearse.kernels=off")


@cache
def rehearsed(*words: str) -> tuple[int, dict, str]:
    """Return exit code, JSON and standard error of a rehearsal."""
    noted = Path(DEVICE_LINES.name, "statements.json")
    if not noted.exists():
        lines: dict[str, list[int]] = {}
        for statement in device_statements():
            lines.setdefault(statement.imported, []).append(statement.line)
        noted.write_text(json.dumps(lines))
    server = warm.server(forks.__file__, str(HERE / "lines"), DEVICE_LINES=DEVICE_LINES.name)
    request = {"serve": "tests.trainer.rehearsal.forks:keep", "folder": str(HERE)}
    request |= {"words": ["rehearse", "--json", *words]}
    with TemporaryFile("w+") as output, TemporaryFile("w+") as errors:
        files = output.fileno(), errors.fileno()
        with warm.ask(request, *files, of=server) as answer, answer.makefile() as lines:
            code = int(lines.read())
        for file in (output, errors):
            file.seek(0)
        return code, json.loads(output.read() or "{}"), errors.read()


def check(*words: str) -> None:
    """Rehearse a job, which builds it, makes steps, scores a micro-batch and copies a checkpoint,
    and compare what was counted with the plan."""
    code, facts, text = rehearsed(*words)
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
    # Muon's iterations of a stack of matrices are not planned: a good part of so small a model.
    stack = 16 << 20 if facts["config"]["optimizer"]["kind"] == "muon" else 0
    updating = states["most in the update"]
    assert 0.85 * updating <= report["peaks"]["update"] <= 1.15 * updating + stack
    assert report["saved_bytes"] == pytest.approx(states["copied for a checkpoint"], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("case", MATRIX)
def test_a_rank_does_what_the_plan_says(case):
    check(*words_of(case))


def test_each_choice_of_the_configuration_is_rehearsed():
    groups = ("recipe", "engine", "precision", "optimizer")
    choices = {f"{g}={path.stem}" for g in groups for path in (ROOT / "conf" / g).glob("*.yaml")}
    choices |= {f"model.mixer={name}" for name in MIXERS} | {f"model.mlp={name}" for name in MLPS}
    choices |= {f"objective={name}" for name in OBJECTIVES}
    of_finetuning = {"objective=preferences", "objective=responses"}  # need data of their own
    words = {word for case in MATRIX.values() for word in case.split()}
    assert choices - words - of_finetuning == set()


CEILINGS = json.loads((HERE / "ceilings.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("case", CEILINGS)
def test_waits_launches_and_bytes_of_a_step_stay_below_their_ceilings(case):
    """A step may do less: lower the number in ceilings.json. What would raise one is a mistake."""
    _, facts, text = rehearsed(*words_of(case))
    assert facts, text
    (report,), ceiling = facts["ranks"], CEILINGS[case]
    waits = Counter[str]()
    for each in report["waits"]:
        waits[each["place"].partition(":")[0]] += each["times"]
    assert waits <= Counter(ceiling["waits"]), waits
    assert sum(each["times"] for each in report["operations"]) <= ceiling["launches"]
    assert sum(each["bytes"] for each in report["collectives"]) <= ceiling["bytes"]


# Statements that only a device runs and no rehearsal does, by file and function.
REASONS = {
    **{
        f"trainer/{place}": "asks the machine's driver, which tests/trainer replaces"
        for place in (
            *(f"config/hardware.py:{name}" for name in ("_devices", "capability", "gpu_memory")),
            *(f"resilience/elastic.py:{name}" for name in ("__init__", "_largest")),
        )
    },
    "models/mixers/masks.py:block_mask": "in a model that is one graph, which none on a GPU is",
    "trainer/engine/determinism.py:use_flash": "needs the package of FlashAttention 3 or 4",
    "trainer/engine/portable/fragments.py:_room": "where the host has too little memory",
    "trainer/engine/ranks.py:_packed": "what another rank sends is a value",
    "trainer/train/trainer.py:__init__": "its parts are rehearsed, and not the trainer itself",
    "trainer/train/trainer.py:_report_numerics": "its parts are rehearsed, and not the trainer",
}


@pytest.mark.slow
def test_operations_are_those_of_cuda():
    """Torch's CPU build takes them apart, which its CUDA build doesn't."""
    _, facts, text = rehearsed(*JOB, "train.compile=off", "rehearse.kernels=off")
    assert facts, text
    names = {each["name"] for each in facts["ranks"][0]["operations"]}
    assert {"aten::_fused_rms_norm", "aten::silu_backward"} <= names


@pytest.mark.slow
def test_grouped_heads_with_biases_keep_no_scores():
    _, facts, text = rehearsed(*words_of("zero3"))
    assert facts, text
    names = {each["name"] for each in facts["ranks"][0]["operations"]}
    assert "aten::_scaled_dot_product_efficient_attention" in names
    assert not [name for name in names if "softmax" in name and "log" not in name]


@pytest.mark.slow
def test_shared_experts_are_computed_while_rows_travel():
    _, facts, text = rehearsed(*words_of("experts-fixed"))
    assert facts, text
    (rows,) = (one for one in facts["ranks"][0]["beside"] if one["kind"] == "all_to_all")
    assert rows["flops"] > 0


@pytest.mark.slow
@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs torch's CUDA build (3 GB)")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a driver is here")
def test_torchs_cuda_build_needs_no_driver():
    check(*words_of("zero1"))


@pytest.mark.slow
def test_each_statement_of_the_device_is_rehearsed_or_has_its_reason():
    for case in MATRIX:
        rehearsed(*words_of(case))
    noted = (path.read_text() for path in Path(DEVICE_LINES.name).glob("*.txt"))
    rehearsed_lines = {line for text in noted for line in text.splitlines()}
    left = {s for s in device_statements() if f"{s.imported}:{s.line}" not in rehearsed_lines}
    unknown = {f"{s.path}:{s.line}" for s in left if s.place not in REASONS}
    assert not unknown, "rehearse it in a case of MATRIX, or give its reason"
    assert REASONS.keys() == {s.place for s in left}, "a reason is no longer one"


@pytest.mark.slow
def test_adapters_that_learn_do_what_the_plan_says(small_data, tmp_path):
    origin = make_run(small_data, tmp_path, "small", "train.sequence_length=128")
    for name, lines in {"preferences": preferences(), "responses": rows()}.items():
        file = write_rows(tmp_path / f"{name}.jsonl", lines)
        run = (f"run.name=after-{name}", f"run.root={tmp_path}")
        words = [*run, f"data={file}", f"data.cache={tmp_path}", "train.global_batch=16"]
        words += ["lora.rank=4", "lora.dropout=0.1", "optimizer=adamw", "prepare_only=true"]
        command = [sys.executable, "-m", "forescale", "finetune", origin.path, *words]
        subprocess.run(command, check=True, capture_output=True)
        here = ("plan.gpus=4", "train.micro_batch=2", "engine=zero2", "rehearse.kernels=off")
        check(*run, *here)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_two_shallow_depths_tell_all_of_a_deep_model(engine, monkeypatch, capfd):
    words = [*JOB, "model.num_layers=7", f"engine={engine}", "--json", "rehearse.kernels=off"]
    monkeypatch.setattr(depth, "_MOST", 1.0)
    assert cli.main(["rehearse", *words]) == 0
    from_two = json.loads(capfd.readouterr().out)
    assert from_two["depths"] == [2, 4]
    monkeypatch.undo()
    assert cli.main(["rehearse", *words]) == 0
    whole = json.loads(capfd.readouterr().out)
    assert whole["depths"] is None
    (two,), (all_,) = from_two["ranks"], whole["ranks"]
    assert two["waits"] == all_["waits"]
    for one, other in zip(two["collectives"], all_["collectives"], strict=True):
        assert (one["kind"], one["calls"]) == (other["kind"], other["calls"])
        # Of stage 3, the weights that are used again while they are there, and Muon's matrices, of
        # which some ranks have one more.
        assert one["bytes"] == pytest.approx(other["bytes"], rel=0.05 if engine == "zero3" else 0)
    # Blocks of 512 bytes, and the parameters that the border of a partition cuts.
    for key in ("between_bytes", "peak_bytes"):
        assert two[key] == pytest.approx(all_[key], rel=0.02)
    launches = [sum(each["times"] for each in one["operations"]) for one in (two, all_)]
    assert launches[0] == pytest.approx(launches[1], rel=0.02)


def test_a_killed_rank_leaves_the_reports_of_the_others(monkeypatch):
    def rank(request, say):
        if request.rank == 3:
            raise UserError("rank 3", "was killed", "give it more memory")
        return {"rank": request.rank}

    monkeypatch.setattr(rehearsal, "_rank", rank)
    monkeypatch.setattr(rehearsal, "library", lambda: "")
    edges = ("engine.tensor_parallel=2", "engine.sequence_parallel=2", "rehearse.ranks=[]")
    done = rehearsal.rehearse(Plan(job_of(RehearseJob, [*JOB, *edges])), Plan, print)
    assert [report["rank"] for report in done.reports] == [0, 3, 7]
    (problem,) = done.problems
    assert problem[:2] == ("rank 3", "was killed")


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
