"""Checkpoints on real ranks: saved at one stage, world size, precision, loaded at any other.

9 launches; FORESCALE_MATRIX=full takes every case at every world size.
"""

import itertools
from pathlib import Path

import pytest
import torch

from forescale.checkpoint import writer
from forescale.checkpoint.reader import Checkpoint, Position
from forescale.engine.state import MOMENTUM
from forescale.run.directory import Run
from tests.distributed import ranks, small
from tests.matrix import FULL

STATE = "checkpoints/step-00000003"
SIZES = (1, 2, 4)
OPTIMIZERS = ("adamw", "muon")
LIMIT = 5400 if FULL else 280  # seconds of a launch
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(4 * LIMIT)]

CASES = [
    [stage, optimizer, precision, offload]
    for stage, optimizer, precision in itertools.product(range(4), OPTIMIZERS, ("fp32", "bf16"))
    for offload in ((False, True) if stage == 2 or stage == 3 else (False,))
]


def chosen(size: int) -> list[list]:
    """The cases at a world size: at 2 all, for there all that is new is in the case; else the new
    thing is how states are cut, so one a stage and optimizer, the precisions in turns."""
    if FULL or size == 2:
        return CASES
    return [c for c in CASES if not c[3] and (c[2] == "bf16") == (c[0] + len(c[1])) % 2]


def name(case) -> str:
    return "-".join(map(str, case))


def met(cases, sources, size: int) -> list:
    """Each case with itself and every second source, in turns; with all where a stage has one case.
    So every stage meets the saves of every stage and world size."""
    pairs = []
    for i, case in enumerate(cases):
        name_here = f"{name(case)}-w{size}"
        every = [
            s for s in sources if FULL or s == name_here or (size != 2 and not s.endswith("w2"))
        ]
        pairs.append((case, [s for j, s in enumerate(sources) if s in every or (i + j) % 2 == 0]))
    return pairs


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, the losses of the three steps after each save, by case and world size)"""
    folder, after = tmp_path_factory.mktemp("states"), {}
    for size in SIZES:
        losses = ranks.run("test_state:save", size, LIMIT, cases=chosen(size), folder=str(folder))
        after |= {f"{case}-w{size}": case_losses for case, case_losses in losses.items()}
    return folder, after


def test_the_chosen_cases_have_every_pair_of_stages_and_every_value():
    for size in SIZES:
        of = {o: [c for c in chosen(size) if c[1] == o] for o in OPTIMIZERS}
        assert all({c[0] for c in cases} == {0, 1, 2, 3} for cases in of.values())
        assert {c[2] for cases in of.values() for c in cases} == {"fp32", "bf16"}
    saves = [f"{name(c)}-w{size}" for size in SIZES for c in chosen(size)]
    for optimizer, size in itertools.product(OPTIMIZERS, SIZES):
        cases = [c for c in chosen(size) if c[1] == optimizer]
        sources = [source for source in saves if f"-{optimizer}-" in source]
        pairs = {(c[0], s[0], s[-1]) for c, of in met(cases, sources, size) for s in of}
        assert pairs == set(itertools.product(range(4), "0123", "124"))


@pytest.mark.parametrize(("optimizer", "size"), list(itertools.product(OPTIMIZERS, SIZES)))
def test_a_checkpoint_loads_anywhere(saved, optimizer, size):
    """Saved at 1, 2 and 4 ranks, at any stage and precision, with and without offload."""
    folder, continued = saved
    cases = [c for c in chosen(size) if c[1] == optimizer]
    sources = [source for source in continued if f"-{optimizer}-" in source]
    pairs = met(cases, sources, size)
    losses = ranks.run("test_state:load", size, LIMIT, pairs=pairs, folder=str(folder))
    assert len(losses) == sum(len(of) for _, of in pairs)
    for key, after in losses.items():
        target, source = key.split("<")
        assert_same_state(folder / source / STATE, folder / "again" / key / STATE, target)
        if target == source:  # the same numerics: bit for bit
            assert after == continued[source], key
        else:
            expected = torch.tensor(continued[source])[:, 0]
            torch.testing.assert_close(torch.tensor(after)[:, 0], expected, rtol=5e-3, atol=0)


def assert_same_state(before, after, target):
    """Equal element by element; what a bf16 engine keeps only in bf16 is rounded once."""
    old, new = Checkpoint(before), Checkpoint(after)
    assert new.shapes == old.shapes
    assert new.state["counters"]["optimizer_steps"] == old.state["counters"]["optimizer_steps"]
    for parameter in old.shapes:
        states = sorted(old.reader.states(parameter))
        assert sorted(new.reader.states(parameter)) == states
        for state in states:
            x, y = old.tensor(parameter, state), new.tensor(parameter, state)
            rounded = "bf16" in target and (state == MOMENTUM or parameter in ("frozen", "offset"))
            assert torch.equal(y, x) or (rounded and torch.equal(y, x.bfloat16().float()))


def test_moments_matter(saved):
    """The oracle of the test above can fail: without the moments the next losses differ."""
    folder, continued = saved
    source = "1-adamw-fp32-False"
    after = ranks.run(
        "test_state:load_weights",
        2,
        case=[1, "adamw", "fp32", False],
        source=f"{source}-w2",
        folder=str(folder),
    )
    assert after[0] == continued[f"{source}-w2"][0]
    assert after[1] != continued[f"{source}-w2"][1]


HAS_FP16 = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_fp16_supported()


@pytest.mark.skipif(not HAS_FP16, reason="this CPU doesn't compute in fp16")
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_loss_scale_goes_from_fp16_to_fp16_alone(tmp_path, stage):
    """In a bf16 engine a stored scale of 65,536 was taken for DeepSpeed's own check of overflows:
    a step with a NaN gradient was applied."""
    scales = ranks.run("test_state:between_precisions", 1, stage=stage, folder=str(tmp_path))
    lowered = scales["fp16"]
    assert scales["bf16"] == 1.0 < lowered
    for case in ("bf16<fp16", "bf16<bf16"):
        assert scales[case][0] == 1.0
    assert scales["fp16<fp16"][0] == lowered
    scale, fresh, *_ = scales["fp16<bf16"]
    assert scale == fresh > lowered
    for case in ("bf16<fp16", "bf16<bf16", "fp16<fp16", "fp16<bf16"):
        assert scales[case][2:] == [False, True], case


# Inside the ranks.


def save(cases, folder):
    """Train three steps and save, for each case; then three steps more. Returns those losses."""
    return {name(case): _save(case, Path(folder)) for case in cases}


def _save(case, folder):
    engine = small.build(*case[:3], None, case[3], seed=1)
    small.train(engine, range(3))
    run = Run(folder / f"{name(case)}-w{engine.world.size}")
    writer.write(run, 1, writer.Snapshot.of(engine, Position(3, 24, 0), {}), engine.world)
    return small.train(engine, range(3, 6))


def load(pairs, folder):
    """Load sources into an engine of each case, that has trained on other weights; save it again;
    then three steps. pairs: (case, its sources). Returns the losses by "case<source"."""
    results = {}
    for case, sources in pairs:
        engine = small.build(*case[:3], None, case[3], seed=2)
        small.train(engine, range(10, 12))
        for source in sources:
            writer.load(Checkpoint(Path(folder) / source / STATE), engine)
            key = f"{name(case)}-w{engine.world.size}<{source}"
            run = Run(Path(folder) / "again" / key)
            writer.write(run, 1, writer.Snapshot.of(engine, Position(3, 24, 0), {}), engine.world)
            results[key] = small.train(engine, range(3, 6))
    return results


def load_weights(case, source, folder):
    engine = small.build(*case[:3], None, case[3], seed=2)
    path = Path(folder) / source / "checkpoints/step-00000003"
    writer.load(Checkpoint(path), engine, weights_only=True)
    return small.train(engine, range(3, 6))


def between_precisions(stage, folder):
    """Save an fp16 engine whose loss scale has been lowered by overflows, and a bf16 one; load each
    into the other kind and into its own. Returns by "target<source" the scale, whether a step
    without a finite gradient was applied, and whether one with a finite one was."""
    scales = {}
    for kind in ("fp16", "bf16"):
        engine = small.build(stage, "adamw", kind, seed=1)
        small.train(engine, range(2))
        for step in (2, 3, 4) if kind == "fp16" else ():
            poisoned(engine, step)
        run = Run(Path(folder) / kind)
        writer.write(run, 1, writer.Snapshot.of(engine, Position(3, 24, 0), {}), engine.world)
        scales[kind] = engine.layout.loss_scale
    for target in ("fp16", "bf16"):
        for source in ("fp16", "bf16"):
            engine = small.build(stage, "adamw", target, seed=2)
            fresh = engine.layout.loss_scale
            writer.load(Checkpoint(Path(folder) / source / STATE), engine)
            scale = engine.layout.loss_scale
            scales[f"{target}<{source}"] = [scale, fresh, poisoned(engine, 6), applied(engine, 7)]
    return scales


def applied(engine, step):
    world = engine.world
    return engine.train_step(small.batch(step, world.rank, world.size), 1.0).applied


def poisoned(engine, step):
    engine.disturb = lambda step, module: float("nan")
    try:
        return applied(engine, step)
    finally:
        engine.disturb = None
