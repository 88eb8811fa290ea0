"""The self-check: how often it calls a healthy device faulty, and that it finds what is faulty.

Real ranks: tests/distributed/test_selfcheck.py.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from forescale.engine.selfcheck import REPLAYS, Finding, SelfCheck, deviations, fault_of, judged
from forescale.models import ModelConfig, Transformer
from tests.trainer.plain_engine import World

CHECKS, PAST = 100_000, 8
DRAWS = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "laplace": lambda rng, shape: rng.laplace(size=shape),
    "t3": lambda rng, shape: rng.standard_t(3, shape),
}


@pytest.mark.parametrize("kind", DRAWS)
def test_a_healthy_check_fails_less_than_once_in_10_000(kind):
    """Of replays and the step's own loss, without a floor, at a run's first check and later ones;
    the noise may grow threefold between two."""
    rng = np.random.default_rng(7)
    noise = torch.from_numpy(DRAWS[kind](rng, (CHECKS, REPLAYS + 1, 1)))
    gaps = deviations(1 + 1e-9 * noise)
    first = judged(gaps, gaps[:, :0], 0.0)[1]
    before = gaps.sort(-1).values[:, gaps.shape[-1] // 2].view(-1, PAST)
    later = judged(3 * gaps[: len(before)], before.roll(1, 0), 0.0)[1]
    assert float(first.double().mean()) < 1e-4
    assert float(later.double().mean()) < 1e-4
    # Why not the difference of two replays, at a run's first check, and ten times that: of runs of
    # 100 checks many would halt.
    pairs = (noise[::2, 0] - noise[1::2, 0]).abs().view(-1, 100)
    assert float((pairs[:, 1:].amax(1) > 10 * pairs[:, 0]).double().mean()) > 0.15


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("wrong", [1, 3])
def test_replays_that_stand_out_are_found(kind, wrong):
    """Up to three, by 2,000 times the noise; or all with much more noise than before."""
    noise = torch.from_numpy(DRAWS[kind](np.random.default_rng(8), (2_000, REPLAYS, 32)))
    noise[:, :wrong, 5] += 20_000.0
    gaps = deviations(1 + 1e-6 * noise)
    assert float(judged(gaps, gaps[:, :0], 0.0)[1].double().mean()) > 0.99
    gaps = deviations(1 + 1e-3 * noise[:, wrong:])
    assert judged(gaps, torch.full((2_000, 4), 1e-7, dtype=torch.float64), 1e-5)[1].all()


def test_rounding_is_no_fault_and_its_floor_hides_no_large_one():
    """Replays that are equal but for a rare rounding have no usual deviation at all."""
    values = torch.ones(9, 3, dtype=torch.float64)
    values[4, 1] += 2**-8
    none = torch.zeros(0, dtype=torch.float64)
    assert not judged(deviations(values), none, 2**-6)[1]
    assert judged(deviations(values), none, 2**-9)[1]
    values[4, 1] = torch.nan
    assert judged(deviations(values), none, 2**-6)[1]
    values[:, 1] = torch.nan
    assert not judged(deviations(values), none, 2**-6)[1], "the loss is NaN: no device's fault"


class Checked:
    """A model, and the self-check of a rank that trains it. `disturb`: called with the number of
    each forward pass of it, and returns what the losses are multiplied by."""

    def __init__(self, exact: bool, dtype=torch.float32, disturb=lambda call: 1.0):
        torch.manual_seed(0)
        sizes = dict(num_layers=2, width=32, num_heads=2, vocab_size=50, max_sequence_length=16)
        self.model = Transformer(ModelConfig(**sizes)).to(dtype)
        self.calls, self.disturb = 0, disturb
        self.model.register_forward_hook(self._forward)
        names = {p: name for name, p in self.model.named_parameters()}
        engine = SimpleNamespace(
            world=World(),
            module=self.model,
            names=names,
            seed_for=lambda *_: None,
            combined=lambda losses, micro: (losses, 0.0, {}),
            pipeline=None,
        )
        self.check = SelfCheck(engine, "here", exact)
        tokens = torch.randint(50, (2, 17), generator=torch.Generator().manual_seed(1))
        self.micro = SimpleNamespace(
            index=0, arguments=lambda device: ((tokens[:, :-1], tokens[:, 1:]), {})
        )

    def _forward(self, model, tokens, losses):
        self.calls += 1
        return losses * self.disturb(self.calls)

    def __call__(self) -> str | None:
        """Make the step's forward pass, then check it."""
        (positional, _) = self.micro.arguments(None)
        loss = self.model(*positional).sum().detach().float()
        batch = SimpleNamespace(step=0, micro=[self.micro])
        return self.check(batch, loss[None])


def noisy(scale: float):
    rng = np.random.default_rng(3)
    return lambda call: 1 + scale * float(rng.standard_t(3))


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float32, 0.0), (torch.float32, 1e-6), (torch.bfloat16, 1e-4)]
)
def test_a_run_whose_kernels_have_no_order_is_healthy(dtype, scale):
    checked = Checked(False, dtype, noisy(scale))
    assert [checked() for _ in range(5)] == [None] * 5
    assert checked.calls == 5 * (REPLAYS + 1)
    assert checked.check.tolerance <= 0.5


@pytest.mark.parametrize(
    ("dtype", "scale", "bit"),
    [(torch.float32, 1e-6, 30), (torch.float32, 1e-6, 28), (torch.bfloat16, 1e-4, 14)],
)
@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_flipped_upper_bit_of_a_weight_is_found_in_a_noisy_run(dtype, scale, bit, at):
    """In the second check, before the step's own pass or a replay, and only until the next."""
    flipped, checked = REPLAYS + 1 + at, Checked(False, dtype, noisy(scale))
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    weight = checked.model.blocks[0].mlp.down.weight.detach().view(-1).view(bits)

    def flip(module, inputs):
        if checked.calls + 1 in (flipped, flipped + 1):
            weight[3] ^= 1 << bit  # in this pass, and back in the next

    checked.model.register_forward_pre_hook(flip)
    assert checked() is None
    fault = checked()
    assert fault is not None
    assert fault.startswith("rank 0 on here: a micro-batch computed again differs by ")


def test_an_exact_run_tolerates_no_bit_and_says_so_at_the_first_check():
    checked = Checked(True, disturb=lambda call: 1 + 2**-23 * (call == 2))
    assert "differs by" in checked()
    assert checked() is None
    assert checked.calls == 2 * 3, "two replays are enough"
    assert checked.check.tolerance == 0.0
    assert Checked(True, disturb=lambda call: torch.nan)() is None, "no device's fault"


def test_a_rank_with_another_weight_is_named_whatever_its_kernels_promise():
    """The smallest bit of one of its weights."""
    ranks = [Checked(exact=False) for _ in range(3)]
    weight = ranks[1].model.blocks[1].mixer.value.weight.detach().view(-1).view(torch.int32)
    weight[7] ^= 1
    findings = [
        Finding(rank, "here", None, checked.check._weights_hash())
        for rank, checked in enumerate(ranks)
    ]
    assert fault_of(findings) == "rank 1 on here: its weights differ from the others'"


@pytest.mark.parametrize("kind", [0, 1])
def test_weights_that_ranks_divide_are_compared_among_those_that_have_the_same(kind):
    """Of 2 that divide matrices and 3 that divide experts: a place in one is none in the other."""
    healthy = [
        Finding(rank, "here", None, 5, ((2, rank % 2, 7 + rank % 2), (3, rank % 3, rank % 3)))
        for rank in range(12)
    ]
    assert fault_of(healthy) is None
    hashes = list(healthy[3].divided_weights)
    hashes[kind] = (*hashes[kind][:2], 90)
    damaged = replace(healthy[3], divided_weights=tuple(hashes))
    findings = [*healthy[:3], damaged, *healthy[4:]]
    assert fault_of(findings) == "rank 3 on here: its weights differ from the others'"
