"""Scenarios on real ranks: states that one mesh saves and another loads."""

from pathlib import Path

from forescale.checkpoint import writer
from forescale.checkpoint.reader import Checkpoint, Position
from forescale.run.directory import Run
from tests.distributed.jobs import steps_of
from tests.distributed.sequence_scenarios import build

STATE = "checkpoints/step-00000002"


def carry(cases, folder, known):
    """In an engine of every case: two steps, a save and two steps, or, where other ranks saved it,
    a step on other data. Then load whatever is saved and this case has not loaded, save it again,
    and make two steps: one engine for all, each load replacing what was trained since the last.

    cases: [name, sequence ranks, stage, more overrides]. known: what was returned so far. Returns
    the rows of the last two steps by "case" or "case<source".
    """
    folder, losses = Path(folder), {}
    for name, near, *case in cases:
        engine = build(case, near)
        if name in known:
            steps_of(engine, [7])
        else:
            steps_of(engine, [0, 1])
            _save(engine, folder / "first" / name)
            losses[name] = steps_of(engine, [2, 3])
        for source in sorted(known | losses):
            key = f"{name}<{source}"
            if "<" in source or key in known:
                continue
            writer.load(Checkpoint(folder / "first" / source / STATE), engine)
            _save(engine, folder / "again" / key)
            losses[key] = steps_of(engine, [2, 3])
    return losses


def _save(engine, path):
    snapshot = writer.Snapshot.of(engine, Position(2, 16, 0), {})
    writer.write(Run(path), 1, snapshot, engine.world)
