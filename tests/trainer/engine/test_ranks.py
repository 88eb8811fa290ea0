"""What ranks do together, in a thread each: an error on one is the same error on all."""

import errno

import pytest

from forescale.engine.ranks import FANOUT, Tree
from forescale.ground.errors import UserError
from tests.trainer.plain_engine import on_all, worlds


def test_the_others_receive_what_rank_0_decides():
    assert on_all(worlds(3), lambda ranks: ranks.from_main(lambda: ranks.rank)) == [0, 0, 0]


def test_main_first_does_the_work_on_rank_0_before_the_others(tmp_path):
    """As at the start of a run: rank 0 makes the directory, and the others find it."""

    def work(ranks):
        (tmp_path / "run").mkdir(exist_ok=not ranks.is_main)
        return ranks.rank, (tmp_path / "run").exists()

    results = on_all(worlds(3), lambda ranks: ranks.main_first(lambda: work(ranks)))
    assert results == [(0, True), (1, True), (2, True)]


@pytest.mark.parametrize(
    "error", [UserError("data", "is lost", "restore it"), OSError(errno.EPIPE, "no answer")]
)
def test_an_error_of_rank_0_ends_all_ranks_alike(error):
    def work(ranks):
        if ranks.is_main:
            raise error
        return pytest.fail("rank 0 has failed")

    results = on_all(worlds(3), lambda ranks: ranks.main_first(lambda: work(ranks)))
    assert [type(e) for e in results] == [type(error)] * 3
    assert {str(e) for e in results} == {str(error)}


@pytest.mark.parametrize("size", [65, 1024, 4096 + 17, 16384])
def test_a_rank_of_many_has_few_neighbours_and_all_hear_of_each_other(size):
    groups = [[] for _ in range(size)]
    trees = [
        Tree.of(rank, size, lambda peers, groups=groups[rank]: groups.append(peers) or peers)
        for rank in range(size)
    ]
    assert len({len(each) for each in groups}) == 1, "torch names a group by their number"
    assert max(len(peers) for tree in trees for peers in tree.levels) == FANOUT
    assert len(trees[0].levels) == (2 if size <= FANOUT**2 else 3)
    for rank, tree in enumerate(trees):
        assert all(
            trees[peer].levels[i] == peers for i, peers in enumerate(tree.levels) for peer in peers
        )
        assert rank == 0 or tree.levels[-1][0] < rank, "the way to rank 0"
        assert all(peers[0] == rank for peers in tree.levels[:-1])
    assert Tree.of(0, FANOUT, lambda peers: pytest.fail("one group has all")) is None
