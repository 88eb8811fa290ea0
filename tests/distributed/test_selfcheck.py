"""The self-check on real ranks: it changes nothing, finds what is wrong, and names the rank."""

import os

import pytest
import torch

from forescale.engine.selfcheck import SelfCheck
from tests.distributed import ranks, small

pytestmark = pytest.mark.distributed
CASES = [
    [0, "muon", "bf16"],
    [1, "adamw", "fp32"],
    [2, "muon", "bf16"],
    [3, "adamw", "bf16"],
]


def test_the_self_check_does_not_change_the_training():
    results = ranks.run("test_selfcheck:trained", 2, cases=CASES)
    for case, (checked, alone, faults, tolerance) in zip(CASES, results, strict=True):
        assert faults == [None] * 3, case
        assert tolerance == 0.0, case
        assert checked == alone, case


def test_the_rank_that_computes_wrong_is_named():
    weights = "rank 2 on here: its weights differ from the others'"
    replay = "rank 2 on here: a micro-batch computed again differs"
    cases = {(1, "weight"): weights, (0, "weight"): weights, (2, "loss"): replay,
             (1, "compute"): replay}  # fmt: skip
    faults = ranks.run("test_selfcheck:corrupt", 3, cases=[*cases])
    for (case, sentence), fault in zip(cases.items(), faults, strict=True):
        assert sentence in fault, case


# Inside the ranks.


def trained(cases):
    """For each case: losses and norms of some steps with self-checks and without; the results of
    the checks, and their tolerance."""
    return [_trained(*case) for case in cases]


def _trained(stage: int, optimizer: str, precision: str) -> list:
    losses, faults = [], []
    for checks in (True, False):
        engine = small.build(stage, optimizer, precision)
        check = SelfCheck(engine, "here", exact=True)

        def before_update(batch, step_losses, check=check):
            faults.append(check(batch, step_losses))

        losses.append([])
        for step in range(6):
            data = small.batch(step, engine.world.rank, engine.world.size)
            extra = {"before_update": before_update} if checks and step % 2 else {}
            facts = engine.train_step(data, 1.0, **extra)
            losses[-1].append([facts.losses.tolist(), facts.grad_norm])
        if checks:
            tolerance = check.tolerance
    return [*losses, faults, tolerance]


def corrupt(cases):
    """For each [stage, problem], the result of the self-check after something went wrong on the
    last rank."""
    return [_corrupt(*case) for case in cases]


def _corrupt(stage: int, problem: str) -> str | None:
    engine = small.build(stage, "adamw", "bf16")
    check, last = SelfCheck(engine, "here", exact=True), int(os.environ["WORLD_SIZE"]) - 1
    faults: list[str | None] = []

    def before_update(batch, losses):
        if batch.step and engine.world.rank == last:
            if problem == "weight":
                flip(next(p for p in engine.names if p.dim() == 2))
            elif problem == "loss":
                losses = losses * (1 + 1e-4)
            elif problem == "compute":
                wrong_now_and_then(engine)
        faults.append(check(batch, losses))

    for step in range(2):
        data = small.batch(step, engine.world.rank, engine.world.size)
        engine.train_step(data, 1.0, before_update=before_update)
    assert faults[0] is None
    return faults[1]


@torch.no_grad()
def flip(weight: torch.Tensor) -> None:
    """Flip one bit of one element, the smallest possible fault."""
    weight.view(-1).view(torch.int16)[5] ^= 1


def wrong_now_and_then(engine) -> None:
    """Act as a device that computes every second product wrong."""
    calls = iter(range(1000))
    engine.module.register_forward_hook(
        lambda module, arguments, losses: losses * (1 + 1e-3 * (next(calls) % 2))
    )
