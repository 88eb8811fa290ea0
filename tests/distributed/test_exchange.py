"""What ranks exchange is parsed and never unpickled, and local ranks listen on the loopback."""

import pytest

from tests.distributed import ranks
from tests.distributed.exchange_scenarios import ERRORS

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def exchanged():
    return ranks.run("exchange_scenarios:exchange", 2)


def test_values_and_errors_arrive_without_a_pickle(exchanged):
    assert exchanged["gather"] == [{"rank": r, "loss": [0.1 + r, float("inf")]} for r in (0, 1)]
    assert exchanged["to_main"] == ["", "x" * 1000]
    assert exchanged["from_main"] == [0, None, True, "ü"]
    assert exchanged["union"] == [["a", 0, "m"], ["a", 1, "m"]]
    assert exchanged["errors"] == [[f"{type(e).__name__} {e}"] * 2 for e in ERRORS]
    assert (exchanged["sum"], exchanged["used"]) == ([2.0] * 3, [])


def test_local_ranks_listen_and_talk_on_the_loopback_alone(exchanged):
    """As all ranks of one machine: store and gloo, on an address that no other machine reaches."""
    assert all(exchanged["listening"]), "the store of rank 0, and gloo on each"
    everywhere = {address for each in exchanged["listening"] for address in each} | {
        *exchanged["connected"]
    }
    assert everywhere <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
