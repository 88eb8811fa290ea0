"""The work directory of a build, `.NAME.building/` beside the output NAME: what is finished of it.

    request.json    what is built, of which inputs, by which versions
    hashes/ ranges/ samples/ tokens/ rows/      finished units (forescale.data.prepare.columns)
    tokenizer  baselines                        the same, one of each
    dataset/        the output in the making; one rename gives it its name

Invariant: what lies here was made for this request, of these inputs; for any other it is taken away
and begun anew, with a sentence. So a unit that is found and whole is used, whoever made it when.
"""

import hashlib
import json
import shutil
import unicodedata
from collections.abc import Sequence
from dataclasses import astuple
from importlib.metadata import version
from pathlib import Path
from typing import Any

from forescale.data.progress import Progress, say
from forescale.data.text.documents import Source, Unit
from forescale.errors import UserError
from forescale.storage import fsync_path, publish, read_json, write_json

_FORMAT = 1  # raise it whenever units are made differently: those of before are not taken up
_FOLDERS = ("hashes", "ranges", "samples", "tokens", "rows", "dataset")
_REQUEST = "request.json"


class Work:
    """The work directory for `output`, made or taken up again. One process at a time has it."""

    def __init__(self, output: Path, wanted: dict[str, Any], progress: Progress):
        self.output = output
        self.path = work_path(output)
        if self.path.exists() and (why := self._why_not(wanted)):
            say(progress, f"{self.path}: begun {why}, so it is begun anew")
            self.remove()
        for folder in _FOLDERS:
            (self.path / folder).mkdir(parents=True, exist_ok=True)
        for torn in self.path.rglob(".*.tmp"):
            torn.unlink()
        if not (self.path / _REQUEST).exists():
            write_json(self.path / _REQUEST, wanted)
            fsync_path(self.path.parent)
        self.hashes, self.ranges, self.samples, self.tokens, self.rows, self.stage = (
            self.path / folder for folder in _FOLDERS
        )
        self.tokenizer, self.baselines = self.path / "tokenizer", self.path / "baselines"

    def _why_not(self, wanted: dict[str, Any]) -> str:
        """Why what is there is of no use; nothing where it is."""
        try:
            have = read_json(self.path / _REQUEST)
        except UserError:
            return "and hardly got anywhere"
        want = json.loads(json.dumps(wanted))
        if have == want:
            return ""
        if not isinstance(have, dict) or have.get("request") == want["request"]:
            return "of inputs that have changed since, or by other versions"
        request = have.get("request", {})
        keys = [k for k in want["request"] if request.get(k) != want["request"][k]]
        return f"for another request (other {', '.join(keys)})"

    def publish(self) -> None:
        """Give the dataset its name; nothing else is left."""
        publish(self.stage, self.output)
        self.remove()

    def remove(self) -> None:
        shutil.rmtree(self.path)

    def remove_if_empty(self) -> None:
        """Leave nothing behind where nothing has been finished."""
        if not any(
            path.is_file() for folder in _FOLDERS for path in (self.path / folder).iterdir()
        ):
            self.remove()


def work_path(output: Path) -> Path:
    return output.with_name(f".{output.name}.building")


def wanted(request: dict[str, Any], source: Source, units: Sequence[Unit]) -> dict[str, Any]:
    """All that finished units depend on: the request, the inputs, the code that makes them."""
    digest = hashlib.sha256()
    for unit in units:
        digest.update(f"{astuple(unit)}\n".encode())
    for row in source.state():
        digest.update(f"{row}\n".encode())
    versions = {name: version(name) for name in ("tokenizers", "numpy")}
    versions["unicode"] = unicodedata.unidata_version
    return {
        "format": _FORMAT,
        "versions": versions,
        "request": request,
        "inputs": digest.hexdigest(),
    }
