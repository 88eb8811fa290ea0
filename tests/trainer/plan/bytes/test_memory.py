"""Partitions, and memory by kind."""

from dataclasses import replace

import pytest

from forescale.config.compose import compose
from forescale.engine.optim import Group
from forescale.plan.bytes.memory import (
    checkpoint_bytes,
    memory,
    partition,
    share_bytes,
    states,
    touched,
)
from forescale.plan.bytes.parameters import Parameter, inventory
from forescale.plan.config import PlanJob


def job(*overrides, vocab_size=512):
    job_of = compose(PlanJob, ["model=tiny", "train.steps=10", "schedule.warmup=0", *overrides])
    return replace(job_of, model=job_of.model.resolved(vocab_size, job_of.train.sequence_length))


@pytest.mark.parametrize("world", [1, 2, 3, 8, 64])
def test_partition_and_touched_agree_with_counting_each_element(world):
    sizes = [7, 100, 1, 1, 33, 8, 250]
    group = Group("g", False, 1.0, 0.0, params=[Parameter(str(n), (n,)) for n in sizes])
    part = partition(group, world)
    assert part % 2 == 0
    assert 0 <= part * world - sum(sizes) < 2 * world
    owner = [i // part for i in range(sum(sizes))]
    whole = [0] * world
    at = 0
    for n in sizes:
        for rank in set(owner[at : at + n]):
            whole[rank] += n
        at += n
    assert touched(group, world) == whole


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("stage", range(4))
def test_memory_kinds_add_up_and_shrink_with_more_ranks(stage, optimizer):
    words = [f"engine=zero{stage}", f"optimizer={optimizer}", "train.global_batch=512"]
    planned = job(*words, "train.micro_batch=1")
    held, totals = inventory(planned), []
    for world in (1, 8, 64):
        need = memory(planned, held, world, reserved=10, margin=5)
        assert sum(need.rows().values()) == need.total
        assert need.total >= need.states.steady + 15
        totals.append(need.states.masters + need.states.moments)
    assert totals[0] > totals[1] > totals[2] or stage == 0


def test_accumulation_keeps_all_gradients_only_at_stage_1():
    held = inventory(job())
    for stage, grows in ((0, False), (1, True), (2, False), (3, False)):
        once, often = (
            states(job(f"engine=zero{stage}", f"train.global_batch={n}"), held, 4).gradients
            for n in (16, 32)
        )
        assert (often > once) == grows


@pytest.mark.parametrize("stage", range(4))
def test_gradients_in_fp32_take_twice_the_bytes_from_65_micro_batches_on(stage):
    few, many = (
        job(f"engine=zero{stage}", "train.micro_batch=1", f"train.global_batch={4 * n}")
        for n in (64, 65)
    )
    held = inventory(few)
    before, after = (states(planned, held, 4) for planned in (few, many))
    assert (after.gradients, after.held) == (2 * before.gradients, 2 * before.held)
    assert after.buckets <= before.buckets + 4 or stage == 3  # the same bytes of a bucket
    assert after.masters == before.masters
    assert checkpoint_bytes(many, held, 4) >= checkpoint_bytes(few, held, 4)


def test_reducing_beside_the_backward_pass_takes_a_second_bucket():
    held = inventory(job())
    gpu, cpu = (
        states(job("engine=zero2", "precision=bf16", f"machine={m}"), held, 4).buckets
        for m in ("h100-sxm", "cpu")
    )
    assert gpu == 2 * cpu > 0


def test_an_update_copies_the_gradients_of_a_sub_group():
    """DeepSpeed fills it with a billion elements of a rank's partition, not of whole parameters."""
    planned = job("model=llama-7b", "engine=zero3", "optimizer=adamw", "precision=bf16")
    held = inventory(planned)
    assert held.numel > 6e9
    for world, most in ((2, 1_000_000_000), (64, held.numel // 64)):
        of_rank = states(planned, held, world)
        assert of_rank.update == pytest.approx(4 * most, rel=0.1)
        assert of_rank.scratch == of_rank.update // 2, "flat, in the format of the gradients"


def test_lion_needs_a_third_copy_of_what_it_updates():
    planned = [job(f"optimizer={o}", "engine=zero1") for o in ("adamw", "lion")]
    adamw, lion = (states(each, inventory(each), 4) for each in planned)
    flat = adamw.update // 2  # the gradients of a group, in their format
    assert (adamw.scratch, lion.scratch) == (flat, lion.update)


def test_offload_moves_states_to_cpu_memory():
    held = inventory(job())
    here, there = (states(job(f"engine={e}"), held, 4) for e in ("zero2", "zero2-offload"))
    assert (there.masters, there.moments) == (0, 0)
    assert there.host >= here.masters + here.moments
    assert there.backward < here.backward


def test_before_stage_3_the_first_rank_copies_all_frozen_weights():
    words = ("lora.rank=4", "run.from.run=before", "optimizer=adamw", "precision=bf16")
    for stage, alone in ((1, True), (3, False)):
        planned = job(*words, f"engine=zero{stage}")
        held = inventory(planned)
        first, *rest = (share_bytes(planned, held, 4, rank) for rank in range(4))
        assert len({*rest}) == 1
        assert first + sum(rest) == pytest.approx(checkpoint_bytes(planned, held, 4), abs=8)
        assert first - rest[0] == (2 * held.num_frozen if alone else 0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_checkpoint_bytes_are_those_of_weights_and_moments(optimizer):
    planned = job(f"optimizer={optimizer}", "precision=fp32")
    held = inventory(planned)
    muon = sum(p.numel for g in held.groups if g.update.is_by_matrix for p in g.params)
    assert checkpoint_bytes(planned, held, 1) == 12 * held.numel - 4 * muon
