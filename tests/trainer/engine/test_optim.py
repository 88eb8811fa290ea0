from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forescale.config.duration import Duration
from forescale.config.sections.optimizer import OPTIMIZERS, AdamWConfig, MuonConfig
from forescale.config.sections.schedule import ConstantConfig, CosineConfig, WsdConfig
from forescale.engine import optim
from forescale.engine.optim import build_optimizer, decay_multiplier, parameter_groups, waves
from forescale.ground.errors import UserError
from forescale.models.parametrization import Factors

TOKENS = 2048


@st.composite
def schedules(draw):
    """(schedule, total steps) that keep the schedule's rules."""
    total = draw(st.integers(2, 400))
    warmup = draw(st.integers(0, total - 1))
    decay, final = Duration(draw(st.integers(0, total - warmup))), draw(st.floats(0, 1))
    start = Duration(warmup)
    kinds = [WsdConfig(start, final, decay), CosineConfig(start, final), ConstantConfig(start)]
    return draw(st.sampled_from(kinds)), total


def curve(schedule, total):
    return [rate(schedule, t, total) for t in range(total)]


def rate(schedule, step, total):
    lengths = (schedule.warmup, schedule.decay_length)
    return schedule.rate(step, total, *(n.steps(TOKENS, total) for n in lengths if n))


def test_muon_orthogonalises_the_matrix_of_each_expert():
    flops = OPTIMIZERS["muon"].matrices.flops
    assert flops((5, 8, 6)) == 5 * flops((8, 6)) != flops((8, 30))


@given(schedules())
def test_a_fraction_of_the_peak_that_is_reached_and_never_left_upwards(case):
    schedule, total = case
    rates = curve(schedule, total)
    top = max(range(total), key=rates.__getitem__)
    assert all(0 <= r <= 1 for r in rates)
    assert rates[0] > 0
    assert all(a <= b for a, b in pairwise(rates[: top + 1]))
    assert all(a >= b for a, b in pairwise(rates[top:]))


@given(schedules())
def test_no_jump(case):
    schedule, total = case
    warmup = schedule.warmup.steps(TOKENS, total)
    length = schedule.decay_length
    decay = length.steps(TOKENS, total) if length else total - warmup
    # a cosine falls at most pi/2 times as fast as the line between its ends
    steepest = max(1 / max(1, warmup), 1.571 / max(1, decay))
    rates = curve(schedule, total)
    assert all(abs(a - b) <= steepest + 1e-9 for a, b in pairwise(rates))


@given(st.integers(0, 50), st.floats(0, 100), st.integers(100, 500), st.integers(0, 5000))
def test_a_longer_wsd_has_the_same_past(warmup, percent, total, steps):
    schedule = WsdConfig(Duration(warmup), decay=Duration(percent, "percent"))
    stable = total - schedule.decay.steps(TOKENS, total)
    for step in range(max(0, stable) + 1):
        before = rate(schedule, step, total)
        assert before == rate(schedule, step, total + steps) or step < warmup


def test_weight_decay_falls_in_a_line_or_stays():
    falls = AdamWConfig(final_weight_decay=0.2)
    values = [decay_multiplier(falls, t, 100) for t in (0, 50, 99, 100, 120)]
    assert values == pytest.approx([1, 0.6, 0.208, 0.2, 0.2])
    assert {decay_multiplier(AdamWConfig(), t, 100) for t in range(100)} == {1.0}


def test_the_shapes():
    wsd = WsdConfig(Duration(10), decay=Duration(50, "percent"))
    assert curve(wsd, 100)[:11] == [(t + 1) / 10 for t in range(10)] + [1.0]
    assert curve(wsd, 100)[50:52] == [1.0, 0.98]
    assert curve(wsd, 100)[99] == pytest.approx(0.02)
    assert rate(wsd, 100, 100) == 0
    cosine = CosineConfig(Duration(10 * TOKENS, "tokens"), final=0.1)
    assert rate(cosine, 55, 100) == pytest.approx(0.55)
    assert rate(cosine, 100, 100) == pytest.approx(0.1)
    assert rate(cosine, 120, 100) == pytest.approx(0.1)


SHAPES = {
    "embedding.weight": 2,
    "position.weight": 2,
    "blocks.0.attention.query.weight": 2,
    "blocks.0.attention.query.bias": 1,
    "blocks.0.attention_norm.weight": 1,
    "blocks.0.mlp.up.weight": 2,
    "norm.weight": 1,
    "head.weight": 2,
}
NAMED = [(name, SimpleNamespace(shape=(2,) * n)) for name, n in SHAPES.items()]
MUON = MuonConfig(adam_learning_rate=0.004)


def names(groups):
    return {g.name: g.names for g in groups}


def test_adamw_decays_matrices_alone():
    decayed, undecayed = parameter_groups(NAMED, AdamWConfig(weight_decay=0.1))
    assert (decayed.weight_decay, undecayed.weight_decay) == (0.1, 0)
    assert undecayed.names == [
        "position.weight",
        "blocks.0.attention.query.bias",
        "blocks.0.attention_norm.weight",
        "norm.weight",
    ]
    assert len(decayed.names) + len(undecayed.names) == len(NAMED)
    assert not decayed.update.is_by_matrix


def test_tables_and_scalars_may_have_rates_of_their_own_with_any_optimizer():
    """Without these keys the groups are those of before."""
    rates = {"learning_rate": 0.003, "table_learning_rate": 0.03, "scalar_learning_rate": 0.01}
    hidden = ["blocks.0.attention.query.weight", "blocks.0.mlp.up.weight"]
    for config, first in ((AdamWConfig(**rates), "decayed"), (MuonConfig(**rates), "muon")):
        groups = {g.name: g for g in parameter_groups(NAMED, config)}
        assert names(groups.values()) == {
            first: hidden,
            "decayed_tables": ["embedding.weight", "head.weight"],
            "undecayed_tables": ["position.weight"],
            "undecayed_scalars": [n for n, dimensions in SHAPES.items() if dimensions == 1],
        }
        values = {name: g.peak_learning_rate for name, g in groups.items()}
        tables = {"decayed_tables": 0.03, "undecayed_tables": 0.03}
        assert values == {first: 0.003, **tables, "undecayed_scalars": 0.01}
    half = MuonConfig(adam_learning_rate=0.04, **rates).scaled(0.5)
    assert (half.learning_rate, half.other_rates) == (0.0015, {
        "adam_learning_rate": 0.02, "table_learning_rate": 0.015, "scalar_learning_rate": 0.005,
    })  # fmt: skip


def test_muon_takes_hidden_matrices_and_adamw_the_rest():
    groups = parameter_groups(NAMED, MUON)
    assert names(groups)["muon"] == ["blocks.0.attention.query.weight", "blocks.0.mlp.up.weight"]
    assert names(groups)["decayed"] == ["embedding.weight", "head.weight"]
    assert "position.weight" in names(groups)["undecayed"]
    assert [g.peak_learning_rate for g in groups] == [0.02, 0.004, 0.004]
    assert [g.update.is_by_matrix for g in groups] == [True, False, False]
    assert all(len(g.params) == len(g.names) for g in groups)


@pytest.mark.parametrize(
    "name", ["transformer.wte.weight", "lm_head.weight", "embed_tokens.weight"]
)
def test_other_people_s_names_of_tables(name):
    groups = parameter_groups([(name, SimpleNamespace(shape=(2, 2)))], MUON)
    assert names(groups) == {"decayed": [name]}


def test_a_model_says_which_are_muon_s():
    groups = parameter_groups(NAMED, MUON, muon_names={"head.weight"})
    assert names(groups)["muon"] == ["head.weight"]
    for wrong in ("norm.weight", "typo.weight"):
        with pytest.raises(UserError, match=wrong):
            parameter_groups(NAMED, MUON, muon_names={wrong})


def test_classes_of_a_parametrisation_are_groups_of_their_own():
    factors = {name: Factors("norm" if "norm" in name else "table") for name, _ in NAMED}
    factors["position.weight"] = Factors("table", 1, 7, 0.5)
    for name in SHAPES:
        if name.startswith("blocks."):
            factors[name] = Factors("block", 0.5, 2, 0.25)
    adamw = AdamWConfig(learning_rate=0.004, weight_decay=0.1, eps=1e-8)
    groups = parameter_groups(NAMED, adamw, factors=factors)
    values = {g.name: (g.peak_learning_rate, g.weight_decay, g.eps) for g in groups}
    assert list(values) == [
        "decayed_table",
        "decayed_block",
        "undecayed_table",
        "undecayed_block",
        "undecayed_norm",
    ]
    assert values["decayed_table"] == (0.004, 0.1, 1e-8)
    assert values["decayed_block"] == (0.002, 0.2, 0.25e-8)
    assert values["undecayed_table"] == (0.004, 0, 0.5e-8)
    assert values["undecayed_block"] == (0.002, 0, 0.25e-8)
    assert sorted(n for g in groups for n in g.names) == sorted(SHAPES)
    muon, *rest = parameter_groups(NAMED, MUON, factors=factors)
    plain, *_ = parameter_groups(NAMED, MUON)
    assert muon == plain
    assert "decayed_block" not in names(rest)


@pytest.mark.slow  # imports DeepSpeed
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_group_s_own_eps_reaches_its_optimizer(kind):
    from torch import nn

    model = nn.ModuleDict({"head": nn.Linear(2, 3), "up": nn.Linear(2, 3)})
    factors = {"head.weight": Factors("head", epsilon=0.5)}
    settings = MUON if kind == "muon" else AdamWConfig()
    groups = parameter_groups(model.named_parameters(), settings, factors=factors)
    optimizer = build_optimizer(settings, [g.as_dict() for g in groups])
    values = {g["name"]: g["eps"] for g in optimizer.param_groups if not g["use_muon"]}
    assert values["decayed_head"] == 0.5e-8
    assert values["undecayed"] == 1e-8


def test_frozen_parameters_are_left_out():
    frozen = SimpleNamespace(shape=(2, 2), requires_grad=False)
    groups = parameter_groups([*NAMED, ("old.weight", frozen)], MUON, {"old.weight"})
    assert all("old.weight" not in group.names for group in groups)


def test_agrees_with_the_model_s_own_word():
    from forescale.models import ModelConfig, Transformer

    sizes = {"num_layers": 1, "width": 64, "vocab_size": 64, "max_sequence_length": 8}
    for position in ("learned", "rotary"):
        model = Transformer(ModelConfig(**sizes, position=position))
        by_rule = parameter_groups(model.named_parameters(), MUON)
        by_model = parameter_groups(model.named_parameters(), MUON, model.muon_parameters())
        assert names(by_rule) == names(by_model)


def test_matrices_are_spread_with_the_larger_first_and_no_more_than_fit(monkeypatch):
    monkeypatch.setattr(optim, "WHOLE", 40)  # 20 elements of 2 bytes
    params = [SimpleNamespace(shape=shape) for shape in [(2, 2), (3, 4), (2, 2), (4, 3), (2, 5)]]
    assert list(waves(params, 2, 2)) == [[[3], [1]], [[4, 2], [0]]]
    assert list(waves(params, 4, 2)) == [[[3, 2], [1], [4], [0]]]
    assert list(waves(params[1:2], 2, 4)) == [[[0], []]]
