"""What ranks exchange is parsed and never unpickled, and local ranks listen on the loopback."""

import pytest

from tests.distributed import ranks
from tests.distributed.exchange_scenarios import ERRORS

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def seen():
    return ranks.run("exchange_scenarios:exchange", 2)


def test_values_and_errors_arrive_without_a_pickle(seen):
    assert seen["gather"] == [{"rank": r, "loss": [0.1 + r, float("inf")]} for r in (0, 1)]
    assert seen["to_main"] == ["", "x" * 1000]
    assert seen["from_main"] == [0, None, True, "ü"]
    assert seen["union"] == [["a", 0, "m"], ["a", 1, "m"]]
    assert seen["errors"] == [[f"{type(e).__name__} {e}"] * 2 for e in ERRORS]
    assert (seen["sum"], seen["used"]) == ([2.0] * 3, [])


def test_local_ranks_listen_and_talk_on_the_loopback_alone(seen):
    """As all ranks of one machine: store and gloo, on an address that no other machine reaches."""
    assert all(seen["listening"]), "the store of rank 0, and gloo on each"
    everywhere = {address for each in seen["listening"] for address in each} | {*seen["connected"]}
    assert everywhere <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
