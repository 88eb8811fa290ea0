"""Stages of a pipeline: the plan's formulas beside the engine's simulation of its order."""

from dataclasses import replace

import pytest

from forescale.config.compose import compose
from forescale.engine.parallel.schedules import order_of
from forescale.plan.bytes.memory import activations_of, memory, states
from forescale.plan.bytes.parameters import inventory
from forescale.plan.bytes.pipeline import bubble, in_flight, of_stage, parts_of
from forescale.plan.communication import collectives
from forescale.plan.config import PlanJob
from forescale.plan.options import ShardingOptions
from forescale.plan.step_time import token_flops

SIZES = ["model=gpt2-124m", "train.steps=10", "train.sequence_length=1024", "schedule.warmup=0",
         "train.micro_batch=1", "optimizer=adamw", "engine=zero1", "plan.gpus=4",
         "train.compile=off", "precision=bf16"]  # fmt: skip


def job(*words, batch=32):
    planned = compose(PlanJob, [*SIZES, f"train.global_batch={batch}", *words])
    length = planned.train.sequence_length
    return replace(planned, model=planned.model.resolved(planned.model.vocab_size, length))


def piped(stages, schedule="1f1b", chunks=None, *words, batch=32):
    keys = [f"engine.pipeline_parallel={stages}", f"engine.pipeline_schedule={schedule}"]
    keys += [f"engine.pipeline_chunks={chunks}"] if chunks else []
    return job(*keys, *words, batch=batch)


ORDERS = [("1f1b", None), ("interleaved", 2), ("interleaved", 3), ("zero-bubble", None)]


@pytest.mark.parametrize(("schedule", "chunks"), ORDERS)
@pytest.mark.parametrize(("stages", "batch"), [(2, 2), (2, 8), (4, 4), (4, 16)])
def test_a_stage_holds_and_waits_what_the_engine_s_order_says(schedule, chunks, stages, batch):
    planned = piped(stages, schedule, chunks, batch=batch * 4 // stages)
    order = order_of(schedule, stages, chunks or 1, batch)
    held = [in_flight(planned, 4, stage) for stage in range(stages)]
    assert all(
        of <= most for of, most in zip(map(order.in_flight, range(stages)), held, strict=True)
    )
    assert held[0] == order.in_flight(0)
    even = [replace(part, share=1 / stages) for part in parts_of(planned, 4)]
    waits = bubble(planned, even)
    share = waits / (waits + batch / stages)
    assert share == pytest.approx(order.bubble, abs=0.03 if schedule == "zero-bubble" else 0.02)


def test_stages_have_the_whole_model_between_them():
    planned = piped(4)
    trained = inventory(planned)
    stages = [of_stage(trained, planned, stage) for stage in range(4)]
    names = [p.name for stage in stages for p in stage.parameters]
    assert sorted(names) == sorted(p.name for p in trained.parameters)
    assert sum(g.params != [] for stage in stages for g in stage.groups) == 8
    # The last stage has the tied table too, as it was lent, with a gradient.
    (table,) = stages[3].borrowed
    assert table.name == "embedding.weight"
    alone = replace(stages[3], borrowed=[], parts={})
    trained.parts[next(key for key in trained.parts if key[:2] == ("stage", 3))] = alone
    without = states(planned, trained, 4, None, 3)
    lent = states(planned, inventory(planned), 4, None, 3)
    assert lent.weights - without.weights == 2 * table.numel
    assert lent.gradients - without.gradients == 2 * table.numel


def test_the_first_stage_holds_a_micro_batch_for_each_stage_and_the_last_has_the_head():
    planned, whole = piped(4), job()
    parts = parts_of(planned, 4)
    assert [part.held for part in parts] == [4, 3, 2, 1]
    first, last = (activations_of(planned, True, parts[i]) for i in (0, 3))
    alone = activations_of(whole)
    stream = 2 * 1024 * 768
    share = len(parts[0].blocks) / 12
    assert first.layers == 4 * (share * alone.layers + stream)
    assert (first.head, first.logits) == (0, 0)
    assert (last.head, last.logits) == (alone.head, alone.logits)
    of_first = states(planned, inventory(planned), 4).backward + first.total
    assert memory(planned, inventory(planned), 4).peak >= of_first


def test_interleaved_stages_hold_the_blocks_of_their_larger_parts():
    planned = piped(4, "interleaved", 2, "model.num_layers=22", "model.vocab_size=32000")
    order, parts = order_of("interleaved", 4, 2, 32), parts_of(planned, 4)
    assert len(parts[-1].blocks) < len(parts[0].blocks), "beside the head"
    for stage, part in enumerate(parts):
        begins = [n for n, block in enumerate(part.blocks) if block - 1 not in part.blocks]
        sizes = [begins[1], len(part.blocks) - begins[1]]
        most = now = 0
        for action in order.actions[stage]:
            now += sizes[action.part // 4] * ((action.kind == "F") - (action.kind == "B"))
            most = max(most, now)
        assert part.held * len(part.blocks) == most


def test_stages_send_streams_and_divide_the_collectives_of_a_layer():
    words = ["engine.tensor_parallel=2", "plan.gpus=8", "model.vocab_size=50257"]
    planned, whole = piped(2, "interleaved", 2, *words), job(*words)
    trained = inventory(planned)
    each = [{c.label: c for c in collectives(planned, trained, 8, stage)} for stage in (0, 1)]
    one = {c.label: c for c in collectives(whole, inventory(whole), 8)}
    streams = [of["streams of the pipeline"] for of in each]
    assert [(s.payload, s.calls) for s in streams] == [(16 * 3 * 2 * 1024 * 768, 16 * 3)] * 2
    assert streams[0].sent == streams[0].payload
    sums = [of["parts of the residual stream"].payload for of in each]
    # A group of two reads twice as many windows as without stages.
    assert sum(sums) == 2 * one["parts of the residual stream"].payload
    assert sum(of["gradients"].payload for of in each) == one["gradients"].payload


def test_a_step_takes_the_slowest_stage_and_its_bubble():
    def step(planned):
        price = token_flops(planned.model, planned.lora, 1024, 0.0)
        options = ShardingOptions(inventory(planned), price, planned.machine, planned.plan, None)
        return options.evaluate(planned).step

    small = "model.vocab_size=512"  # a head that costs next to nothing
    alone, long = step(job(small)), step(piped(4, "1f1b", None, small))
    assert long.parts["products"] == pytest.approx(alone.parts["products"], rel=0.02)
    passes = sum(long.parts[name] for name in ("products", "attention", "rest"))
    assert 3 / 32 <= long.parts["bubble"] / passes < 1.2 * 3 / 32, "streams are waited for too"
    interleaved = step(piped(4, "interleaved", 3, small))
    assert interleaved.parts["bubble"] == pytest.approx(long.parts["bubble"] / 3, rel=0.3)
