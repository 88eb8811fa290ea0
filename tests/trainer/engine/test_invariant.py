"""Sums that don't depend on their order, beside exact fractions."""

import math
from fractions import Fraction
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from forescale.engine.invariant import Grid
from forescale.engine.ranks import ALONE

ELEMENTS = 3
FLOATS = st.floats(-(2.0**60), 2.0**60, width=32) | st.floats(-1, 1, width=32)
ADVERSARIAL = st.sampled_from([0.0, -0.0, 1e30, -1e30, 1e-38, 2.0**-149, 1 / 3, 1 + 2.0**-23])
GRADIENTS = st.lists(
    st.lists(FLOATS | ADVERSARIAL, min_size=ELEMENTS, max_size=ELEMENTS), min_size=1, max_size=9
)


def new(dtype=torch.float32):
    param = nn.Parameter(torch.zeros(ELEMENTS, dtype=dtype))
    param.grad_dtype = torch.float32
    return param, Grid([param], torch.device("cpu"))


def step(param, grid, gradients, order=None, starts=()):
    """The sum of the gradients of micro-batches, in an order, by ranks that begin at `starts`."""
    grid.begin(len(gradients))
    param.grad, parts, losses = None, [], torch.zeros(len(gradients))
    for i, number in enumerate(order or range(len(gradients))):
        if i in starts and param.grad is not None:
            parts.append(param.grad)
            param.grad = None
        (param * torch.tensor(gradients[number], dtype=param.dtype)).sum().backward()
        losses[number] = 1 / (1 + number)
    total = sum(parts, param.grad)
    count = len(gradients)
    sums = grid.sums([(param, total)], losses, slice(count), count, ALONE)
    return total, sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(gradients=GRADIENTS, data=st.data())
def test_order_and_ranks_change_no_bit_and_the_error_has_a_bound(dtype, gradients, data):
    param, grid = new(dtype)
    largest = torch.tensor(gradients).to(dtype).float().abs().max().item()
    total, sums = step(param, grid, gradients)
    if not sums.fits:  # nothing is known before the first step
        total, sums = step(param, grid, gradients)
    assert sums.fits
    bits, norm, exponents = total.view(torch.int32).tolist(), sums.norm, list(grid.exponents)

    order = data.draw(st.permutations(range(len(gradients))))
    starts = data.draw(st.sets(st.integers(1, len(gradients))))
    again, sums = step(param, grid, gradients, order, starts)
    assert sums.fits
    assert grid.exponents == exponents
    assert again.view(torch.int32).tolist() == bits
    assert sums.norm == norm

    exact = [sum(map(Fraction, column)) for column in zip(*rows(gradients, dtype), strict=True)]
    unit = 2.0 ** (math.ceil(math.log2(len(gradients))) - 24) * 8 * max(largest, 2.0**-102)
    for value, expected in zip(total.tolist(), exact, strict=True):
        assert abs(Fraction(value) - expected) <= len(gradients) * Fraction(unit) / 2
    square = sum(Fraction(value) ** 2 for value in total.tolist())
    assert abs(Fraction(norm) ** 2 - square) <= square * Fraction(2) ** -50


def rows(gradients, dtype):
    return torch.tensor(gradients).to(dtype).double().tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_losses_of_many_micro_batches_are_one_exact_sum(bad):
    _, grid = new()
    losses = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 1e5
    losses[:3] = torch.tensor([3e38, -3e38, 2.0**-149])
    sums = partial(grid.sums, [], slots=slice(7, 2007), count=20_000, ranks=ALONE)
    assert sums(losses=losses).losses == [math.fsum(losses.tolist())]
    losses[5] = bad
    assert math.isnan(sums(losses=losses).losses[0])


def test_a_gradient_that_grows_is_computed_again_and_bounds_shrink_slowly():
    param, grid = new()
    assert not step(param, grid, [[1.0, 0.5, 0.0]])[1].fits  # bounds begin at nothing
    assert step(param, grid, [[1.0, 0.5, 0.0]])[1].fits
    assert step(param, grid, [[4.0, 0.5, 0.0]])[1].fits
    assert not step(param, grid, [[300.0, 0.5, 0.0]])[1].fits
    total, sums = step(param, grid, [[300.0, 0.5, 0.0]])
    assert sums.fits
    assert total.tolist() == [300.0, 0.5, 0.0]
    before = grid.exponents[0]
    for halvings in range(1, 4):
        step(param, grid, [[1e-3, 0.0, 0.0]])
        assert grid.exponents[0] == before - halvings


def test_a_gradient_that_is_not_finite_has_no_finite_norm_and_leaves_the_bounds():
    param, grid = new()
    step(param, grid, [[1.0, 2.0, 3.0]])
    before = list(grid.exponents)
    for value in (math.nan, math.inf, -math.inf):
        sums = step(param, grid, [[1.0, value, 3.0], [1.0, 1.0, 1.0]])[1]
        assert sums.fits
        assert not math.isfinite(sums.norm)
        assert grid.exponents == before
    names = {param: "weight"}
    other_param, other = new()
    other.restore({other_param: "weight"}, grid.bounds(names))
    assert other.exponents == before
