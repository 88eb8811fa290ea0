"""Changes to a run's files, as time or a fault would make them."""

import json
import os
import time
from contextlib import contextmanager

from forescale.ground.storage import write_json
from forescale.run.directory import Run
from forescale.run.rows import read_rows


def age_by(run: Run, seconds: float):
    """Move all files back in time."""
    for path in run.path.rglob("*"):
        if not path.is_symlink():
            os.utime(path, (path.stat().st_mtime - seconds,) * 2)


@contextmanager
def changed_rows(run: Run):
    """The rows of a run's history, written again when they were changed."""
    rows = read_rows(run.metrics)
    yield rows
    run.metrics.resolve().write_text("".join(json.dumps(row) + "\n" for row in rows))


def say_how_it_went(attempt, code, how="so", spans=10.0):
    """As our launcher does."""
    begun = time.time() - spans
    facts = {"begun": begun, "command": [], "host": "a", "processes": 2}
    write_json(
        attempt.path / "launch.json", facts | {"ended": time.time(), "code": code} | {"how": how}
    )
