"""What runs inside the ranks of test_state.py."""

from pathlib import Path

from forescale.checkpoint import writer
from forescale.checkpoint.reader import Checkpoint, Position
from forescale.run.directory import Run
from tests.distributed import small


def _name(case) -> str:
    return "-".join(map(str, case))


def save(cases, folder):
    """Train three steps and save, for each case; then three steps more. Returns those losses."""
    return {_name(case): _save(case, Path(folder)) for case in cases}


def _save(case, folder):
    engine = small.build(*case[:3], None, case[3], seed=1)
    small.train(engine, range(3))
    run = Run(folder / f"{_name(case)}-w{engine.world.size}")
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
            writer.load(Checkpoint(Path(folder) / source / "checkpoints/step-00000003"), engine)
            key = f"{_name(case)}-w{engine.world.size}<{source}"
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
            writer.load(Checkpoint(Path(folder) / source / "checkpoints/step-00000003"), engine)
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
