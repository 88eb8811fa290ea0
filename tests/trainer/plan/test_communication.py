"""Communication of a step: bytes, number of collectives, times at given speeds and latencies."""

from dataclasses import replace

import pytest

from forescale.config.compose import compose
from forescale.plan.bytes.parameters import inventory
from forescale.plan.communication import collectives
from forescale.plan.config import PlanJob
from forescale.plan.links import Collective, exposed
from forescale.plan.step_time import predict_step_time, token_flops
from tests.distributed.cost_scenarios import job_of

SMALL = "stage3_param_persistence_threshold: 50"
FAR = "stage3_max_reuse_distance: 0"
SOME = "stage3_max_reuse_distance: 4000"
LAZY = "stage3_prefetch_bucket_size: 0"
FEW = "stage3_max_live_parameters: 5000"
CHECKPOINTING = "model.activation_checkpointing=full"
LATER = ["model.mtp_layers=2", "model.tie_embeddings=true"]


def job(*overrides, vocab_size=512):
    planned = compose(PlanJob, ["model=tiny", "train.steps=10", "schedule.warmup=0", *overrides])
    return replace(planned, model=planned.model.resolved(vocab_size, planned.train.sequence_length))


def zero(*settings):
    return f"engine.deepspeed={{zero_optimization: {{{', '.join(settings)}}}}}"


# Collectives and bytes of their tensors in the third step of DeepSpeed 0.19.8 on two real ranks of
# gloo, counted as `traffic` of tests/distributed/cost_scenarios.py counts.
@pytest.mark.parametrize(
    ("case", "reduced", "gathered"),
    [
        ([0, "adamw", "bf16"], (1, 28_144), (0, 0)),
        ([1, "adamw", "bf16"], (8, 28_144), (2, 28_144)),
        ([1, "muon", "bf16"], (8, 28_144), (3, 28_144)),
        ([2, "adamw", "bf16"], (24, 84_432), (2, 28_144)),
        ([3, "adamw", "bf16"], (24, 84_432), (25, 28_144)),
        ([3, "adamw", "bf16", zero(SMALL)], (24, 84_432), (27, 83_824)),
        ([3, "muon", "bf16", zero(SMALL)], (26, 105_456), (27, 83_824)),
        ([3, "adamw", "bf16", zero(SMALL, FAR, LAZY)], (24, 84_432), (33, 167_344)),
        ([3, "adamw", "bf16", zero(SMALL, FAR, LAZY), CHECKPOINTING], (24, 84_432), (33, 167_344)),
        (
            [3, "adamw", "bf16", zero(SMALL, SOME, LAZY), CHECKPOINTING],
            (24, 84_432),
            (24, 115_360),
        ),
        ([3, "adamw", "bf16", zero(SMALL, FAR), CHECKPOINTING], (24, 84_432), (33, 125_584)),
        ([3, "adamw", "bf16", zero(SMALL, SOME, FEW)], (24, 84_432), (30, 115_360)),
        ([3, "adamw", "bf16", zero(SMALL, SOME, FEW), CHECKPOINTING], (24, 84_432), (30, 115_360)),
        ([3, "adamw", "bf16", zero(SMALL, SOME), *LATER], (45, 152_736), (65, 214_112)),
    ],
)
def test_collectives_are_those_that_were_counted_on_real_ranks(case, reduced, gathered):
    planned = job_of(case, 2)
    traffic = collectives(planned, inventory(planned), 2)

    def sums(is_gather):
        chosen = [c for c in traffic if (c.kind == "all_gather") == is_gather]
        return sum(c.calls for c in chosen), sum(c.payload for c in chosen)

    assert (sums(False), sums(True)) == (reduced, gathered)


@pytest.mark.parametrize(
    ("case", "counted"),
    [
        (
            [3, "muon", "bf16", zero(SMALL), "model.num_layers=3",
             "model.mixer_pattern=[gated_deltanet,lstm,mingru]"],
            {"all_gather": 136_496, "all_to_all": 28_776, "reduce_scatter": 137_328},
        ),
        (  # experts are gathered with their block
            [3, "adamw", "bf16", zero(SMALL, SOME, LAZY), CHECKPOINTING, "model.mlp=moe",
             "model.mlp.experts=5", "model.mlp.expert_width=13"],
            {"all_gather": 148_624, "reduce_scatter": 106_608},
        ),
    ],
)  # fmt: skip
def test_bytes_of_other_parts_are_those_that_were_counted_on_real_ranks(case, counted):
    planned = job_of(case, 2)
    sent: dict[str, int] = {}
    for c in collectives(planned, inventory(planned), 2):
        sent[c.kind] = sent.get(c.kind, 0) + c.payload
    assert sent == counted


def test_only_the_first_gather_of_a_hierarchical_partition_uses_all_ranks():
    """Counted on four real ranks, as above."""
    near = "engine.hierarchical_partition=2"
    planned = job_of([3, "adamw", "bf16", zero(SMALL, SOME, FEW), CHECKPOINTING, near], 4)
    sent: dict[str, tuple[int, int]] = {}
    for c in collectives(planned, inventory(planned), 4):
        calls, payload = sent.get(f"{c.kind}/{c.ranks}", (0, 0))
        sent[f"{c.kind}/{c.ranks}"] = calls + c.calls, payload + c.payload
    assert sent == {
        "all_gather/4": (15, 28_144),
        "all_gather/2": (15, 87_216),
        "reduce_scatter/4": (24, 84_432),
    }


def test_accumulation_multiplies_the_traffic_of_stages_2_and_3():
    planned = job("train.micro_batch=1")
    held = inventory(planned)

    def sent(stage, batch):
        engine, train = (
            replace(planned.engine, stage=stage),
            replace(planned.train, global_batch=batch),
        )
        staged = replace(planned, engine=engine, train=train)
        return {c.label: c.sent for c in collectives(staged, held, 8)}

    for stage, name, times in ((0, "gradients", 1), (1, "gradients", 1), (2, "gradients", 4)):
        assert sent(stage, 32)[name] == times * sent(stage, 8)[name]
    weights = "weights in forward and backward"
    assert sent(3, 32).get(weights, 0) == 4 * sent(3, 8).get(weights, 0)
    assert sent(3, 32)["gradients"] == pytest.approx(4 * sent(3, 8)["gradients"], abs=8)


def test_a_hierarchical_partition_sends_less_between_nodes():
    planned = job("model=llama-7b", "engine=zero3", "plan.gpus=64", "train.global_batch=512")
    held = inventory(planned)
    near = replace(planned, engine=replace(planned.engine, hierarchical_partition=8))
    between = [sum(c.between(8) for c in collectives(j, held, 64)) for j in (planned, near)]
    assert between[1] < between[0]


def test_quantized_weights_are_gathered_in_half_of_the_bytes():
    planned = job("model=llama-7b", "engine=zero3", "plan.gpus=64", "train.global_batch=512")
    held, label = inventory(planned), "weights in forward and backward"
    rounded = replace(planned, engine=replace(planned.engine, quantized_weights=True))
    both = (collectives(each, held, 64) for each in (planned, rounded))
    whole, half = ({c.label: c.payload for c in traffic} for traffic in both)
    assert half[label] == whole[label] / 2
    assert half | {label: 0} == whole | {label: 0}


def test_ranks_that_divide_a_window_exchange_what_its_layers_hold():
    """Queries, keys, values and outputs of 2 layers, forward and backward: 4 times the columns of a
    rank; of the one key and value head each of 4 ranks gets a copy."""
    words = ["model.num_layers=2", "model.width=256", "model.num_heads=4", "model.num_kv_heads=1"]
    words += ["train.micro_batch=2", "train.global_batch=8", "precision=bf16", "plan.gpus=8"]
    planned = job(*words, "engine.sequence_parallel=4")
    (exchange,) = (c for c in collectives(planned, inventory(planned), 8) if c.kind == "all_to_all")
    columns, values = 2 * 256 // 4, 4 * 256  # each head is 64 wide
    assert (exchange.ranks, exchange.calls) == (4, 2 * 2 * 2 * 2)
    assert (
        exchange.payload == 2 * 2 * 2 * 2 * columns * values
    )  # layers, passes, micro-batches, bytes
    assert exchange.sent == exchange.payload * 3 // 4
    # In nodes of 2, each rank gives half of its values to the other node.
    assert (exchange.between(4), exchange.between(2)) == (0, 2 * exchange.payload // 2)
    again = job(*words, "engine.sequence_parallel=4", CHECKPOINTING)
    assert collectives(again, inventory(again), 8)[-1].payload == exchange.payload * 3 // 2
    crossing = job(*words, "engine.sequence_parallel=4", "machine.gpus_per_node=2")
    assert any("some groups cross nodes" in note for note in crossing.notes())
    assert not any("some groups cross nodes" in note for note in planned.notes())
    twelve = ["engine.sequence_parallel=4", "plan.gpus=12", "train.global_batch=12"]
    for group, nodes, is_noted in ((2, 6, False), (6, 3, False), (4, 6, True)):
        of = [f"engine.shard_group={group}", f"machine.gpus_per_node={nodes}"]
        assert any("shard_group" in note for note in job(*words, *twelve, *of).notes()) is is_noted
    halves = job(*words, "model.num_kv_heads=4", "engine.sequence_parallel=2")
    quarters = job(*words, "model.num_kv_heads=4", "engine.sequence_parallel=2",
                   "engine.tensor_parallel=2")  # fmt: skip
    of, of_half = (
        sum(c.payload for c in collectives(j, inventory(j), 8) if "columns" in c.label)
        for j in (halves, quarters)
    )
    # A rank has half of the heads, and twice the windows of a step: its micro-batches are twice.
    assert of_half == of > 0


def test_ranks_that_divide_experts_exchange_rows_and_reduce_among_those_that_have_the_same():
    """3 micro-batches; 2 layers: there and back, forward and backward; 2 rows of 128 for each of
    512 tokens. Between nodes of 4 ranks go the states of 4 groups of 2 ranks, and no row."""
    words = ["model.num_layers=2", "model.width=128", "model.num_heads=2", "model.mlp=moe"]
    words += ["model.mlp.experts=8", "model.mlp.top_k=2", "train.micro_batch=2", "precision=bf16"]
    words += ["train.global_batch=48", "engine=zero1", "plan.gpus=8", "machine.gpus_per_node=4"]
    planned = job(*words, "engine.expert_parallel=4")
    held = inventory(planned)
    traffic = {c.label: c for c in collectives(planned, held, 8)}
    rows, numbers = traffic["rows of experts"], traffic["numbers of rows"]
    assert (rows.ranks, rows.calls) == (4, 3 * 2 * 4)
    assert rows.payload == rows.calls * 2 * 512 * 128 * 2
    assert (numbers.calls, numbers.payload) == (3 * 2, 3 * 2 * 8 * 8)
    assert rows.between(4) == 0
    experts = sum(p.numel for p in held.parameters if p.name in held.experts)
    gradients = traffic["gradients of experts"]
    assert (gradients.ranks, gradients.payload) == (2, 2 * experts // 4)
    assert gradients.inside_seconds(planned.machine, 4) == 0  # the other rank is on the other node
    assert gradients.between(4) == 4 * gradients.sent
    rest = sum(p.numel for p in held.parameters) - experts
    assert traffic["gradients"].payload == 2 * rest
    alone = job(*words)
    before = {c.label: c for c in collectives(alone, held, 8)}
    assert before["gradients"].payload == 2 * (rest + experts)
    assert "rows of experts" not in before


def test_at_stage_3_experts_are_gathered_among_those_that_have_the_same():
    """And ranks that divide matrices send the rows of half the tokens each."""
    words = ["model.num_layers=2", "model.width=128", "model.num_heads=2", "model.mlp=moe"]
    words += ["model.mlp.experts=8", "model.mlp.top_k=2", "train.micro_batch=2", "precision=bf16"]
    words += ["train.global_batch=16", "engine=zero3", "plan.gpus=8", "engine.expert_parallel=4"]
    words += ["engine.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}"]
    for tensor in (1, 2):
        planned = job(*words, f"engine.tensor_parallel={tensor}", "optimizer=adamw")
        held = inventory(planned)
        traffic = {c.label: c for c in collectives(planned, held, 8)}
        rounds = tensor  # micro-batches of 2 windows, for the same 16
        experts = sum(p.numel for p in held.parameters if p.name in held.experts) // 4
        gathered = traffic["weights in forward and backward of experts"]
        assert (gathered.ranks, gathered.stride) == (2, 4)
        assert gathered.payload == 2 * experts * rounds  # kept until the backward pass
        reduced = traffic["gradients of experts"]
        assert (reduced.ranks, reduced.payload) == (2, 2 * experts * rounds)
        assert traffic["gradients"].ranks == 8 // tensor
        rows = traffic["rows of experts"]
        assert rows.payload == rows.calls * 2 * 512 // tensor * 128 * 2


def test_groups_of_experts_that_cross_nodes_are_noted():
    words = ["model.mlp=moe", "plan.gpus=8", "train.global_batch=64", "engine.expert_parallel=4"]
    crossing, inside = (job(*words, f"machine.gpus_per_node={n}") for n in (2, 4))
    assert any("engine.expert_parallel=4" in note for note in crossing.notes())
    assert not any("engine.expert_parallel" in note for note in inside.notes())
    rows = next(c for c in collectives(crossing, inventory(crossing), 8) if "rows" in c.label)
    assert rows.between(2) == 2 * rows.payload * 2 // 4  # half of what each of 2 ranks has


def test_ranks_that_divide_matrices_sum_streams_and_share_states_with_the_same_parts():
    """2 layers of 2 parts, forward and backward; the vectors of tokens and what the head reads; 2
    micro-batches of 512 tokens in bf16, 256 wide, and the head's 2 numbers of each rank."""
    words = [
        "model.num_layers=2",
        "model.width=256",
        "model.num_heads=4",
        "model.mixer.qk_norm=none",
    ]
    words += ["train.micro_batch=2", "train.global_batch=8", "precision=bf16", "plan.gpus=8"]
    words += ["engine=zero1", "optimizer=adamw", "machine.gpus_per_node=4", "model.vocab_size=512"]
    planned = job(*words, "engine.tensor_parallel=4")
    held = inventory(planned)
    traffic = {c.label: c for c in collectives(planned, held, 8)}
    streams = traffic["parts of the residual stream"]
    assert (streams.ranks, streams.calls) == (4, 2 * (2 * 2 * 2 + 2 + 1))
    assert streams.payload == 2 * (10 * 512 * 256 * 2 + 512 * 4 * 8)
    assert (streams.between(4), streams.between(2)) == (0, streams.sent)
    size = held.of_rank(planned.mesh(8)).numel
    assert traffic["gradients"].ranks == 2
    assert traffic["gradients"].payload == 2 * size
    assert held.numel // 4 < size < held.numel // 4 * 1.01
    # The rank with the same parts is on the other node: 4 groups of 2 ranks share the links.
    assert traffic["gradients"].between(4) == 4 * traffic["gradients"].sent


def test_a_ring_passes_keys_on_to_those_that_see_them():
    """As rehearsed: 8 ranks have 2,048 columns each, so 4,096 tokens are those of two before."""
    words = ["model=llama-1b", "train.sequence_length=16384", "engine.context_parallel=8",
             "precision=bf16", "train.micro_batch=1", "train.global_batch=1",
             "launch.processes=8"]  # fmt: skip
    cases = {(): 7, ("model.mixer=window", "model.mixer.window=4096"): 2}
    for mixer, turns in cases.items():
        planned = job(*words, *mixer)
        (ring,) = (c for c in collectives(planned, inventory(planned), 8) if c.is_direct)
        values = 2048 * 2 * planned.model.sizes.kv_width
        assert ring.payload == 22 * values * (2 * 2 * turns + 4 * (turns + 1))
        assert ring.calls == 22 * (3 * turns + 1)


def test_one_rank_sends_nothing():
    for stage in range(4):
        planned = job(f"engine=zero{stage}")
        assert collectives(planned, inventory(planned), 1) == []


def test_times_of_the_slowest_link_and_of_waiting():
    machine = job().machine
    still = {"intra_latency": 0.0, "inter_latency": 0.0}
    machine = replace(machine, intra_node=100.0, inter_node=50.0, link_efficiency=0.5, **still)
    inside = Collective("a", "all_reduce", 1000, 4)
    across = Collective("b", "all_gather", 1600, 16, beside=0.5)
    assert inside.sent == 2 * 3 * 1000 // 4
    assert (inside.between(4), across.between(4)) == (0, 1500)
    assert inside.seconds(machine, 4) == pytest.approx(1500 / 50)
    assert across.seconds(machine, 4) == pytest.approx(1500 / 25)
    # a never overlaps. b takes 60 s, overlaps with half of the computation, and its copies on the
    # links of a node take 30 s from it.
    assert exposed([inside, across], machine, 4, 200.0) == pytest.approx(30 + 30)
    assert exposed([inside, across], machine, 4, 40.0) == pytest.approx(30 + 40)
    alone = replace(machine, overlap=False)
    assert exposed([inside, across], alone, 4, 200.0) == pytest.approx(90)


def test_latency_is_that_of_a_ring_or_of_a_tree():
    """By the model of NCCL: 16 ranks in 4 nodes are 15 steps around the ring, 3 between nodes."""
    machine = replace(job().machine, intra_latency=1.0, inter_latency=10.0)
    gather = Collective("a", "all_gather", 16, 16, calls=5)
    assert gather.latency_seconds(machine, 4) == pytest.approx(5 * (12 * 1 + 3 * 10), rel=1e-3)
    # All in one node: no tree; on 4 nodes a tree of 2 levels; on 2 nodes of 1 both need 2 steps.
    reduce = Collective("b", "all_reduce", 16, 16)
    assert reduce.latency_seconds(machine, 16) == pytest.approx(2 * 15 * 1, rel=1e-3)
    assert reduce.latency_seconds(machine, 4) == pytest.approx(2 * (3 * 1 + 2 * 10), rel=1e-3)
    pair = Collective("c", "all_reduce", 16, 2)
    assert pair.latency_seconds(machine, 1) == pytest.approx(2 * 10, rel=1e-3)


def test_zero1_becomes_faster_than_zero3_on_many_nodes():
    """Llama 3 8B, a window of 8,192 tokens for each H100: both hide what the network adds to the
    time of their traffic, until the latency of ZeRO-3's hundreds of collectives takes longer."""
    words = ["model=llama-7b", "model.num_kv_heads=8", "model.mlp_width=14336",
             "model.vocab_size=128256", "optimizer=adamw", "train.sequence_length=8192",
             "train.micro_batch=1"]  # fmt: skip
    planned = job(*words, vocab_size=128_256)
    held, price = inventory(planned), token_flops(planned.model, planned.lora, 8192, 0.0)

    def seconds(stage, nodes, **machine):
        staged = replace(
            planned,
            engine=replace(planned.engine, stage=stage),
            train=replace(planned.train, global_batch=8 * nodes),
        )
        traffic = collectives(staged, held, 8 * nodes)
        machine = replace(planned.machine, **machine)
        return predict_step_time(staged, held, price, traffic, machine, 8 * nodes, 8).seconds

    nodes = [2**n for n in range(10)]
    zero1, zero3 = ([seconds(stage, n) for n in nodes] for stage in (1, 3))
    assert max(zero1) < 1.03 * min(zero1)  # reduced beside the backward pass
    assert zero3 == sorted(zero3)
    is_faster = dict(zip(nodes, map(lambda a, b: a < b, zero1, zero3), strict=True))
    assert [n for n in nodes if is_faster[n]] == [8, 16, 32, 64, 128, 256, 512]
    still = {"intra_latency": 0.0, "inter_latency": 0.0}
    assert seconds(3, 512, **still) < seconds(1, 512, **still)  # it is the latency
