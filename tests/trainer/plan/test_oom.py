"""The estimated memory of a rank, and the message of a rank that ran out of memory."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from forescale.config.compose import compose
from forescale.config.train import TrainJob
from forescale.ground.errors import UserError
from forescale.models.flops import count
from forescale.plan.oom import bytes_of, explained, largest_micro_batch
from forescale.plan.options import with_checkpointing

ROOT = Path(__file__).parents[3]


def job(*overrides, vocab_size=512):
    planned = compose(TrainJob, ["model=tiny", "train.steps=10", "schedule.warmup=0", *overrides])
    return replace(planned, model=planned.model.resolved(vocab_size, planned.train.sequence_length))


def test_each_zero_stage_shards_the_states_of_the_paper():
    """Table 1 of the ZeRO paper: 16 bytes a parameter with AdamW in mixed precision. At
    stages 1 and 2 both ranks of a border keep the whole gradient of the parameter that it cuts."""
    whole = "engine.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}"
    for stage, weights, optimizer in ((0, 1, 1), (1, 1, 4), (2, 1, 4), (3, 4, 4)):
        extra = [whole] if stage == 3 else []
        fixed = ["model=llama-160m", "optimizer=adamw", "precision=bf16"]
        planned = job(*fixed, f"engine=zero{stage}", *extra)
        n, held = count(planned.model).total, bytes_of(planned, world_size=4).states
        assert held.weights == pytest.approx(2 * n / weights, rel=1e-4)
        assert held.masters + held.moments == pytest.approx(12 * n / optimizer, rel=1e-4)
        share = 1 if stage == 0 else 4
        assert 2 * n / share <= held.held * (1 + 1e-6) < 2 * n / share * 1.35


def test_activations_grow_with_the_micro_batch():
    two, four, eight = (bytes_of(job(), 1, micro).activations.total for micro in (2, 4, 8))
    assert eight - four == 2 * (four - two) > 0  # the logits of a chunk don't grow
    fp32, bf16 = (bytes_of(job(p), 1).activations for p in ("precision=fp32", "precision=bf16"))
    assert fp32.total > bf16.total


def test_no_estimate_for_a_model_class_of_the_user():
    planned = compose(TrainJob, ["model._target_=mypackage.Model", "train.steps=100"])
    assert bytes_of(planned, 1) is None
    assert largest_micro_batch(planned, 1, 1 << 40) is None


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("available", [1 << 20, 1 << 26, 1 << 27, 1 << 40])
def test_the_proposed_micro_batch_divides_the_batch_and_fits(ranks, available):
    planned = job("train.global_batch=24", "train.micro_batch=8")
    proposed = largest_micro_batch(planned, ranks, available)
    usable = [
        m
        for m in range(1, 8)
        if 24 % (m * ranks) == 0 and bytes_of(planned, ranks, m).total <= 0.9 * available
    ]
    if proposed is None:
        assert not usable
    else:
        assert proposed in usable
        now, then = (bytes_of(planned, ranks, m).activations.total for m in (8, proposed))
        assert then <= 0.9 * now
        assert not replace(planned, train=replace(planned.train, micro_batch=proposed)).problems(
            ranks
        )


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
        ),
        RuntimeError("Storage size calculation overflowed with sizes=[9223372036854775807, 32]"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "beyond int64", "python"],
)
def test_out_of_memory_is_one_message_with_numbers(error):
    with pytest.raises(UserError) as caught, explained(job()):
        raise error
    message = str(caught.value)
    assert "\n" not in message
    planned, used, of = map(float, re.findall(r"([\d.]+) GiB", message))
    assert planned == pytest.approx(bytes_of(job(), 1).total / 2**30, abs=0.01)
    assert 0 < used <= of
    fix = r"set train\.micro_batch=2, or model\.activation_checkpointing=(\w+)\.$"
    how = re.search(fix, message)[1]
    less = bytes_of(with_checkpointing(job(), how), 1).activations.total
    assert less <= 0.9 * bytes_of(job(), 1).activations.total


def test_the_message_names_other_settings_if_no_micro_batch_fits():
    words = ("precision=bf16", "train.micro_batch=1")
    with pytest.raises(UserError, match=r"set model\.\w+=selective"), explained(job(*words)):
        raise MemoryError
    others, full = "use a higher engine stage or engine", "model.activation_checkpointing=full"
    with pytest.raises(UserError, match=others), explained(job(*words, full)):
        raise MemoryError


def test_other_errors_pass_unchanged():
    with pytest.raises(RuntimeError, match="size mismatch"), explained(job()):
        raise RuntimeError("size mismatch")


@pytest.mark.slow  # fills memory
def test_a_process_that_really_runs_out_of_memory():
    """A limit on the address space makes torch raise its own error."""
    body = (
        "import resource, sys, torch\n"
        "from forescale.config.compose import compose\n"
        "from forescale.plan.oom import explained\n"
        "from forescale.config.train import TrainJob\n"
        f"job = compose(TrainJob, {['model=tiny', 'train.steps=10', 'schedule.warmup=0']!r})\n"
        "torch.zeros(1)\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**28,) * 2)\n"
        "try:\n"
        "    with explained(job):\n"
        "        torch.ones(2**28)\n"
        "except Exception as e:\n"
        "    print(type(e).__name__, e)\n"
    )
    if not sys.platform.startswith("linux"):
        pytest.skip("the limit on address space is Linux's")
    done = subprocess.run(
        [sys.executable, "-c", body],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("UserError memory: a rank ran out of memory"), done
