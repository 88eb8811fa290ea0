"""The outer weights of a rank: saved, and loaded again whatever the rank has of them."""

import torch

from forescale.checkpoint import writer
from forescale.checkpoint.reader import Checkpoint
from forescale.engine.layout import Unit
from forescale.engine.outer import OuterState
from forescale.run.directory import Run
from tests.trainer import plain_engine


def engine(step):
    one = plain_engine.engine()
    plain_engine.set_step(one, step)
    one.outer = OuterState(one)
    return one


def test_outer_weights_are_loaded_where_a_unit_is_padding_alone(tmp_path):
    """As of a small group of parameters divided among many ranks."""
    run = Run(tmp_path)
    path = plain_engine.write_checkpoint(
        run, plain_engine.begin(run).number, plain_engine.position(3), engine(3)
    )
    other = engine(5)
    units = [*other.layout.units(), Unit(0, torch.zeros(2), [])]
    other.layout.units = lambda: iter(units)
    writer.load(Checkpoint(path), other, False)
    for unit in units[:-1]:
        assert set(other.outer.states(unit)["outer_weight"].tolist()) == {3.0}
