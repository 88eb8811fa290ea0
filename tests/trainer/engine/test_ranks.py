"""What ranks do together, in a thread each: an error on one is the same error on all."""

import errno

import pytest

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
