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


def load(cases, sources, folder):
    """Load every source into an engine of every case, that has trained on other weights; save it
    again; then three steps. Returns the losses by "case<source"."""
    results = {}
    for case in cases:
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
