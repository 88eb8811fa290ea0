"""What ranks exchange is parsed and never unpickled."""

import os
import pickle

import pytest
import torch
from torch.distributed import distributed_c10d

from forescale.config.schema import ConfigError, Problem
from forescale.data.feed import LostMember
from forescale.engine.deepspeed_config import deepspeed_config
from forescale.engine.world import join
from forescale.ground.errors import Transient, UserError
from tests.distributed import ranks, small

pytestmark = pytest.mark.distributed


def test_values_and_errors_arrive_without_a_pickle():
    exchanged = ranks.run("test_exchange:exchange", 2)
    assert exchanged["gather"] == [{"rank": r, "loss": [0.1 + r, float("inf")]} for r in (0, 1)]
    assert exchanged["to_main"] == ["", "x" * 1000]
    assert exchanged["from_main"] == [0, None, True, "ü"]
    assert exchanged["union"] == [["a", 0, "m"], ["a", 1, "m"]]
    assert exchanged["errors"] == [[f"{type(e).__name__} {e}"] * 2 for e in ERRORS]
    assert (exchanged["sum"], exchanged["used"]) == ([2.0] * 3, [])


# Inside the ranks.


def trapped() -> list[str]:
    """Replace everything that unpickles; return the list in which a use is noted."""
    used: list[str] = []

    def trap(*args, **kwargs):
        used.append("unpickled")
        raise AssertionError("a rank unpickles what another rank sent")

    pickle.loads = pickle.load = distributed_c10d._unpickler = trap
    return used


def exchange() -> dict:
    """Return what rank 0 has seen: values and errors."""
    used = trapped()
    size = int(os.environ["WORLD_SIZE"])
    world = join(deepspeed_config(small.job(1, "adamw", "fp32"), size), size, 60.0)
    background = world.in_background("another")
    values = {
        "gather": world.gather({"rank": world.rank, "loss": [0.1 + world.rank, float("inf")]}),
        "to_main": background.gather_to_main("x" * (world.rank * 1000)),
        "from_main": background.from_main(lambda: [world.rank, None, True, "ü"]),
        "errors": [_raised(world, error) for error in ERRORS],
    }
    union = world.union_in_background(LostMember)
    lost = union(frozenset({LostMember("a", world.rank, "m")}))
    assert all(isinstance(item, LostMember) for item in lost)
    values["union"] = sorted(lost)
    total = world.sum(torch.ones(3))
    world.close()
    return {
        **values,
        "sum": total.tolist(),
        "used": used,
    }


ERRORS = (
    UserError("data", "is lost", "restore it"),
    Transient("disk", "coughs", "wait"),
    ConfigError([Problem("a", "is wrong", "mend it"), Problem("b", "too", "mend it")]),
    OSError(32, "Broken pipe", "file"),
)


def _raised(world, error) -> list[str]:
    """What rank 1's error is on each rank."""

    def work():
        if world.rank == 1:
            raise error

    try:
        world.together(work)
    except (UserError, OSError) as e:
        return world.gather(f"{type(e).__name__} {e}")
    return []
