"""The work directory of a build, `.NAME.building/` beside the output NAME, and the lock of an
output.

    request.json    request, inputs and package versions of the build
    curated/ hashes/ ranges/ samples/ tokens/ rows/     finished units (data/prepare/columns.py)
    tokenizer  baselines                        one finished unit each
    dataset/        the unfinished output; one rename gives it its name

Invariants: everything here belongs to this request and these inputs; otherwise the directory is
removed, which is logged, and the build starts again. So a finished unit that is intact can be used,
whenever it was built. At most one process builds at an output, and an existing dataset is accepted
only if it was built from an equal request.
"""

import hashlib
import json
import shutil
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import astuple
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from forescale.data.dataset import Dataset
from forescale.data.prepare.share import ALONE, Share, wait_for
from forescale.data.text.documents import DocumentSource, Unit
from forescale.ground.console import Progress, log_line
from forescale.ground.errors import UserError
from forescale.ground.storage import fsync_path, make_folder, publish, read_json, write_json

_FORMAT = 5  # increase it whenever units are made differently: older ones are then not used
_FOLDERS = ("curated", "hashes", "ranges", "samples", "tokens", "rows", "dataset")
_REQUEST = "request.json"


class Work:
    """The work directory for `output`, new or continued. One build may use it at a time, of one
    process or of several that share its tasks (share.py)."""

    def __init__(
        self, output: Path, request: dict[str, Any], progress: Progress, share: Share = ALONE
    ):
        """Remove a directory of another request, then create what is missing; where processes build
        together, the first does, and the others wait for it."""
        self.output = output
        self.path = work_path(output)
        self.curated, self.hashes, self.ranges, self.samples, self.tokens, self.rows, self.stage = (
            self.path / folder for folder in _FOLDERS
        )
        self.tokenizer, self.baselines = self.path / "tokenizer", self.path / "baselines"
        if share.is_first:
            self._prepare(request, progress)
        if share.size > 1:
            begun = self.path / f"begun-{share.start}"
            begun.touch() if share.is_first else wait_for([begun], progress)

    def _prepare(self, request: dict[str, Any], progress: Progress) -> None:
        if self.path.exists() and (why := self._unusable(request)):
            log_line(progress, f"{self.path}: {why}; starting again")
            self.remove()
        for folder in _FOLDERS:
            (self.path / folder).mkdir(parents=True, exist_ok=True)
        for torn in self.path.rglob(".*.tmp"):
            torn.unlink()
        if not (self.path / _REQUEST).exists():
            write_json(self.path / _REQUEST, request)
            fsync_path(self.path.parent)

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

    def through(self, share: Share) -> Path:
        """Return the file by which a process says that it has done all of its tasks."""
        return self.path / f"through-{share.start}-{share.rank}"

    def failed(self, share: Share) -> Path:
        """Return the file by which one process tells the others that it has failed."""
        return self.path / f"failed-{share.start}"

    def publish(self) -> None:
        """Rename the dataset to its final name and remove everything else."""
        publish(self.stage, self.output)
        self.remove()

    def remove(self) -> None:
        shutil.rmtree(self.path)

    def remove_if_empty(self) -> None:
        """Remove the directory if nothing in it is finished."""
        if not any(path.is_file() for path in self.path.glob("*/*")):
            self.remove()


def work_path(output: Path) -> Path:
    """Return the path of the work directory for `output`."""
    return output.with_name(f".{output.name}.building")


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


def build_once(
    output: Path, request: dict[str, Any], progress: Progress, build: Callable[[], None]
) -> Dataset:
    """Call `build` unless the output exists; return the output. A second process with this output
    waits for the first; the kernel releases the lock when a process ends, however it ends. Raises
    UserError if the output was built from another request."""
    # A finished one needs no lock, and may be in a read-only directory.
    if not output.exists() or work_path(output).exists():
        make_folder(output.parent)
        lock = FileLock(output.parent / f".{output.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log_line(progress, f"{output}: waiting for another process that is building it")
            lock.acquire()
        try:
            if not output.exists():
                build()
            elif (left := work_path(output)).exists():  # killed between rename and removal
                shutil.rmtree(left)
        finally:
            lock.release()
    have = (dataset := Dataset(output)).manifest["build"]
    if differing := [key for key in request if have.get(key) != request[key]]:
        problem = f"holds a dataset that was built with different {', '.join(differing)}"
        todo = "choose another output or remove it"
        if differing == ["source"]:
            todo += "; to add files, build them as a further source, without what is there: "
            todo += f"forescale shards FILES output=DIR curate.against=[{output}]"
        raise UserError(str(output), problem, todo)
    return dataset
