"""A copy of the code that a job runs: this project's packages, and the user's own.

Invariant: one input gives the same bytes, and only source files are packed. A name is searched as a
job searches it, the working directory last, so what is packed hides nothing that is installed.
"""

import ast
import importlib
import io
import os
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from forescale.config.target import find_package, targets
from forescale.config.train import TrainJob
from forescale.ground.errors import UserError

_PACKAGES = ("forescale", "forescale.models", "forescale.conf", "forescale.slurm")
_LARGEST = 64 << 20  # bytes of the user's own code


def own_packages(job: TrainJob) -> list[Path]:
    """Return the user's packages and modules that hold the classes of the job's `_target_` keys,
    and those beside them that they import, in turn; without the installed ones. Raises UserError if
    Python doesn't find the module of a class, or if all are too large."""
    packages: list[Path] = []
    for key, target in targets(job).items():
        top = target.partition(".")[0]
        if find_package(top) is None:
            problem = f"Python finds no module {top} from here"
            raise UserError(key, problem, "submit from the directory that holds it")
        new = [path] if (path := _own_place(top)) else []
        while new:
            if (path := new.pop(0)) in packages:
                continue
            packages.append(path)
            sizes = {p: sum(file.stat().st_size for file in _sources(p)) for p in packages}
            if sum(sizes.values()) > _LARGEST:
                largest = max(packages, key=lambda path: sizes[path])
                problem = f"more than {_LARGEST >> 20} MiB of files would be frozen with the job, "
                problem += f"of which {sizes[largest] / 2**20:,.1f} are in {largest}"
                raise UserError(
                    key, problem, "move data out of the package, or install it with pip"
                )
            beside = (place for name in sorted(_imports(path)) if (place := _own_place(name)))
            new += [place for place in beside if place.parent == path.parent]
    return packages


def described(packages: list[Path]) -> str:
    """Return a sentence that names what `own_packages` found."""
    names = ", ".join(f"{path.name}/" if path.is_dir() else path.name for path in packages)
    sizes = [file.stat().st_size for path in packages for file in _sources(path)]
    where = ", ".join(sorted({str(path.parent) for path in packages}))
    count = f"{len(sizes)} file{'s' if len(sizes) > 1 else ''}, {sum(sizes) / 1e3:,.1f} kB"
    return f"your own code is frozen with the job: {names} from {where} ({count})."


def _own_place(name: str) -> Path | None:
    """Return the file or directory of a top-level module or package of the user's own; None for one
    that is installed, that Python itself has, that is ours, or that isn't found."""
    with suppress(ImportError, ValueError):  # ValueError: of a module without a spec
        if name not in _PACKAGES and (spec := find_package(name)):
            text = next(iter(spec.submodule_search_locations or ()), spec.origin)
            path = Path(text) if text else None
            if path and path.exists():
                is_of_python = path.is_relative_to(sysconfig.get_paths()["stdlib"])
                is_installed = not {"site-packages", "dist-packages"}.isdisjoint(path.parts)
                return None if is_of_python or is_installed else path
    return None


def _imports(path: Path) -> set[str]:
    """Return the top-level names that the Python files of a module or package import."""
    names = set()
    for file in _sources(path):
        if file.suffix == ".py":
            with suppress(SyntaxError, ValueError):  # where it is imported, Python says so better
                for node in ast.walk(ast.parse(file.read_bytes())):
                    if isinstance(node, ast.Import):
                        names |= {alias.name for alias in node.names}
                    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                        names.add(node.module)
    return {name.partition(".")[0] for name in names}


def write_code(target: Path, packages: list[Path]) -> None:
    """Pack our packages, and the user's packages or modules, under code/. In a checkout ours are in
    several folders, when installed in one: each file is packed once, at its import path."""
    members = dict[Path, Path]()
    for package in _PACKAGES:
        root = Path(next(iter(importlib.import_module(package).__path__)))
        place = Path(*package.split("."))
        members |= {place / file.relative_to(root): file for file in _sources(root)}
    for path in packages:
        members |= {file.relative_to(path.parent): file for file in _sources(path)}
    with tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, file in sorted(members.items()):
            info = tarfile.TarInfo(str(Path("code") / name))
            content = file.read_bytes()
            info.size, info.mode = len(content), 0o644
            tar.addfile(info, io.BytesIO(content))


def _sources(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    for file in path.rglob("*"):
        parts = file.relative_to(path).parts
        is_hidden = any(part.startswith(".") or part == "__pycache__" for part in parts)
        if file.is_file() and not is_hidden:
            yield file


def pack_environment(root: Path) -> Path:
    """A tar of the virtual environment that runs this, under `root`; made once for each state of
    it. Raises UserError outside of one."""
    if sys.prefix == sys.base_prefix:
        problem = "this Python is not in a virtual environment, and only one of those can be packed"
        raise UserError("slurm.pack", problem, "install forescale in one (python3 -m venv)")
    packages = Path(sysconfig.get_paths()["purelib"])
    # A sum: what is installed while the clock is behind isn't the newest.
    state = sum(p.stat().st_mtime_ns for p in (packages, *packages.glob("*.dist-info")))
    target = root / f"{Path(sys.prefix).name}-{state}.tar"
    if not target.exists():
        root.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        subprocess.run(["tar", "-cf", str(temporary), "-C", sys.prefix, "."], check=True)
        os.replace(temporary, target)
    return target
