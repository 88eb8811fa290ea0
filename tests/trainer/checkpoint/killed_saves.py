"""Saves that are killed: `python killed_saves.py FOLDER KILLS SEED` at random moments, or with
KILLS = changes at every change to the file system in turn.

A child saves state after state through the product's own code and is killed with SIGKILL; after
each kill the parent looks at what lies on the disk, and the next child goes on from there, as
another attempt. What is looked at is said in `Witness`. Prints a JSON object of counts.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from itertools import count
from pathlib import Path

import torch

from forescale.checkpoint import writer
from forescale.checkpoint.choice import newest_complete
from forescale.checkpoint.retention import Keep
from forescale.checkpoint.saver import Saver
from forescale.ground.storage import check_table
from forescale.run.directory import Run
from forescale.run.rows import read_rows
from tests.trainer import plain_engine as plain

KEEP = 2
# Of the audit hook of Python; `open` counts where it is for writing.
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.symlink")


def never(kind, **facts):
    raise AssertionError(f"{kind}: {facts}")


def train(run: Run, steps: int, pipe: int) -> None:
    """One attempt, of `steps` saves; writes each step to the pipe `pipe` when its save begins: when
    the one before it has been published."""
    attempt = run.new_attempt()
    newest = newest_complete(run, passed_over)
    first = newest.position.step if newest else 0
    attempt.start_from(plain.Parent(first), run)
    engine = plain.engine()
    if newest:
        writer.load(newest, engine)

    def facts() -> dict:
        os.write(pipe, f"{step}\n".encode())
        return {}

    saver = Saver(run, attempt, engine, facts, Keep(KEEP))
    for step in range(first + 1, first + 1 + steps):
        plain.set_step(engine, step)
        attempt.metrics.add({"kind": "train", "step": step})
        saver.begin(plain.position(step))
    saver.finish()


def passed_over(kind, **facts):
    """Off the trajectory there may be some; damaged there is none."""
    assert kind == "checkpoint_passed_over", (kind, facts)


class Witness:
    """Judges a run directory after a kill, and how much of every kind of moment was met."""

    def __init__(self, run: Run):
        self.run, self.newest = run, 0
        self.met: Counter[str] = Counter()

    def look(self, begun: int) -> None:
        """begun: the last step whose save was begun; 0 for none of this child's."""
        run, names = self.run, self.run.checkpoint_steps()
        for step in names:  # whatever has a name is whole, counted or not
            assert check_table(run.checkpoint_path(step)) == [], step
        newest = newest_complete(run, passed_over)
        step = plain.step_in(newest) if newest else 0
        allowed = {begun, begun - 1} if begun else {self.newest}
        assert step in allowed, f"{step} is the newest, {begun} was begun, {self.newest} before"
        rows = [row["step"] for row in read_rows(run.metrics)]
        assert rows[:step] == list(range(1, step + 1)), "a checkpoint knows of a step without row"
        left = [p.name for p in run.checkpoints.glob(".*")] if run.checkpoints.exists() else []
        # One attempt's: the next one sweeps before it writes.
        assert len(left) <= 2, left
        self.met["published" if step == begun else "not published"] += bool(begun)
        self.met["before the first save"] += not begun
        self.met.update(name.rpartition(".")[2] for name in left)
        self.newest = step


def undisturbed(child: int, pipe) -> str:
    return ""


def attempt(run: Run, steps: int, end=undisturbed, hook=None) -> tuple[int, bool]:
    """A child that trains until `end` kills it, or it is done: (the last step whose save was begun,
    whether it was killed). end: gets its id and what it says, and returns what it has read of that.
    """
    read, write = os.pipe()
    if not (child := os.fork()):
        os.close(read)
        if hook:
            sys.addaudithook(hook)
        try:
            train(run, steps, write)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(write)
    with open(read) as pipe:
        words = end(child, pipe).split()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        words += pipe.read().split()
    assert status in (0, -signal.SIGKILL), status
    return (int(words[-1]) if words else 0), status != 0


def at_random(folder: Path, kills: int, seed: int) -> Counter[str]:
    rng, run = random.Random(seed), Run(folder / "run")
    run.path.mkdir()
    witness = Witness(run)

    def end(child: int, pipe) -> str:
        first = pipe.readline() if rng.random() < 0.9 else ""  # until it saves, but for some
        time.sleep(rng.uniform(0.0, 0.05))
        os.kill(child, signal.SIGKILL)
        return first

    for _ in range(kills):
        begun, killed = attempt(run, 10_000, end)
        assert killed
        witness.look(begun)
        if len(run.attempts()) > 50:  # or judging lineage takes all the time
            forget_old_attempts(run)
    attempt(run, 3)
    assert not list(run.checkpoints.glob(".*")), "leftovers stay"
    assert len(run.checkpoint_steps()) == KEEP
    witness.met["steps"] = witness.newest
    return witness.met


def forget_old_attempts(run: Run) -> None:
    for old in run.attempts()[:-1]:
        if not any(old.number == c.attempt for c in kept_rows(run)):
            shutil.rmtree(old.path)


def kept_rows(run: Run) -> list:
    return [writer.Checkpoint(run.checkpoint_path(s)) for s in run.checkpoint_steps()]


def at_every_change(folder: Path) -> Counter[str]:
    """Of an attempt that sweeps, replaces what doesn't count, publishes and deletes."""
    base = Run(folder / "base")
    base.path.mkdir()
    attempt(base, 4)
    # A later attempt from step 2 on: what is beyond no longer counts, and its names are in the way.
    plain.begin(base, 2)
    engine = plain.engine()
    plain.set_step(engine, 2)
    plain.write_checkpoint(base, 2, plain.position(2), engine)
    (base.checkpoints / ".step-00000009.attempt-0001.stage").mkdir()
    total: Counter[str] = Counter()
    for kills in count():
        run = Run(folder / "run")
        shutil.rmtree(run.path, ignore_errors=True)
        shutil.copytree(base.path, run.path, symlinks=True)
        calls = count()

        def hook(event, args, calls=calls, kills=kills):
            writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if (event in CHANGES or writes) and next(calls) == kills:
                os.kill(os.getpid(), signal.SIGKILL)

        witness = Witness(run)
        witness.newest = 2
        begun, killed = attempt(run, 5, hook=hook)
        witness.look(begun)
        total.update(witness.met)
        if not killed:
            total["changes"] = kills
            return total
        before = witness.newest
        attempt(run, 3)
        newest = newest_complete(run, passed_over)
        assert newest is not None
        assert plain.step_in(newest) == before + 3
        assert not list(run.checkpoints.glob(".*")), "leftovers stay"


if __name__ == "__main__":
    torch.set_num_threads(1)  # forked children must find no pool of threads
    plain.engine()  # imports what each of them would import anew
    folder = Path(sys.argv[1])
    met = (
        at_every_change(folder)
        if sys.argv[2] == "changes"
        else at_random(folder, int(sys.argv[2]), int(sys.argv[3]))
    )
    print(json.dumps(met))
