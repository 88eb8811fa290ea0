from itertools import product

import pytest

from forescale.config.compose import compose
from forescale.config.mesh import Mesh
from forescale.config.train import TrainJob
from tests.trainer.config.test_train import problems

TWO = ["engine.sequence_parallel=2", "launch.processes=4"]


@pytest.mark.parametrize(
    ("world", "pipeline", "context", "sequence", "tensor"),
    [
        (1, 1, 1, 1, 1),
        (4, 1, 1, 1, 1),
        (4, 1, 1, 2, 1),
        (6, 1, 1, 6, 1),
        (12, 1, 1, 2, 3),
        (12, 1, 3, 1, 2),
        (4, 2, 1, 1, 1),
        (48, 2, 2, 3, 2),
    ],
)
def test_each_rank_has_one_place_in_the_mesh(world, pipeline, context, sequence, tensor):
    mesh = Mesh(world, sequence, tensor, context=context, pipeline=pipeline)
    kinds = (
        mesh.pipeline_peers,
        mesh.data_peers,
        mesh.context_peers,
        mesh.sequence_peers,
        mesh.tensor_peers,
    )
    places = [tuple(peers(rank).index(rank) for peers in kinds) for rank in range(world)]
    sizes = (pipeline, mesh.data, context, sequence, tensor)
    assert places == [*product(*map(range, sizes))]
    for rank, place in enumerate(places):
        for axis, (peers, size) in enumerate(zip(kinds, sizes, strict=True)):
            others = [places[peer] for peer in peers(rank)]
            assert others == [(*place[:axis], i, *place[axis + 1 :]) for i in range(size)]
        same = [r for r in range(world) if places[r][4] == place[4] and places[r][0] == place[0]]
        assert mesh.state_peers(rank) == same
        assert len(same) == mesh.states


@pytest.mark.parametrize(("world", "tensor", "pipeline", "shard"), [(8, 1, 1, 2), (24, 2, 2, 3)])
def test_each_copy_of_the_states_is_whole(world, tensor, pipeline, shard):
    mesh = Mesh(world, tensor=tensor, pipeline=pipeline, shard=shard)
    for rank in range(world):
        copy, same = mesh.shard_peers(rank), mesh.replica_peers(rank)
        assert len(copy) == shard
        assert len(copy) * len(same) == mesh.states
        assert set(copy) & set(same) == {rank}
        assert {*copy, *same} <= {*mesh.state_peers(rank)}


def test_a_copy_of_the_states_has_each_part_of_the_experts():
    mesh = Mesh(24, tensor=2, experts=3, shard=6)
    for rank in range(24):
        same = mesh.expert_data_peers(rank)
        block = range(rank // 12 * 12, rank // 12 * 12 + 12)  # with a copy of all states
        assert same == [r for r in block if r % 3 == rank % 3]
        assert rank in same


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["engine=zero0"], "at ZeRO stage 0 each rank has all states"),
        (["engine.shard_group=1"], "groups of one rank divide nothing"),
        (["engine.shard_group=3"], "groups of 3 don't divide the 8 ranks"),
        (["engine.tensor_parallel=2", "engine.shard_group=8"], "groups of 8 don't divide the 4"),
        (["engine=zero3", "engine.hierarchical_partition=2"], "a hierarchical partition is of"),
        (["engine.offload_optimizer=true"], "gradients that are offloaded are not summed"),
        (["model.mlp=moe", "engine.expert_parallel=4"], "2 ranks with a copy of the states are no"),
    ],
)
def test_groups_that_can_t_have_a_copy_of_the_states_are_refused(words, problem):
    command = ["launch.processes=8", "train.global_batch=64", "optimizer=adamw", "model.width=64"]
    command += ["model.num_heads=4", "engine.shard_group=2"]
    compose(TrainJob, command)
    refusals = problems(*command, *words)
    assert [*refusals] == ["engine.shard_group"]
    assert refusals["engine.shard_group"].startswith(problem)


@pytest.mark.parametrize(("world", "parts"), [(2, 2), (8, 2), (8, 4)])
def test_each_part_of_the_experts_is_once_in_a_group_and_in_every_group(world, parts):
    mesh = Mesh(world, experts=parts)
    assert mesh.data == world  # each rank has its own windows
    for rank in range(world):
        near, same = mesh.expert_peers(rank), mesh.expert_data_peers(rank)
        assert [r % parts for r in near] == [*range(parts)]
        assert near == [*range(near[0], near[0] + parts)]  # inside of a node
        assert {r % parts for r in same} == {rank % parts}
        assert len(same) * parts == world
        assert rank in near
        assert rank in same


def test_the_ranks_of_a_group_count_once_in_the_batch():
    command = [*TWO, "train.global_batch=16", "train.micro_batch=8", "model.num_heads=2"]
    assert compose(TrainJob, command).mesh(4).data == 2
    (problem,) = problems(*command[:-3], "train.global_batch=24", "train.micro_batch=8").values()
    assert problem.startswith("24 windows don't divide by 2 groups of 2 ranks that feed 8 at once")


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["launch.processes=3"], "the job's 3 ranks are not a multiple of 2"),
        (["train.sequence_length=255"], "2 ranks don't divide train.sequence_length=255"),
        (["model.num_heads=1"], "2 ranks don't divide the model's 1 head"),
        (["model.mlp=moe", "model.mlp.capacity=1.25"], "the places of experts are given"),
        (["model.encoder_layers=1", "objective=seq2seq"], "an encoder-decoder has rows"),
        (["model=custom", "model._target_=mine.Model"], "a model of your own is not divided"),
    ],
)
def test_what_does_not_divide_is_refused(overrides, problem):
    refusals = problems(*TWO, "train.global_batch=16", "train.micro_batch=8", *overrides)
    assert [*refusals] == ["engine.sequence_parallel"]
    assert refusals["engine.sequence_parallel"].startswith(problem)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["launch.processes=3"], "the job's 3 ranks are not a multiple of 2"),
        (["train.sequence_length=254"], "two parts for each of 2 ranks don't divide"),
        (["model.dropout=0.1"], "attention in a ring of ranks drops no weights"),
        (["model.position=relative"], "relative positions have biases with a gradient"),
        (["model.encoder_layers=1", "objective=seq2seq"], "an encoder-decoder has rows"),
    ],
)
def test_what_a_ring_of_ranks_can_not_do_is_refused(overrides, problem):
    ring = ["engine.context_parallel=2", "launch.processes=4", "train.global_batch=16"]
    refusals = problems(*ring, "train.micro_batch=8", *overrides)
    assert [*refusals] == ["engine.context_parallel"]
    assert refusals["engine.context_parallel"].startswith(problem)


EXPERTS = ["model.mlp=moe", "engine.expert_parallel=2"]
MATRICES = ["engine.tensor_parallel=4", "launch.processes=4", "optimizer=adamw", "model.width=64"]


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["launch.processes=6"], "the job's 6 ranks are not a multiple of 4"),
        (["model.num_heads=2"], "4 ranks don't divide model.num_heads=2"),
        (["model.num_heads=4", "model.num_kv_heads=2"], "4 ranks don't divide model.num_kv_heads"),
        (["model.num_heads=4", "model.mlp_width=70"], "4 ranks don't divide model.mlp_width=70"),
        (["model.mixer=mingru"], "the matrices of mixer mingru are not divided"),
        (["model.mixer.qk_norm=layer"], "the matrices of mixer attention with"),
        (["model.mlp=moe"], "ranks that divide matrices don't have all experts each"),
        (
            [*EXPERTS, "model.mlp.shared=1", "model.mlp.expert_width=6"],
            "4 ranks don't divide the 6 channels",
        ),
        ([*EXPERTS, "model.mlp.capacity=1.25"], "the places of experts are given to tokens in"),
        (["optimizer=own", "optimizer._target_=a.B"], "an optimizer of your own may need whole"),
        (["engine.offload_optimizer=true"], "offload is for whole matrices"),
        (["engine=zero3", "engine.hierarchical_partition=2"], "a hierarchical partition is of"),
        (["model=custom", "model._target_=mine.Model"], "a model of your own is not divided"),
    ],
)
def test_matrices_that_do_not_divide_are_refused(overrides, problem):
    refusals = problems(*MATRICES, "train.global_batch=16", *overrides)
    assert [*refusals] == ["engine.tensor_parallel"]
    assert refusals["engine.tensor_parallel"].startswith(problem)


STAGES = ["engine.pipeline_parallel=4", "launch.processes=8", "model.num_layers=8"]


@pytest.mark.parametrize(
    ("overrides", "key", "problem"),
    [
        (["launch.processes=6"], "engine.pipeline_parallel", "the job's 6 ranks are not a"),
        (
            ["model.num_layers=3"],
            "engine.pipeline_parallel",
            "the model's 3 layers don't fill",
        ),
        (
            ["engine.pipeline_schedule=interleaved", "engine.pipeline_chunks=3"],
            "engine.pipeline_parallel",
            "the model's 8 layers don't fill 4 stages of 3 parts",
        ),
        (["engine.pipeline_chunks=2"], "engine.pipeline_chunks", "1f1b has one part of the model"),
        (
            ["engine.pipeline_schedule=zero-bubble"],
            "train.compile",
            "zero-bubble takes the backward pass of a matrix apart",
        ),
        (["engine=zero2"], "engine.stage", "ZeRO stage 2 reduces gradients or gathers weights"),
        (["engine.offload_optimizer=true"], "engine.offload_optimizer", "is not supported with"),
        (["train.invariant=true"], "train.invariant", "is not supported with a pipeline"),
        (["validation.abilities=[copy]"], "validation.abilities", "is not supported with"),
        (["precision=fp16"], "precision", "is not supported with a pipeline"),
        (
            ["model=custom", "model._target_=mine.Model"],
            "engine.pipeline_parallel",
            "a model of your own is not divided",
        ),
        (
            ["engine.pipeline_parallel=1", "engine.pipeline_chunks=2"],
            "engine.pipeline_chunks",
            "needs a pipeline",
        ),
    ],
)
def test_what_passes_no_stages_is_refused(overrides, key, problem):
    assert compose(TrainJob, STAGES).mesh(8).in_stage == 2
    assert problems(*STAGES, *overrides)[key].startswith(problem)


def test_ranks_at_one_place_in_all_stages_are_fed_the_same_windows():
    mesh = compose(TrainJob, [*STAGES, "engine.tensor_parallel=2", "optimizer=adamw"]).mesh(8)
    assert (mesh.data, mesh.states, mesh.together) == (1, 1, 8)
    few = compose(TrainJob, [*STAGES, "train.global_batch=8", "train.micro_batch=1"])
    assert any("4 micro-batches a rank wait 43%" in note for note in few.notes())
    many = compose(TrainJob, [*STAGES, "train.global_batch=64", "train.micro_batch=1"])
    assert not any("of a pipeline" in note for note in many.notes())
    (problem,) = problems(*STAGES, "engine.tensor_parallel=4", "optimizer=adamw").values()
    assert problem.startswith("the job's 8 ranks are not a multiple of 16 (pipeline=4 x tensor=4)")


def test_ranks_that_divide_matrices_are_fed_the_same_windows():
    command = [*MATRICES, "train.global_batch=8", "train.micro_batch=8", "model.num_heads=8"]
    assert compose(TrainJob, command).mesh(4).data == 1
    both = [*command, "engine.sequence_parallel=2", "launch.processes=8"]
    assert compose(TrainJob, both).mesh(8).data == 1
    (problem,) = problems(*both, "model.num_heads=4").values()
    assert problem.startswith("2 ranks don't divide a tensor-parallel rank's 1 head")


@pytest.mark.parametrize("axis", ["sequence", "tensor"])
def test_experts_are_divided_beside_windows_and_matrices(axis):
    command = ["engine.expert_parallel=4", "launch.processes=4", "model.mlp=moe", "optimizer=adamw"]
    command += ["train.global_batch=16", "model.num_heads=2", f"engine.{axis}_parallel=2"]
    mesh = compose(TrainJob, command).mesh(4)
    assert (mesh.data, mesh.experts) == (2, 4)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["engine.tensor_parallel=1"], "is for ranks that divide matrices"),
        (["precision=bf16", "precision.fp8=rowwise"], "products in fp8 have one scale"),
        (
            ["engine.pipeline_parallel=2", "engine.pipeline_schedule=zero-bubble"],
            "zero-bubble has another product",
        ),
    ],
)
def test_sums_in_parts_are_refused_where_products_are_others(overrides, problem):
    chunks = ["engine.tensor_chunks=2", "model.num_heads=4", "train.compile=off"]
    refusals = problems(
        *MATRICES, "launch.processes=8", "train.global_batch=64", *chunks, *overrides
    )
    assert [*refusals] == ["engine.tensor_chunks"]
    assert refusals["engine.tensor_chunks"].startswith(problem)
