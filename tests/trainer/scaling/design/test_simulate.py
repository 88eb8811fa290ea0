"""The interval that a design would give, from simulated studies."""

from dataclasses import replace

import numpy as np
import pytest

from forescale.ground.errors import UserError
from forescale.models.config import ModelConfig
from forescale.scaling.config import PlanKeys, StudyJob, TargetPoint
from forescale.scaling.design.kinds import isoflop_plan, ladder_plan
from forescale.scaling.design.shapes import Common
from forescale.scaling.design.simulate import Assumptions, RunSet, expected

COMMON = Common(ModelConfig(depth=12), 50_304, 2048, micro_batch=32, rate=4e14)
CAP = 1e21


@pytest.fixture(scope="module")
def design():
    return RunSet.of(isoflop_plan(StudyJob(plan=PlanKeys(CAP)), COMMON))


@pytest.fixture(scope="module")
def target():
    return RunSet.of_target(COMMON, TargetPoint(flops=1e21))


@pytest.mark.slow  # hundreds of fits
def test_the_interval_covers_as_often_as_its_level(design, target):
    precision = expected(design, target, draws=100)
    assert precision.coverage[0.9] == pytest.approx(0.9, abs=0.08)
    assert precision.coverage[0.5] == pytest.approx(0.5, abs=0.13)
    assert precision.failed == 0
    assert precision.half[0.5] < precision.half[0.9] < 0.1


def test_the_simulation_is_reproducible(design, target):
    assert expected(design, target, draws=5) == expected(design, target, draws=5)
    assert expected(design, target, draws=5) != expected(design, target, draws=5, seed=1)


@pytest.mark.slow  # four simulated designs
def test_noise_and_distance_widen_the_interval(design, target):
    def half(**changed):
        return expected(design, target, Assumptions(**changed), draws=15)

    calm, rough = half(), half(noise=1e-2)
    assert rough.without_discrepancy[0.9] > 2 * calm.without_discrepancy[0.9]
    assert rough.half[0.9] > calm.half[0.9]
    near = expected(design, RunSet.of_target(COMMON, TargetPoint(flops=2e20)), draws=15)
    assert near.extrapolation_factor < calm.extrapolation_factor
    assert near.half[0.9] < calm.half[0.9]


@pytest.mark.slow  # simulated studies
def test_without_discrepancy_only_noise_is_left(design, target):
    assumed = Assumptions(discrepancy=0.0, noise=1e-4, floor=1e-4, gap=0.0)
    precision = expected(design, target, assumed, draws=10)
    assert precision.error < 1e-3
    assert precision.without_discrepancy[0.9] < 5e-3
    assert precision.coverage[0.9] == 1


def test_seed_noise_fades_to_its_floor():
    noise = Assumptions().seed_noise(np.array([1e13, 1e18, 1e21, 1e30]))
    assert (np.diff(noise) < 0).all()
    assert noise[1] == pytest.approx(2e-3)
    assert noise[-1] == 5e-4


def test_a_ladder_without_budgets_is_simulated_too():
    keys = PlanKeys(1e22, ladder=[1e7, 2e7, 4e7, 8e7, 1.6e8], multiples=[0.5, 1, 2, 4])
    plan = ladder_plan(StudyJob(plan=keys), COMMON)
    design = RunSet.of(plan)
    assert design.budgets is None
    assert len(design.flops) == 20
    precision = expected(
        design, RunSet.of_target(COMMON, TargetPoint(flops=10 * design.flops.max())), draws=10
    )
    assert precision.extrapolation_factor == pytest.approx(10)
    assert 0 < precision.half[0.5] < precision.half[0.9] < 0.2


def test_a_target_can_be_given_in_three_ways():
    one = RunSet.of_target(COMMON, TargetPoint(flops=1e21))
    assert one.tokens / one.parameters == pytest.approx(20, rel=0.1)
    assert RunSet.of_target(
        COMMON, TargetPoint(device_hours=1e21 / 4e14 / 3600)
    ).flops == pytest.approx(1e21)
    two = RunSet.of_target(
        COMMON, TargetPoint(parameters=float(one.parameters[0]), tokens=float(one.tokens[0]))
    )
    assert two.flops == pytest.approx(1e21, rel=1e-6)
    for wrong in ({}, {"parameters": 1e9}, {"flops": 1e21, "tokens": 1e9}):
        with pytest.raises(UserError, match="names no run"):
            RunSet.of_target(COMMON, TargetPoint(**wrong))
    with pytest.raises(UserError, match="names no run"):
        RunSet.of_target(replace(COMMON, rate=None), TargetPoint(device_hours=5.0))


def test_too_few_runs_are_refused(design, target):
    few = RunSet(design.parameters[:4], design.tokens[:4], design.flops[:4])
    with pytest.raises(UserError, match="can't determine the law"):
        expected(few, target)
    one = np.full(6, 1e8)
    line = RunSet(one, np.geomspace(1e9, 1e10, 6), 6 * one * np.geomspace(1e9, 1e10, 6))
    with pytest.raises(UserError, match="draws"):
        expected(line, target, draws=3)
