"""Our config in DeepSpeed's words, and what may be added to it."""

import importlib
import json

import pytest
from torch import nn

from forescale.config.compose import compose
from forescale.config.train import TrainJob
from forescale.engine.build import check_quantized
from forescale.engine.deepspeed_config import BLOCK, deepspeed_config, merged
from forescale.ground.errors import UserError
from forescale.plan.config import PlanJob


def derived(*overrides, world_size=2):
    job = compose(TrainJob, ["train.steps=10", "schedule.warmup=0", *overrides])
    return deepspeed_config(job, world_size)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage(stage):
    config = derived(f"engine=zero{stage}", "train.micro_batch=2", world_size=4)
    assert config["zero_optimization"]["stage"] == stage
    # Accumulation, clipping and schedules are ours, so DeepSpeed must not add its own.
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 1
    assert config["train_batch_size"] == 8
    assert config["gradient_clipping"] == 0.0
    assert not config.keys() & {"optimizer", "scheduler", "fp16"}
    json.dumps(config)


@pytest.mark.parametrize(
    ("precision", "says"), [("bf16", {"bf16"}), ("fp16", {"fp16"}), ("fp32", set())]
)
def test_every_precision(precision, says):
    config = derived(f"precision={precision}")
    assert config.keys() & {"bf16", "fp16"} == says
    assert all(config[name]["enabled"] for name in says)


def test_offload():
    two, three = derived("engine=zero2-offload"), derived("engine=zero3-offload")
    assert two["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert "offload_param" not in two["zero_optimization"]
    assert three["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert three["zero_optimization"]["offload_param"] == {"device": "cpu"}
    assert not derived("engine=zero2")["zero_optimization"].keys() & {"offload_optimizer"}
    # A client optimizer: or DeepSpeed refuses it beside offload, and compiles its own.
    for config in (two, three):
        assert config["zero_allow_untested_optimizer"] is True
        assert config["zero_force_ds_cpu_optimizer"] is False


def test_buckets_are_counted_in_elements_there():
    zero = derived("engine.bucket_bytes=1000")["zero_optimization"]
    assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == 500
    odd = derived("engine.bucket_bytes=1002")["zero_optimization"]["allgather_bucket_size"]
    assert odd % 2 == 0  # an engine of stages 1 and 2 refuses others


@pytest.mark.parametrize(("stage", "accumulates"), [(0, None), (1, None), (2, None), (3, "fp32")])
def test_gradients_of_many_micro_batches_are_added_up_in_fp32(stage, accumulates):
    few, many, requested, never, fp32 = (
        derived(f"engine=zero{stage}", "engine.bucket_bytes=1000", "train.micro_batch=1", *words)
        for words in (
            ["precision=bf16", "train.global_batch=128"],  # 64 of each of 2 ranks
            ["precision=bf16", "train.global_batch=130"],
            ["precision=bf16", "engine.gradient_dtype=fp32"],
            ["precision=bf16", "train.global_batch=130", "engine.gradient_dtype=precision"],
            ["train.global_batch=130", "precision=fp32"],
        )
    )
    for config in (many, requested):
        assert config["communication_data_type"] == "fp32"
        # DeepSpeed refuses the word at the other stages, whose optimizers are made to do it.
        assert config.get("data_types", {}).get("grad_accum_dtype") == accumulates
        assert config["zero_optimization"]["reduce_bucket_size"] == 250  # elements of 4 bytes
    for config in (few, never, fp32):
        assert not config.keys() & {"communication_data_type", "data_types"}
        assert config["zero_optimization"]["reduce_bucket_size"] == 500


def test_stages_1_and_2_on_a_gpu_are_told_to_reduce_beside_the_backward_pass():
    def overlaps(*overrides):
        job = compose(PlanJob, ["train.steps=10", "schedule.warmup=0", *overrides])
        return deepspeed_config(job, 8)["zero_optimization"].get("overlap_comm")

    pipeline = ["engine.pipeline_parallel=2", "launch.processes=8", "train.global_batch=64"]
    gpu, users_model = "machine=h100-sxm", ["model=custom", "model._target_=a.B"]
    assert overlaps("engine=zero1", gpu) is True
    assert overlaps("engine=zero2", gpu) is True
    assert overlaps("engine=zero2", gpu, *users_model, "train.compile=off") is True
    for others in (
        ["engine=zero2", "machine=cpu"],
        ["engine=zero2-offload", gpu],
        ["engine=zero2", gpu, *users_model],  # compiled as a whole: all gradients come at the end
        ["engine=zero1", gpu, *pipeline],  # reduces after all passes
        ["engine=zero3", gpu],  # which does it by itself
    ):
        assert not overlaps(*others), others
    mine = "engine.deepspeed={zero_optimization: {overlap_comm: false}}"
    assert overlaps("engine=zero2", gpu, mine) is False


def test_the_second_partition_of_stage_3():
    config = derived("engine=zero3", "engine.hierarchical_partition=2")
    assert config["zero_optimization"]["zero_hpz_partition_size"] == 2
    assert "zero_hpz_partition_size" not in derived("engine=zero3")["zero_optimization"]


def test_weights_are_quantized_on_gpus_alone_and_where_ranks_have_whole_groups(monkeypatch):
    monkeypatch.setattr("forescale.config.train.has_gpu", lambda: True)
    config = derived("engine=zero3", "engine.quantized_weights=true")
    assert config["zero_optimization"]["zero_quantized_weights"] is True
    module = nn.Linear(24, 6, bias=False)
    check_quantized(module, 3, 100)
    check_quantized(module, 5, 144)  # stays whole on each rank
    with pytest.raises(UserError, match="each of 5 ranks has 29 elements of weight"):
        check_quantized(module, 5, 100)


def test_only_blocks_of_our_own_models_are_gathered_as_one():
    classes = [
        derived(*words)["zero_optimization"].get("leaf_module")
        for words in (
            ["engine=zero3"],
            ["engine=zero2"],
            ["engine=zero3", "model=custom", "model._target_=a.B"],
        )
    ]
    assert classes == [{"classes": [BLOCK]}, None, None]
    module, _, name = BLOCK.rpartition(".")
    assert hasattr(importlib.import_module(module), name)


def test_what_has_no_key_of_ours_is_laid_over_section_by_section():
    extra = "{comms_logger: {enabled: true}, zero_optimization: {sub_group_size: 1000}}"
    config = derived("engine=zero2", f"engine.deepspeed={extra}")
    assert config["comms_logger"] == {"enabled": True}
    assert config["zero_optimization"]["sub_group_size"] == 1000
    assert config["zero_optimization"]["stage"] == 2
    plain = derived("engine=zero2")
    del config["comms_logger"], config["zero_optimization"]["sub_group_size"]
    assert config == plain


def test_merging_changes_neither():
    base, extra = {"a": {"b": 1, "c": [1]}, "d": 2}, {"a": {"b": 3}, "d": {"e": 4}}
    assert merged(base, extra) == {"a": {"b": 3, "c": [1]}, "d": {"e": 4}}
    assert (base, extra) == ({"a": {"b": 1, "c": [1]}, "d": 2}, {"a": {"b": 3}, "d": {"e": 4}})
