"""One dataset, one maker: who may build at an output, and whether what stands there is what is
asked for.

Invariant: at most one process builds at an output; and a dataset is taken for the one that is asked
for only where it was made from an equal request.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from forescale.data.dataset import Dataset
from forescale.data.progress import Progress, say
from forescale.errors import UserError


@contextmanager
def held(output: Path, progress: Progress) -> Iterator[None]:
    """Held by one process at a time; the kernel lets go when its holder dies, however it does."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output.parent / f".{output.name}.lock", "wb") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(progress, f"{output}: another process builds it; waiting for that")
            fcntl.flock(f, fcntl.LOCK_EX)
        yield


def expect_same(output: Path, request: dict[str, Any]) -> None:
    """Raises UserError where the dataset at `output` was built from another request."""
    have = Dataset(output).manifest["build"]
    if differing := [key for key in request if have.get(key) != request[key]]:
        what = f"holds a dataset that was built otherwise ({', '.join(differing)} differ)"
        raise UserError(str(output), what, "choose another output, or remove it")
