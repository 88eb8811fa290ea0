"""The section `outer`: when members exchange, and which configs are refused."""

import pytest

from forescale.config.compose import compose
from forescale.config.schema import ConfigError
from forescale.config.train import TrainJob

GOOD = ["outer.every='6 steps'", "outer.store=/shared/run", "outer.members=[south,north]"]
GOOD += ["outer.member=north", "model.num_layers=4"]


def outer(*overrides):
    return compose(TrainJob, [*GOOD, *overrides]).outer


def test_members_are_numbered_by_name_and_one_cluster_is_no_member():
    assert (outer().index, outer().count) == (0, 2)
    assert (outer("outer.member=south").index, outer().count) == (1, 2)
    alone = compose(TrainJob, []).outer
    assert (alone.index, alone.count, alone.due(500, 500)) == (0, 1, ())


def test_every_fragment_is_exchanged_as_often_and_all_at_the_end():
    whole, parts = outer(), outer("outer.fragments=4")
    assert [s for s in range(30) if whole.due(s, 29)] == [6, 12, 18, 24, 29]
    due = {step: parts.due(step, 20) for step in range(22) if parts.due(step, 20)}
    assert due == {
        **{1: (0,), 3: (1,), 4: (2,), 6: (3,), 7: (0,), 9: (1,), 10: (2,), 12: (3,)},
        **{13: (0,), 15: (1,), 16: (2,), 18: (3,), 19: (0,), 20: (0, 1, 2, 3)},
    }


def test_a_result_that_would_come_with_the_last_exchange_or_after_it_is_left_to_it():
    late = outer("outer.overlap='4 steps'")
    due = [step for step in range(1, 30) if late.due(step, 29)]
    assert due == [6, 12, 18, 24, 29]
    assert [late.applied(step, 29) for step in due] == [10, 16, 22, 28, 29]
    assert [step for step in range(1, 29) if late.due(step, 28)] == [6, 12, 18, 28]


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["outer.every=null"], "outer.every"),
        (["outer.every='10 %'"], "outer.every"),
        (["outer.store=null"], "outer.store"),
        (["outer.store=runs/store"], "outer.store"),
        (["outer.store=https://example.org/run"], "outer.store"),
        (["outer.store=memory://run"], "outer.store"),
        (["outer.store=~nobody/run"], "outer.store"),
        (["outer.members=[north]"], "outer.members"),
        (["outer.members=[north,north]"], "outer.members"),
        (["outer.members=[north,a/b]"], "outer.members"),
        (["outer.members=[north,North]"], "outer.members"),
        (["outer.members=[north,decision]"], "outer.members"),
        (["outer.members=[north,north-joins]"], "outer.members"),
        (["outer.members=[north,north-needs]"], "outer.members"),
        (["outer.member=west"], "outer.member"),
        (["outer.member=null"], "outer.member"),
        (["outer.fragments=7"], "outer.fragments"),
        (["outer.fragments=5"], "outer.fragments"),
        (["outer.overlap='6 steps'"], "outer.overlap"),
        (["outer.overlap='3 steps'", "outer.fragments=2"], "outer.overlap"),
        (["outer.overlap='1 %'"], "outer.overlap"),
        (
            ["model.mlp=moe", "model.mlp.scores=sigmoid", "model.mlp.bias_speed=0.001"],
            "model.mlp.bias_speed",
        ),
    ],
)
def test_what_can_not_be_is_refused(overrides, key):
    with pytest.raises(ConfigError) as caught:
        outer(*overrides)
    assert key in [problem.key for problem in caught.value.problems]
