"""What a query sees where padding hides keys, and positions."""

import math

import pytest
import torch

from forescale.models.mixers.masks import visible_keys
from tests.models.variants import L, build, tokens


def test_no_query_is_left_without_a_key():
    """What a kernel makes of a softmax over nothing (0 or NaN) must not matter."""
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0]])
    visible = visible_keys(mask, None)[:, 0].int().tolist()
    assert visible[0] == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert visible[1] == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]


def test_sinusoids_are_the_papers():
    """Vaswani et al. 2017, sections 3.4 and 3.5, written out."""
    model = build("sinusoidal", "rmsnorm", "gelu", "none", None)
    visible = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: visible.append(args[0]))
    x = tokens(1, L)
    model(x)
    for t in range(L):
        for i in range(8):
            angle = t / 10_000 ** (2 * i / 16)
            even, odd = model.embedding.weight[x[0, t], 2 * i : 2 * i + 2] * 16**0.5
            assert abs(visible[0][0, t, 2 * i] - even - math.sin(angle)) < 1e-5
            assert abs(visible[0][0, t, 2 * i + 1] - odd - math.cos(angle)) < 1e-5


def test_only_learned_positions_end_and_say_so():
    with pytest.raises(ValueError, match="max_sequence_length = 17"):
        build("learned", "rmsnorm", "gelu", "none", None)(tokens(1, L + 6))
    for position in ("rotary", "alibi", "sinusoidal", "none"):
        build(position, "rmsnorm", "gelu", "none", None)(tokens(1, L + 6))
