"""The user's own code of a trial: a copy that its runs use, made when the attempt begins.

    campaigns/<name>/code/base    the directory where the campaign began, if its base names a class
    campaigns/<name>/code/NAME    worktree=DIR, or that of the command with patch=FILE applied

Runs start in the copy, which is searched last, so that no file of it replaces one of the project or
of a package. Invariant: a copy never changes after its hash is in the log, as the user's may.
"""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from forescale.ground.errors import UserError
from forescale.ground.storage import make_folder, staged

_KINDS = {".py", ".yaml", ".yml", ".json", ".toml", ".txt"}
_LARGEST, _MOST = 1 << 20, 2000  # bytes of a file, and number of files, that count as code
_ROOT = Path(__file__).resolve().parents[1]


def copy_code(source: Path, target: Path, patch: Path | None = None) -> str:
    """Copy the code of a directory, apply a patch to the copy, and return its hash. Raises
    UserError for a directory without code, with too much of it, or with the project itself."""
    files = [*islice(_files(source), _MOST + 1)]
    if not any(path.suffix == ".py" for path in files):
        raise UserError(str(source), "holds no Python file", "name the directory of your own code")
    if len(files) > _MOST:
        problem, todo = f"holds more than {_MOST:,} files", "name that of your own code alone"
        raise UserError(str(source), problem, f"{todo}: worktree=DIR")
    if (source / "trainer" / "trials" / "own_code.py").is_file():
        problem = "is a copy of forescale, whose code trains and scores both sides"
        todo = "put the change into a class of your own: -- model._target_=mine.Model"
        raise UserError(str(source), problem, todo)
    make_folder(target.parent)
    if target.exists():  # of an attempt that was refused after its copy was made
        shutil.rmtree(target)
    with staged(target) as stage:
        for path in files:
            place = stage / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
        if patch is not None:
            _apply(patch, stage)
    return hash_of_code(target)


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files of a directory that count as code, in order; none below hidden folders,
    folders of runs, or links."""
    if not folder.is_dir():
        raise UserError(str(folder), "no such directory", "check worktree=DIR")
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.is_symlink() or path.name == "__pycache__":
            continue
        if path.is_dir():
            is_run = any((path / name).exists() for name in ("run.json", "log.jsonl", "plan.json"))
            yield from [] if is_run else _files(path)
        elif path.suffix in _KINDS and path.stat().st_size <= _LARGEST:
            yield path


def _apply(patch: Path, folder: Path) -> None:
    """Apply a patch to a copy. Raises UserError if it doesn't fit, or touches the project."""
    if not patch.is_file():
        raise UserError(str(patch), "no such file", "check patch=FILE")
    if shutil.which("git") is None:
        raise UserError("patch", "needs git, which isn't installed", "install it, or worktree=DIR")
    command = ["git", "apply", "--whitespace=nowarn", str(patch.resolve())]
    # In a repository of the user's, git would take the paths from its root, and skip those that
    # aren't below this folder, without a word.
    outside = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.resolve().parent)}
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, env=outside
    )
    if done.returncode:
        problem = f"can't be applied: {' '.join(done.stderr.split())[:300]}"
        todo = "make it by `git diff --relative` in the directory of this command; it may change "
        todo += "your own code"
        raise UserError(str(patch), problem, todo)


def hash_of_code(folder: Path) -> str:
    """Return the SHA-256 of the names and contents of a copy's files."""
    total = hashlib.sha256()
    for path in _files(folder):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return total.hexdigest()


def expect_code(folder: Path, known: str) -> None:
    """Raise UserError if a copy isn't what it was when its hash was taken."""
    if hash_of_code(folder) != known:
        problem = "was changed since the attempt began, so that its runs can't be compared"
        raise UserError(str(folder), problem, "restore it, or try the change by another name")
