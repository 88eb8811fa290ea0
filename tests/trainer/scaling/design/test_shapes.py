"""Wanted sizes become models of one family: near, and in the same order."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forescale.ground.errors import UserError
from forescale.models.config import ModelConfig
from forescale.models.flops import count
from forescale.scaling.design.shapes import Common, Family, Rule, overrides, trend
from forescale.scaling.records.records import SIZES

PLAIN = ModelConfig(depth=12)
HEADS = {"num_heads", "num_kv_heads"}
TINY = ModelConfig(width=128, num_layers=3, num_heads=2)  # heads of 64, as PLAIN
GROUPED = ModelConfig(
    mlp="gelu", num_layers=12, width=768, num_heads=12, num_kv_heads=6, mlp_width=3072, bias=True
)
FAMILIES = {
    (size, vocab): Family(PLAIN, vocab, 256, size) for size in SIZES for vocab in (256, 512)
}


@given(st.sampled_from(list(FAMILIES)), st.floats(math.log(7e4), math.log(7e9)))
def test_the_nearest_model_is_within_15_percent_over_five_decades(which, log_n):
    """Measured on a grid: at most 15 %, and at most 3 % from 1e8 on."""
    shape = FAMILIES[which].solve(math.exp(log_n))
    assert abs(shape.error) < 0.15
    assert shape.parameters == getattr(count(shape.model), which[0])
    assert not shape.model.problems(which[1], 256)


@settings(max_examples=40)  # of some 10 ms for each size
@given(st.sampled_from(list(FAMILIES)), st.lists(st.floats(11.2, 22.0), min_size=2, max_size=4))
def test_a_larger_wanted_size_never_gives_a_smaller_model(which, logs):
    sizes = [FAMILIES[which].solve(math.exp(x)).parameters for x in sorted(logs)]
    assert sizes == sorted(sizes)


@given(st.floats(math.log(1e5), math.log(1e10)))
def test_shapes_follow_the_trend_in_whole_heads(log_n):
    s = FAMILIES["blocks_and_head", 512].solve(math.exp(log_n)).model.sizes
    assert abs(s.num_layers - trend(s.width)) <= 2
    assert s.head_dim in (8, 16, 32, 64)
    assert s.width == s.num_heads * s.head_dim
    assert s.head_dim == 64 or s.width < 8 * 64
    assert 8 / 3 <= s.mlp_width / s.width < 8 / 3 + s.head_dim / s.width


def test_the_trend_goes_through_both_ends_of_its_source():
    assert trend(768) == 12
    assert trend(12_288) == pytest.approx(96)


def test_tiny_models_of_a_tiny_vocabulary():
    shape = Family(TINY, 256, 64).series(np.geomspace(5e4, 1e6, 8))
    assert max(abs(s.error) for s in shape) < 0.13
    assert all(s.model.sizes.num_layers <= 5 for s in shape)


def test_the_ratios_of_the_base_model_are_kept():
    s = Family(GROUPED, 50_304, 1024, "non_embedding").solve(2e8).model.sizes
    assert s.num_heads == 2 * s.num_kv_heads
    assert s.head_dim == 64
    assert s.mlp_width == 4 * s.width
    wide = ModelConfig(width=1024, num_layers=8, num_heads=8)
    assert Family(wide, 50_304, 1024, "total").solve(1e9).model.sizes.head_dim == 128
    twice = replace(wide, num_heads=16, head_dim=128)  # heads together twice as wide as the model
    for size in (3e6, 1e9):
        s = Family(twice, 512, 1024, "total").solve(size).model.sizes
        assert s.heads_width == 2 * s.width


def test_overrides_turn_the_base_model_into_the_shape():
    shape = Family(TINY, 512, 256, "total").solve(3e6).model
    assert "model.head_dim" not in overrides(shape)
    named = {name.removeprefix("model."): value for name, value in overrides(shape).items()}
    assert ModelConfig(**named).resolved(512, 256) == shape


def test_the_sizes_of_parts_that_the_model_lacks_are_no_overrides():
    """`train` refuses keys without an effect, and so would refuse such a cell."""
    experts = replace(TINY, mlp="moe")
    for base, lacks in ((TINY, set()), (experts, set()), (replace(TINY, mixer="mingru"), HEADS)):
        model = Family(base, 512, 256, "total").solve(3e6).model
        assert HEADS - {key.removeprefix("model.") for key in overrides(model)} == lacks
        assert overrides(model)["model.mlp_width"] == model.mlp_width


def test_impossible_sizes_are_refused():
    with pytest.raises(UserError, match="vocab_size"):
        Family(PLAIN, None, 256)
    with pytest.raises(UserError, match="no convention"):
        Family(PLAIN, 512, 256, "none-such")
    with pytest.raises(UserError, match="smaller vocabulary"):
        Family(PLAIN, 50_304, 256, "total").solve(1e5)
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UserError, match="no size"):
            Family(PLAIN, 512, 256, "total").solve(wrong)
    with pytest.raises(UserError, match="the same model"):
        Family(PLAIN, 512, 256).series([1e6, 1.001e6])
    with pytest.raises(UserError, match="comes after"):
        Family(PLAIN, 512, 256).series([1e6, 1e5])
    with pytest.raises(UserError, match="mlp_width"):
        Family(ModelConfig(mlp_width=100), 512, 256)


@pytest.mark.parametrize("cost", ["causal", "full", "6nd"])
def test_the_centre_spends_the_budget_at_twenty_tokens_a_parameter(cost):
    common = Common(PLAIN, 512, 256, cost=cost)
    for budget in (1e13, 1e16, 1e19):
        shape = common.family.solve(common.centre(budget))
        tokens = budget / common.per_token(shape.model)[cost]
        assert tokens / shape.parameters == pytest.approx(20, rel=0.25)


def test_the_rule_has_the_numbers_of_its_source_within_its_bounds():
    rule = Rule()
    assert rule.batch(1e11) == pytest.approx(0.58 * 1e11**0.571)
    assert rule.batch(10) == rule.bounds[0]
    assert rule.learning_rate(1e9, 1e11) == pytest.approx(1.79 * 1e9**-0.713 * 1e11**0.307)
    assert rule.learning_rate(1e4, 1e9) == rule.highest
    assert rule.covers(1e9, 1e10)
    assert not rule.covers(1e6, 1e10)


def test_nearest_returns_each_small_shape_once():
    family = Family(TINY, 257, 256)
    sizes = [s.parameters for s in family.nearest([5e3, 8.3e3, 9e3, 1.4e4, 2.5e4])]
    assert sizes == sorted(set(sizes))
    assert len(sizes) == 4, "8,300 and 9,000 have the same nearest shape"
    with pytest.raises(UserError, match="no model has about"):
        family.solve(8.3e3)
