"""Causality and padding, for every combination of the architecture's choices."""

import math

import pytest
import torch

from forescale.models.mixers.masks import visible_keys
from forescale.models.positions.kinds import POSITIONS
from tests.models.variants import VARIANTS, L, V, build, named, tokens


@pytest.mark.parametrize("variant", VARIANTS, ids=named)
def test_the_future_never_changes_a_past_logit(variant):
    model = build(*variant)
    x = tokens(1, L).repeat(L, 1)
    changed = x.clone()
    changed[torch.arange(L), torch.arange(L)] = (x[0] + 1) % V  # row t differs at position t
    with torch.no_grad():
        difference = (model(x) - model(changed)).abs().amax(-1)
    past = torch.ones(L, L, dtype=torch.bool).tril(-1)
    assert difference[past].max() == 0
    assert difference.diagonal().min() > 1e-3  # and the present does change


@pytest.mark.parametrize("variant", VARIANTS, ids=named)
def test_a_padded_row_equals_the_unpadded_one(variant):
    model = build(*variant)
    row, junk, pad = tokens(1, L), tokens(3, L + 5)[1:], 5
    batch = torch.cat((junk, junk[:1]))  # left-padded, right-padded, full
    batch[0, pad:], batch[1, :L] = row[0], row[0]
    mask = torch.ones(3, L + pad, dtype=torch.bool)
    mask[0, :pad] = mask[1, L:] = False
    targets = batch.roll(-1, 1).masked_fill(~mask, -100)
    targets[0, -1] = targets[1, L - 1] = -100
    expected_targets = row.roll(-1, 1)
    expected_targets[0, -1] = -100

    logits, expected = model(batch, padding_mask_BL=mask), model(row)
    for real in (logits[0, pad:], logits[1, :L]):
        torch.testing.assert_close(real, expected[0], rtol=1e-5, atol=1e-5)

    def gradients(*args):
        losses = model(*args)
        got = torch.autograd.grad(losses[:1].sum(), list(model.parameters()), allow_unused=True)
        return losses[:1], got

    loss, expected_gradients = gradients(row, expected_targets)
    for side in (0, 1):
        order = [side, 1 - side, 2]
        padded_loss, got = gradients(batch[order], targets[order], mask[order])
        torch.testing.assert_close(padded_loss, loss, rtol=1e-5, atol=1e-5)
        for local, peer in zip(got, expected_gradients, strict=True):
            torch.testing.assert_close(local, peer, rtol=1e-3, atol=1e-4)


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


def test_order_matters_with_positions():
    """Without positions a single layer sees a set; each encoding tells the orders apart."""
    x = tokens(1, L)
    swapped = x[:, [1, 0, *range(2, L)]]
    for position in POSITIONS:
        model = build(position, "rmsnorm", "gelu", "none", None)
        del model.blocks[1:]
        with torch.no_grad():
            difference = (model(x) - model(swapped))[:, -1].abs().max()
        assert (difference < 1e-5) == (position == "none")
