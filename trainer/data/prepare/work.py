"""The work directory of a build, `.NAME.building/` beside the output NAME, and the lock of an
output.

    request.json    request, inputs and package versions of the build
    curated/ hashes/ ranges/ samples/ tokens/ rows/     finished units (data/prepare/columns.py)
    tokenizer  baselines                        one finished unit each
    dataset/        the unfinished output; one rename gives it its name
    parts/          its shards that aren't finished
    builders/ claims/    of the processes that build it (data/prepare/share.py)

Invariants: everything here belongs to this request and these inputs; otherwise the directory is
removed, which is logged, and the build starts again. So a finished unit that is intact can be used,
whenever it was built. All processes that build at an output have the same request, and an existing
dataset is accepted only if it was built from an equal one.
"""

import hashlib
import json
import shutil
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from forescale.data.dataset import Dataset
from forescale.data.prepare.share import (
    BUILDERS,
    CLAIMS,
    PATIENCE,
    Crew,
    read_builders,
    work_path,
)
from forescale.data.text.documents import DocumentSource, Unit
from forescale.ground.console import Progress, log_line
from forescale.ground.errors import UserError
from forescale.ground.storage import fsync_path, make_folder, publish, read_json, write_json

_FORMAT = 5  # increase it whenever units are made differently: older ones are then not used
_FOLDERS = ("curated", "hashes", "ranges", "samples", "tokens", "rows", "dataset", "parts")
_OF_CREW = (BUILDERS, CLAIMS, "parts")
_REQUEST = "request.json"


class Work:
    """The work directory for `output`, new or continued, and this process among its users."""

    def __init__(self, output: Path, request: dict[str, Any], progress: Progress):
        """Remove a directory of another request, then create what is missing. One process at a
        time may do it. Raises UserError if others build from another request at this moment."""
        self.output = output
        self.path = work_path(output)
        (
            self.curated, self.hashes, self.ranges, self.samples, self.tokens, self.rows,
            self.stage, self.parts,
        ) = (self.path / folder for folder in _FOLDERS)  # fmt: skip
        self.tokenizer, self.baselines = self.path / "tokenizer", self.path / "baselines"
        now = time.time()
        others = [b for b in read_builders(self.path) if b.state(now) == "lives"]
        if self.path.exists() and (why := self._unusable(request)):
            if others:
                problem = f"{why}, and {others[0].label} is building it"
                raise UserError(str(self.path), problem, "wait for its end")
            log_line(progress, f"{self.path}: {why}; starting again")
            self.remove()
        if others:
            some = "another process" if len(others) == 1 else f"{len(others)} other processes"
            log_line(progress, f"{output}: built together with {some}")
        else:
            for folder in _OF_CREW:
                shutil.rmtree(self.path / folder, ignore_errors=True)
            for torn in self.path.rglob(".*.tmp"):
                torn.unlink()
        for folder in _FOLDERS:
            (self.path / folder).mkdir(parents=True, exist_ok=True)
        if not (self.path / _REQUEST).exists():
            write_json(self.path / _REQUEST, request)
            fsync_path(self.path.parent)
        self.crew, self._is_publisher = Crew(self.path, progress), False

    def _unusable(self, whole: dict[str, Any]) -> str:
        """Return why the existing directory can't be used; "" if it can."""
        try:
            have = read_json(self.path / _REQUEST)
        except UserError:
            return "the interrupted build has no readable request"
        want = json.loads(json.dumps(whole))
        if have == want:
            return ""
        if not isinstance(have, dict) or have.get("request") == want["request"]:
            return "the inputs or package versions have changed since the interrupted build"
        request = have.get("request", {})
        keys = [k for k in want["request"] if request.get(k) != want["request"][k]]
        return f"the interrupted build had another request (different {', '.join(keys)})"

    def publish(self) -> None:
        """Rename the dataset to its final name."""
        publish(self.stage, self.output)
        self._is_publisher = True

    def finish(self) -> None:
        """Leave a build that is published. The last process removes everything else; the one that
        published waits for the others, until those that are lost count as dead."""
        end = time.monotonic() + 1.2 * PATIENCE
        while self._is_publisher and self.crew.others() and time.monotonic() < end:
            time.sleep(0.1)
        self.crew.leave("done")
        if self._is_publisher or not self.crew.others():
            shutil.rmtree(self.path, ignore_errors=True)

    def abandon(self, how: str, remove: bool, progress: Progress) -> None:
        """Leave a build that is not finished. remove: nothing of it can be used again."""
        self.crew.leave(how)
        with lock_of(self.output, progress, "leaves its build"):
            if not self.crew.others() and self.path.exists():
                results = (p for p in self.path.glob("*/*") if p.parent.name not in _OF_CREW)
                if remove or not any(path.is_file() for path in results):
                    self.remove()

    def remove(self) -> None:
        shutil.rmtree(self.path)


def work_request(
    request: dict[str, Any], source: DocumentSource, units: Sequence[Unit]
) -> dict[str, Any]:
    """Return what finished units depend on: request, inputs, versions of the code."""
    digest = hashlib.sha256()
    for unit in units:
        digest.update(f"{astuple(unit)}\n".encode())
    for row in source.state():
        digest.update(f"{row}\n".encode())
    versions = {name: version(name) for name in ("tokenizers", "numpy")}
    versions["unicode"] = unicodedata.unidata_version
    inputs = digest.hexdigest()
    return {"format": _FORMAT, "versions": versions, "request": request, "inputs": inputs}


@contextmanager
def lock_of(output: Path, progress: Progress, why: str) -> Iterator[None]:
    """Hold the lock of an output. The kernel releases it when a process ends, however it ends.
    why: what the process is doing that has it."""
    make_folder(output.parent)
    lock = FileLock(output.parent / f".{output.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log_line(progress, f"{output}: waiting for another process that {why}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def build_once(
    output: Path, request: dict[str, Any], progress: Progress, build: Callable[[], None]
) -> Dataset:
    """Call `build` unless the output exists; return the output. A second process with this output
    waits for the first. Raises UserError if the output was built from another request."""
    if not output.exists():  # a finished one may be in a read-only directory
        with lock_of(output, progress, "is building it"):
            if not output.exists():
                build()
    return expect_same(output, request)


def expect_same(output: Path, request: dict[str, Any]) -> Dataset:
    """Return a dataset. Raises UserError if it was built from another request."""
    have = (dataset := Dataset(output)).manifest["build"]
    if differing := [key for key in request if have.get(key) != request[key]]:
        problem = f"holds a dataset that was built with different {', '.join(differing)}"
        todo = "choose another output or remove it"
        if differing == ["source"]:
            todo += "; to add files, build them as a further source, without what is there: "
            todo += f"forescale shards FILES output=DIR curate.against=[{output}]"
        raise UserError(str(output), problem, todo)
    return dataset


def is_done(output: Path) -> bool:
    """Return True if an output exists; called under its lock. What a process left that was killed
    between rename and removal is removed."""
    if output.exists() and (left := work_path(output)).exists():
        now = time.time()
        if not any(builder.state(now) == "lives" for builder in read_builders(left)):
            shutil.rmtree(left, ignore_errors=True)
    return output.exists()
