"""What ranks exchange is parsed and never unpickled."""

import os
import pickle

import psutil
import pytest
import torch
from torch.distributed import distributed_c10d

from forescale.checkpoint import writer
from forescale.checkpoint.choice import find_faults, newest_complete
from forescale.checkpoint.reader import Position
from forescale.config.schema import ConfigError, Problem
from forescale.data.feed import LostMember
from forescale.engine import ranks as engine_ranks
from forescale.engine.deepspeed_config import deepspeed_config
from forescale.engine.state import owned_fragments
from forescale.engine.world import join
from forescale.ground.errors import Transient, UserError
from forescale.run.directory import Run
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


@pytest.mark.parametrize(("fanout", "size", "most"), [(2, 4, 2), (2, 5, 3), (64, 4, 0)])
def test_a_tree_of_groups_says_and_saves_what_one_group_does(fanout, size, most, tmp_path):
    """Four ranks as two nodes of two, five as two and a half: three levels."""
    arguments = {"fanout": fanout, "folder": str(tmp_path)}
    result = ranks.run("test_exchange:over_a_tree", size, **arguments)
    in_order = [{"rank": r} for r in range(size)]
    assert result["levels"] == most
    assert result["gathered"] == result["to_main"] == [in_order, in_order]
    assert result["dealt"] == [[f"for {r}", f"for {r}"] for r in range(size)]
    assert result["reduced"] == [[["0", "1", "2", "3", "4"][:size]] * 2] * size
    assert result["main"] == [["a", 0.1]] * size
    assert result["errors"] == [f"UserError {size - 2}: is lost; restore it."] * size
    assert result["union"] == [["a", r, "m"] for r in range(size)]
    assert result["connected"] <= (size - 1 if fanout > size else (fanout - 1) * most)
    assert result["loaded"] == result["saved"]
    assert result["damaged"] == [f"{tmp_path}/checkpoints/step-00000003/rank-00001.safetensors"]


# Inside the ranks.


def over_a_tree(fanout: int, folder: str) -> dict:
    engine_ranks.FANOUT = fanout
    engine = small.build(3, "adamw", "fp32", None, seed=1)
    world = engine.world
    before = _connections()
    background = world.in_background("saves")
    connected = max(world.gather(_connections() - before))
    both, value = (world, background), {"rank": world.rank}
    run = Run(folder)
    state = lambda: [f.data.tolist() for f in owned_fragments(engine)]  # noqa: E731
    saved = state()
    writer.write(run, 1, writer.Snapshot.of(engine, Position(3, 24, 0), {}), background)
    for fragment in owned_fragments(engine):
        fragment.data.zero_()
    writer.load(newest_complete(run, print, world), engine)
    file = run.checkpoint_path(3) / "rank-00001.safetensors"
    values = [f"for {rank}" for rank in range(world.size)] if world.is_main else None
    texts = lambda every: [*map(str, every)]  # noqa: E731
    result = {
        "levels": len(world.tree.levels) if world.tree else 0,
        "gathered": [each.gather(value) for each in both],
        "to_main": [each.gather_to_main(value) for each in both],
        "dealt": world.gather([each.dealt(values) for each in both]),
        "reduced": world.gather([each.reduce_on_main(world.rank, texts) for each in both]),
        "main": world.gather(world.from_main(lambda: ("a", world.rank + 0.1))),
        "errors": world.gather(_first_of_two(background)),
        "union": sorted(
            world.union_in_background(LostMember)(frozenset({LostMember("a", world.rank, "m")}))
        ),
        "connected": connected,
        "saved": world.gather(saved),
        "loaded": world.gather(state()),
    }
    world.from_main(lambda: file.write_bytes(file.read_bytes()[:-1]))
    faults = find_faults(file.parent, world)
    world.close()
    return {**result, "damaged": [fault.partition(":")[0] for fault in faults]}


def _connections() -> int:
    every = psutil.Process().net_connections("inet")
    return sum(c.status == "ESTABLISHED" for c in every)


def _first_of_two(ranks) -> str:
    """What all hear where the last two ranks fail."""

    def work():
        if ranks.rank >= ranks.size - 2:
            raise UserError(str(ranks.rank), "is lost", "restore it")

    try:
        ranks.together(work)
    except UserError as e:
        return f"UserError {e}"
    return ""


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
