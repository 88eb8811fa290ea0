import pytest

from forescale.config.compose import compose
from forescale.config.mesh import Mesh
from forescale.config.train import TrainJob
from tests.trainer.config.test_train import problems

TWO = ["engine.sequence_parallel=2", "launch.processes=4"]


@pytest.mark.parametrize(("world", "near"), [(1, 1), (4, 1), (4, 2), (8, 4), (6, 6)])
def test_each_rank_has_one_place_in_the_mesh(world, near):
    mesh = Mesh(world, near)
    places = [(mesh.data_rank(r), mesh.sequence_rank(r)) for r in range(world)]
    assert places == [(d, s) for d in range(mesh.data) for s in range(near)]
    for rank, (data, place) in enumerate(places):
        assert mesh.sequence_peers(rank)[place] == rank
        assert mesh.data_peers(rank)[data] == rank
        assert len(mesh.data_peers(rank)) * near == world


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
    (what,) = problems(*command[:-3], "train.global_batch=24", "train.micro_batch=8").values()
    assert what.startswith("24 windows don't divide by 2 groups of 2 ranks that feed 8 at once")


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (["launch.processes=3"], "2 ranks don't divide the job's 3"),
        (["train.sequence_length=255"], "2 ranks don't divide train.sequence_length=255"),
        (["model.num_heads=1"], "2 ranks don't divide the model's 1 heads"),
        (["model.mixer=mingru"], "mixer mingru carries a state from column to column"),
        (["model.mtp_layers=1"], "modules for later tokens read the next rank's columns"),
        (["model.mlp=moe"], "the balance of experts is of all columns"),
        (["model.encoder_layers=1", "objective.kind=seq2seq"], "an encoder-decoder has rows"),
        (["model=custom", "model._target_=mine.Model"], "a model of your own is not divided"),
    ],
)
def test_what_does_not_divide_is_refused(overrides, what):
    found = problems(*TWO, "train.global_batch=16", "train.micro_batch=8", *overrides)
    assert [*found] == ["engine.sequence_parallel"]
    assert found["engine.sequence_parallel"].startswith(what)
