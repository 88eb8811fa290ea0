"""The kernels of compiled parts, assembled for each kind of GPU."""

import pytest

from tests.matrix import full_only
from tests.trainer.rehearsal.test_planted import needs_triton
from tests.trainer.rehearsal.test_rehearsal import JOB, rehearsed


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("machine", [pytest.param("a100-80g", marks=full_only), "h100-sxm", "b200"])
def test_kernels_of_attention_within_documents_are_assembled_for(machine):
    words = (*JOB, f"machine={machine}", "data.document_mask=true", "engine=zero2")
    code, facts, text = rehearsed(*words, "rehearse.kernels=on")
    assert code == 0, text
    (report,) = facts["ranks"]
    assert report["breaks"] == []
    flex = [k for k in report["kernels"] if "flex_attention" in k["name"]]
    assert {"backward" in k["name"] for k in flex} == {True, False}
    for kernel in report["kernels"]:
        assert 0 < kernel["registers"] <= 255
        assert kernel["shared"] <= 232_448
    layers, micro_batches = 2, 2
    assert all(k["runs"] == layers * micro_batches for k in flex)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(
    "words",
    [
        "recipe=llama-1b model.num_layers=4",
        pytest.param("recipe=gpt2-124m model.num_layers=4", marks=full_only),
        "recipe=mixtral-8x7b model.num_layers=2 engine=zero3 engine.expert_parallel=1 "
        "train.micro_batch=2 model.activation_checkpointing=full",
        "recipe=t5-small",
        pytest.param("recipe=depth data.document_mask=true engine=zero2", marks=full_only),
    ],
)
def test_the_plan_counts_what_compiled_passes_allocate(words):
    code, facts, text = rehearsed(*words.split(), "plan.gpus=8", "rehearse.kernels=on")
    assert code == 0, text
    (report,), (planned,) = facts["ranks"], facts["planned"]["memory_bytes"]
    peak = max(report["peaks"]["forward"], report["peaks"]["backward"])
    assert peak == pytest.approx(planned["most in forward and backward"], rel=0.05)
