"""A copy of the code that a job runs: this project's packages, and the user's own.

Invariant: one input gives the same bytes, and only source files are packed.
"""

import importlib
import io
import os
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path

from forescale.config.target import find_package, targets
from forescale.config.train import TrainJob
from forescale.errors import UserError

_PACKAGES = ("forescale", "forescale.models", "forescale.conf", "forescale.slurm")


def own_packages(job: TrainJob) -> list[Path]:
    """Return the user's packages and modules that hold the classes of the job's `_target_` keys,
    without the installed ones. Raises UserError if Python doesn't find one."""
    found: list[Path] = []
    installed = {sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")}
    for key, target in targets(job).items():
        top = target.partition(".")[0]
        spec = find_package(top)
        if spec is None:
            what = f"Python finds no module {top} from here"
            raise UserError(key, what, "submit from the directory that holds it")
        where = spec.submodule_search_locations
        path = Path(next(iter(where))) if where else Path(spec.origin or "")
        if str(path.parent) not in installed and path.exists() and path not in found:
            found.append(path)
    return found


def write_code(target: Path, more: list[Path]) -> None:
    """Pack our packages, and `more` packages or modules, under code/."""
    with tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, file in sorted(_members(more).items()):
            info = tarfile.TarInfo(str(Path("code") / name))
            content = file.read_bytes()
            info.size, info.mode = len(content), 0o644
            tar.addfile(info, io.BytesIO(content))


def _members(more: list[Path]) -> dict[Path, Path]:
    """The file of each name in the tar. In a checkout our packages are in several folders, when
    installed in one. Each file is packed once, at its import path."""
    found = dict[Path, Path]()
    for package in _PACKAGES:
        root = Path(next(iter(importlib.import_module(package).__path__)))
        place = Path(*package.split("."))
        found |= {place / file.relative_to(root): file for file in _sources(root)}
    for path in more:
        found |= {file.relative_to(path.parent): file for file in _sources(path)}
    return found


def _sources(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    for file in path.rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts and not file.name.startswith("."):
            yield file


def pack_environment(root: Path) -> Path:
    """A tar of the virtual environment that runs this, under `root`; made once for each state of
    it. Raises UserError outside of one."""
    if sys.prefix == sys.base_prefix:
        what = "this Python is not in a virtual environment, and only one of those can be packed"
        raise UserError("slurm.pack", what, "install forescale in one (python3 -m venv)")
    packages = Path(sysconfig.get_paths()["purelib"])
    newest = max(p.stat().st_mtime_ns for p in (packages, *packages.glob("*.dist-info")))
    target = root / f"{Path(sys.prefix).name}-{newest}.tar"
    if not target.exists():
        root.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        subprocess.run(["tar", "-cf", str(temporary), "-C", sys.prefix, "."], check=True)
        os.replace(temporary, target)
    return target
