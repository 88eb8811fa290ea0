"""The depth rule, and one sentence for each thing that cannot be built."""

import subprocess
import sys

import pytest

from forescale.models import ModelConfig
from forescale.models.mixers.mingru import MinGRU
from forescale.models.mixers.window import Window
from forescale.models.mlps.dense import SquaredReLU
from tests.models.configs import model_config

MUP = {"parametrization": "completep"}


def sizes(**args):
    c = model_config(**args).resolved(vocab_size=100, sequence_length=32)
    return c.num_layers, c.width, c.num_heads, c.num_kv_heads, c.mlp_width


def test_depth_sets_every_size():
    assert sizes(depth=12, mlp="gelu") == (12, 768, 12, 12, 3072)  # GPT-2 small
    assert sizes(depth=12) == (12, 768, 12, 12, 2048)  # swiglu: 8/3 of the width
    assert sizes(depth=1) == (1, 64, 1, 1, 192)  # 170.7, up to a multiple of 64
    assert sizes(num_layers=3, width=128) == (3, 128, 2, 2, 384)


def test_what_is_given_overrides_the_rule():
    assert sizes(depth=4, width=128, mlp="relu2") == (4, 128, 2, 2, 512)
    assert sizes(depth=4, num_layers=2, num_heads=8, num_kv_heads=2, mlp_width=80) == (
        (2, 256, 8, 2, 80)
    )


def test_heads_may_be_together_wider_or_narrower_than_the_model():
    s = model_config(depth=2, head_dim=32, vocab_size=9, max_sequence_length=8).sizes
    assert (s.num_heads, s.heads_width, s.width) == (4, 128, 128)
    wider = model_config(depth=2, num_heads=3, head_dim=64, vocab_size=9, max_sequence_length=8)
    assert (wider.sizes.heads_width, wider.sizes.kv_width) == (192, 192)


def test_the_datas_numbers_fill_in():
    config = model_config(depth=2).resolved(vocab_size=4096, sequence_length=256)
    assert (config.vocab_size, config.max_sequence_length) == (4096, 256)
    assert config.resolved() == config
    alone = model_config(depth=2, vocab_size=5000, max_sequence_length=512)
    assert alone.resolved(4096, 256).vocab_size == 5000
    assert alone.resolved(4096, 256).max_sequence_length == 512
    with pytest.raises(ValueError, match=r"model\.vocab_size"):
        model_config(depth=2).resolved(sequence_length=256)


@pytest.mark.parametrize(
    ("args", "field"),
    [
        ({}, "depth"),
        ({"width": 64}, "depth"),
        ({"depth": 0}, "depth"),
        ({"depth": 2, "num_heads": 3}, "num_heads"),
        ({"depth": 2, "width": 100}, "num_heads"),
        ({"depth": 2, "width": 9, "num_heads": 3}, "num_heads"),  # rotary: heads of 3
        ({"depth": 2, "num_kv_heads": 3}, "num_kv_heads"),
        ({"depth": 2, "head_dim": 48}, "num_heads"),  # no whole number of them
        ({"depth": 2, "num_heads": 3, "head_dim": 7}, "head_dim"),  # rotary: heads of 7
        ({"depth": 2, "head_dim": 0}, "head_dim"),
        ({"depth": 2, "width": 15, "num_heads": 3, "position": "sinusoidal"}, "width"),
        ({"depth": 2, "norm__placement": "before"}, "norm.placement"),
        ({"depth": 2, "mixer__qk_norm": "all"}, "mixer.qk_norm"),
        ({"depth": 2, "activation_checkpointing": "half"}, "activation_checkpointing"),
        ({"depth": 2, "position": "relative", "position__buckets": 7}, "position.buckets"),
        ({"depth": 2, "position": "relative", "position__distance": 16}, "position.distance"),
        ({"depth": 2, "position": "relative", "mixer": "mingru"}, "position"),
        (
            {"depth": 2, "parametrization": "completep", "norm__placement": "residual"},
            "norm.placement",
        ),
        ({"depth": 2, "dropout": 1.0}, "dropout"),
        ({"depth": 2, "norm__eps": 0.0}, "norm.eps"),
        ({"depth": 2, "z_loss": -1.0}, "z_loss"),
        ({"depth": 2, "init_std": 0.0}, "init_std"),
        ({"depth": 2, **MUP, "parametrization__base_width": 0}, "parametrization.base_width"),
        ({"depth": 2, **MUP, "parametrization__base_depth": 0}, "parametrization.base_depth"),
        ({"depth": 2, "vocab_size": 100}, "vocab_size"),  # the tokenizer below has 200
        ({"depth": 2, "max_sequence_length": 8}, "max_sequence_length"),
    ],
)
def test_each_problem_names_its_field(args, field):
    config = model_config(**args)
    got = config.problems(vocab_size=200, sequence_length=16)
    assert [problem[0] for problem in got] == [field]
    with pytest.raises(ValueError, match=rf"^model\.{field}: .*; .*\.$"):
        config.resolved(vocab_size=200, sequence_length=16)


def test_all_problems_are_told_at_once():
    config = model_config(depth=2, position__theta=-1.0, norm__eps=0.0, dropout=2.0)
    fields = [problem[0] for problem in config.problems()]
    assert fields == ["dropout", "position.theta", "norm.eps"]
    assert model_config(depth=2).problems() == []


def test_a_part_is_a_word_a_block_or_itself():
    blocks = [Window(window=8), {"kind": "window", "window": 8}]
    assert [ModelConfig(depth=2, mixer=block).mixer for block in blocks] == [Window(window=8)] * 2
    config = ModelConfig(depth=2, mlp="relu2", mixer_pattern=["mingru", blocks[1]])
    assert [config.mlp, *config.mixer_pattern] == [SquaredReLU(), MinGRU(), Window(window=8)]
    with pytest.raises(ValueError, match=r"'mish'; choose from swiglu, .*relu2"):
        ModelConfig(depth=2, mlp="mish")


def test_reading_a_config_does_not_load_torch():
    code = "import sys, forescale.models, forescale.models.memory; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
