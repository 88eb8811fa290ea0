"""Scenarios on real ranks: states that one mesh saves and another loads."""

from pathlib import Path

from forescale.checkpoint import writer
from forescale.checkpoint.reader import Checkpoint, Position
from forescale.run.directory import Run
from tests.distributed.sequence_scenarios import batch, build

STATE = "checkpoints/step-00000002"


def carry(cases, folder, saves):
    """Load what is in `folder` already into an engine of every case, that has trained on other
    weights; save it again, and make two steps. With `saves` also: two steps, a save, two steps.

    cases: [name, sequence ranks, stage, more overrides]. Returns the rows of the two steps by
    "case" or "case<source".
    """
    folder, found = Path(folder), {}
    sources = sorted(path.name for path in (folder / "first").glob("*"))
    for name, near, *case in cases:
        for source in sources:
            engine = build(case, near)
            _steps(engine, [7])
            writer.load(Checkpoint(folder / "first" / source / STATE), engine)
            _save(engine, folder / "again" / f"{name}<{source}")
            found[f"{name}<{source}"] = _steps(engine, [2, 3])
        if saves:
            engine = build(case, near)
            _steps(engine, [0, 1])
            _save(engine, folder / "first" / name)
            found[name] = _steps(engine, [2, 3])
    return found


def _save(engine, path):
    snapshot = writer.Snapshot.of(engine, Position(2, 16, 0), {})
    writer.write(Run(path), 1, snapshot, engine.world)


def _steps(engine, steps):
    world, rows = engine.world, []
    for step in steps:
        data = batch(step, world.data.rank, world.data.size)
        facts = engine.train_step(data, 1.0)
        nats = world.sum(facts.losses.double().sum())
        rows.append([float(nats) / data.targets, facts.grad_norm])
    return rows
