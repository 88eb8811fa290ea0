"""The smallest change that `forescale plan` proposes where a job does not fit: it fits."""

import re

import pytest

BIG = ["model=llama-7b", "optimizer=adamw", "train.tokens=1e11", "train.sequence_length=4096"]
SHORT = ["model=tiny", "train.steps=100", "schedule.warmup=0"]
BATCH = "train.global_batch=1024"


def test_the_fix_keeps_what_is_expensive_where_that_is_enough(planned):
    """And all of a layer is computed again only where it isn't."""
    words = [*BIG, BATCH, "engine=zero1", "plan.gpus=8", "train.micro_batch=1"]
    off = "model.activation_checkpointing=none"
    _, _, err = planned(*words, off, "train.sequence_length=6144")
    assert "set model.activation_checkpointing=selective" in err
    _, _, err = planned(*words, off, "train.sequence_length=65536")
    assert "set model.activation_checkpointing=full" in err


@pytest.mark.parametrize(
    "words",
    [
        ["plan.gpus=8", "engine=zero0", BATCH],
        ["plan.gpus=8", "engine=zero2", "train.micro_batch=128", BATCH],
        ["plan.gpus=8", "engine=zero1", "model.activation_checkpointing=none", BATCH,
         "train.sequence_length=16384"],
        ["machine=a100-80g", "plan.gpus=1", BATCH],
        ["machine.memory_bytes=20e9", "plan.gpus=8", "engine=zero3", BATCH],
    ],
)  # fmt: skip
def test_the_proposed_fix_fits(planned, words):
    code, _, err = planned(*BIG, *words)
    assert code == 2
    assert err.count("\n") == 1
    proposed = re.search(r"set (.*)\.\n", err)[1].split()
    code, plan, err = planned(*BIG, *words, *proposed)
    assert (code, err) == (0, "")
    assert plan["options"][plan["chosen"]]["fits"]


def test_message_if_no_option_fits(planned):
    code, _, err = planned(*BIG, "machine.memory_bytes=3e9", "plan.gpus=8", BATCH)
    assert code == 2
    assert "no sharding option fits" in err


@pytest.mark.parametrize("engine", ["engine=zero2", "engine=zero1", "engine=zero2-offload"])
def test_the_fix_of_a_small_model_may_be_a_lower_stage(forescale, small_data, engine):
    """Whose buckets are larger than all it has; the page names the same stage."""
    words = [*SHORT, f"data.path={small_data}", "data=dataset", "plan.gpus=2", engine,
             "optimizer=adamw", "train.global_batch=2", "train.micro_batch=1"]  # fmt: skip
    small = "machine.memory_bytes=3e9"
    code, page, err = forescale("plan", *words, small)
    proposed = re.search(r"set (.*)\.\n", err)[1].split()
    assert (code, proposed[0]) == (2, "engine.stage=0")
    assert "Cheapest that fits: zero0" in page
    assert forescale("plan", *words, small, *proposed)[0] == 0
